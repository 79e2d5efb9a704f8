"""Position encodings with trained angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.linear_position.encoding import lrpe, md_lrpe

__all__ = ["LRPE", "MDLRPE"]


def _angles(heads: int, count: int, base: float) -> nn.Parameter:
    """Return base^(-i / count), the frequencies of rotary encodings, the same for every head."""
    places = torch.arange(count) / max(count, 1)
    return nn.Parameter((base**-places).repeat(heads, 1))


class LRPE(nn.Module):
    r"""`lrpe` with trained angles.

    .. math:: y_t = [x_t \cos(t\theta),\; x_t \sin(t\theta)]

    Parameters
    ----------
    heads : int
        H, or 1 for angles that all heads share.
    channels : int
        Channels D.
    kind : {"cosine", "rotate"}
        See `lrpe`.
    act : str
        See `lrpe`.
    base : float
        The angles start at base^(-i / number of angles).

    References
    ----------
    Qin et al. (2023), Linearized relative positional encoding, sec. 3.
    """

    def __init__(
        self,
        heads: int,
        channels: int,
        *,
        kind: str = "cosine",
        act: str = "none",
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        if kind == "rotate" and channels % 2:
            raise ShapeError(f"kind='rotate' pairs channels; got {channels}, an odd number.")
        self.kind, self.act = kind, act
        self.theta = _angles(heads, channels // 2 if kind == "rotate" else channels, base)

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        """Encode x (B, H, N, D)."""
        return lrpe(x, self.theta, kind=self.kind, offset=offset, act=self.act)


class MDLRPE(nn.Module):
    r"""`md_lrpe` with trained angles.

    .. math:: y = [x \cos\alpha,\; x \sin\alpha], \quad
              \alpha = [n_1\theta, \dots, n_m\theta]_{1..D}

    Parameters
    ----------
    heads, channels : int
        H and D.
    axes : int
        Axes m.
    act : str
        See `lrpe`.
    base : float
        The angles start at base^(-i / number of angles).

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-LRPE).
    """

    def __init__(
        self, heads: int, channels: int, axes: int, *, act: str = "none", base: float = 10000.0
    ) -> None:
        super().__init__()
        self.axes, self.act = axes, act
        self.theta = _angles(heads, -(-channels // axes), base)

    def forward(self, x: Tensor, shape: Sequence[int], *, text_tokens: int = 0) -> Tensor:
        """Encode x (B, H, l + product of shape, D).

        Raises
        ------
        ShapeError
            If `shape` has another number of axes than the module.
        """
        if len(shape) != self.axes:
            raise ShapeError(f"Expected {self.axes} axes; got shape {tuple(shape)}.")
        return md_lrpe(x, self.theta, shape, text_tokens=text_tokens, act=self.act)
