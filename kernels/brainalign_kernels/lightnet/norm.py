"""The norm of LightNet and TPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError

__all__ = ["RootMeanSquareNorm"]


class RootMeanSquareNorm(nn.Module):
    r"""Divide by the root of the sum of squares over n channels, times the root of n.

    .. math:: y = w \sqrt{n}\, x / \sqrt{\textstyle\sum x^2 + \epsilon}
              \quad\text{or}\quad y = w\, x / \sqrt{\textstyle\frac{1}{n} \sum x^2 + \epsilon}

    Parameters
    ----------
    dim : int
        Channels.
    groups : int
        Into which "grouprmsnorm" divides them.
    kind : {"rmsnorm", "grouprmsnorm"}
        n is all channels, or those of a group.
    eps : float
        Epsilon.
    eps_on : {"sum", "mean"}
        Left or right equation.
    """

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 1,
        kind: str = "rmsnorm",
        eps: float = 1e-5,
        eps_on: str = "sum",
    ) -> None:
        super().__init__()
        if kind not in ("rmsnorm", "grouprmsnorm"):
            raise ShapeError(f"norm must be 'rmsnorm' or 'grouprmsnorm'; got {kind!r}.")
        if eps_on not in ("sum", "mean"):
            raise ShapeError(f"eps_on must be 'sum' or 'mean'; got {eps_on!r}.")
        self.groups = groups if kind == "grouprmsnorm" else 1
        self.eps = eps * dim / self.groups if eps_on == "mean" else eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim)."""
        wide = accumulation_dtype(x.dtype)
        y = x.to(wide).unflatten(-1, (self.groups, -1))
        size = y.shape[-1]
        y = y * size**0.5 * (y.square().sum(dim=-1, keepdim=True) + self.eps).rsqrt()
        return (y.flatten(-2) * self.weight.to(wide)).to(x.dtype)
