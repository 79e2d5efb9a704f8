"""TPE as published: the encoding, a norm and a projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.lightnet.norm import RootMeanSquareNorm
from brainalign_kernels.toeplitz.encoding import to_rows, tpe

__all__ = ["MDTPE", "TPE"]


class TPE(nn.Module):
    r"""Toeplitz position encoding, then a norm and a projection.

    .. math:: y = W_o\, \mathrm{norm}(\mathrm{tpe}(x))

    Parameters
    ----------
    dim : int
        Channels C, a multiple of `num_heads`.
    num_heads : int
        Heads H.
    bias : bool
        Of the projection.
    norm : {"rmsnorm", "grouprmsnorm"}
        Over all channels, or over those of each head.
    norm_eps : float
        Added to the sum of squares.
    impl : str
        See `tpe`.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-TPE).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        bias: bool = False,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ShapeError(f"dim must be a multiple of num_heads; got {dim}, {num_heads}.")
        self.num_heads, self.impl = num_heads, impl
        self.q = nn.Parameter(torch.randn(dim) * 0.1)
        self.k = nn.Parameter(torch.randn(dim) * 0.1)
        self.log_decay = nn.Parameter(torch.randn(num_heads) * 0.1)
        self.norm = RootMeanSquareNorm(dim, groups=num_heads, kind=norm, eps=norm_eps)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def core(
        self, x: Tensor, *, mask: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the encoding before norm and projection (B, N, C), and the state (B, H, D)."""
        if mask is not None:
            x = x * mask.to(x.dtype)[..., None]
        split = (self.num_heads, -1)
        made = tpe(
            x.unflatten(-1, split).transpose(1, 2),
            self.q.unflatten(0, split),
            self.k.unflatten(0, split),
            self.log_decay,
            state=state,
            return_state=True,
            impl=self.impl,
        )
        assert isinstance(made, tuple)
        return made[0].transpose(1, 2).flatten(2), made[1]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode x (B, N, C).

        Parameters
        ----------
        x : Tensor, shape (B, N, C)
            Tokens.
        mask : Tensor, shape (B, N), optional
            0 or False: padding, counts as zeros.
        state : Tensor, shape (B, H, C / H), optional
            What an earlier call returned.
        return_state : bool
            Return the state after the last token too.
        """
        made, final = self.core(x, mask=mask, state=state)
        out = self.o_proj(self.norm(made))
        return (out, final) if return_state else out


class MDTPE(nn.Module):
    r"""Sum of one `TPE` along each axis of a grid.

    .. math:: y = \sum_i \mathrm{TPE}_i(x \text{ along axis } i)

    Parameters
    ----------
    dim : int
        Channels C.
    num_heads : int
        Heads H.
    dims : sequence of int
        Axes of the input that are encoded; -2 is the last one before the channels.
    bias, norm, norm_eps, impl
        See `TPE`.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-TPE).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        dims: Sequence[int] = (-2,),
        bias: bool = False,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.tpes = nn.ModuleList(
            TPE(dim, num_heads, bias=bias, norm=norm, norm_eps=norm_eps, impl=impl) for _ in dims
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, axes..., C)."""
        total = torch.zeros_like(x)
        for dim, encoding in zip(self.dims, self.tpes, strict=True):
            rows, (shape, place) = to_rows(x, dim, behind=1)
            total = total + encoding(rows).reshape(shape).movedim(-2, place)
        return total
