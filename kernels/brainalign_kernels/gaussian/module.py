"""Gaussian adaptive attention as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.gaussian.attention import gaussian_weights

__all__ = ["GaussianAdaptiveAttention", "GaussianAdaptiveBlock"]


class GaussianAdaptiveAttention(nn.Module):
    r"""`gaussian_adaptive_attention` with learned offsets and widths.

    .. math:: o_i = x_i w_i

    Parameters
    ----------
    num_gaussians : int
        G, of every head.
    num_heads : int
        Parts of the axis.
    axis : int
        Along which is weighed.
    padding_value, eps, impl
        See `gaussian_adaptive_attention`.
    generator : torch.Generator, optional
        Of the first widths, exp of standard normal numbers; offsets start at 0.

    References
    ----------
    Ioannides et al. (2024), Gaussian adaptive attention is all you need.
    """

    def __init__(
        self,
        num_gaussians: int,
        *,
        num_heads: int = 1,
        axis: int = 1,
        padding_value: float | None = None,
        eps: float = 1e-8,
        impl: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_gaussians < 1 or num_heads < 1:
            raise ShapeError(
                f"At least one Gaussian and one head: got {num_gaussians} and {num_heads}."
            )
        shape = (num_heads, num_gaussians)
        self.mean_offsets = nn.Parameter(torch.zeros(shape))
        self.c = nn.Parameter(torch.randn(shape, generator=generator).exp())
        self.axis, self.padding_value, self.eps, self.impl = axis, padding_value, eps, impl

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and weights, both of the shape of x."""
        return gaussian_weights(
            x, self.mean_offsets, self.c, axis=self.axis, padding_value=self.padding_value,
            eps=self.eps, impl=self.impl,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Weigh x along the axis."""
        return self.weights(x)[0]


class GaussianAdaptiveBlock(nn.Module):
    r"""Layers of Gaussian adaptive attention, each with a skip connection.

    .. math:: x \leftarrow \mathrm{GAAM}_l(x) + x

    Parameters
    ----------
    layers : sequence of GaussianAdaptiveAttention
        In their order.

    References
    ----------
    Ioannides et al. (2024), Gaussian adaptive attention is all you need.
    """

    def __init__(self, layers: Sequence[GaussianAdaptiveAttention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers."""
        for layer in self.layers:
            x = layer(x) + x
        return x
