"""Lightning attention as a token mixer: projections, activation, norm and output gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.lightning.attention import lightning_attention
from brainalign_kernels.lightning.slopes import lightning_slopes

__all__ = ["LightningAttention"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}


class LightningAttention(nn.Module):
    r"""Lightning attention between projections.

    .. math:: q, k, v = \phi(x W_q),\ \phi(x W_k),\ \phi(x W_v), \qquad
              y = \left(\mathrm{RMSNorm}(\mathrm{lightning}(q, k, v)) \odot \sigma(x W_g)\right) W_o

    Parameters
    ----------
    dim : int
        Channels C of the tokens.
    heads : int
        Heads H.
    layer, layers : int
        Which layer this is, from 0, and of how many: deeper layers decay more slowly.
    head_dim : int, optional
        D; by default C / H.
    activation : {"silu", "sigmoid", "none"}
        :math:`\phi`, on queries, keys and values.
    gate : {"sigmoid", "silu", "none"}
        :math:`\sigma`; "none" leaves the gate and its projection out.
    norm : bool
        RMSNorm with a gain over all H * D channels; False leaves it out.
    bias : bool
        Of the projections.
    scale : float
        Of the products q.k.
    eps : float
        Of the norm.
    chunk_size : int
        See `lightning_attention`.
    impl : str
        See `lightning_attention`.

    Raises
    ------
    ShapeError
        If the heads do not divide the channels, or an option is unknown.

    References
    ----------
    Qin et al. (2024), Various lengths, constant speed: efficient language modeling with lightning
    attention, section 4; MiniMax (2025), MiniMax-01: scaling foundation models with lightning
    attention, section 2.2.
    """

    slopes: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        *,
        head_dim: int | None = None,
        activation: str = "silu",
        gate: str = "sigmoid",
        norm: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        eps: float = 1e-6,
        chunk_size: int = 64,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ShapeError(
                f"dim must be a multiple of heads, or give head_dim; got {dim}, {heads}."
            )
        for name, chosen in (("activation", activation), ("gate", gate)):
            if chosen not in _ACTIVATIONS:
                raise ShapeError(
                    f"{name} must be one of {', '.join(_ACTIVATIONS)}; got {chosen!r}."
                )
        self.heads, self.scale, self.chunk_size, self.impl = heads, scale, chunk_size, impl
        self.activation, self.gate = activation, gate
        inner = heads * (dim // heads if head_dim is None else head_dim)
        self.q_proj = nn.Linear(dim, inner, bias=bias)
        self.k_proj = nn.Linear(dim, inner, bias=bias)
        self.v_proj = nn.Linear(dim, inner, bias=bias)
        self.gate_proj = nn.Linear(dim, inner, bias=bias) if gate != "none" else None
        self.norm = nn.RMSNorm(inner, eps=eps) if norm else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.register_buffer("slopes", lightning_slopes(heads, layer, layers), persistent=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix tokens.

        Parameters
        ----------
        x : Tensor, shape (B, N, C)
            Tokens.
        state : Tensor, shape (B, H, D, D), optional
            What an earlier call returned for the tokens before these.
        return_state : bool
            Return the state after the last token too.

        Returns
        -------
        out : Tensor, shape (B, N, C)
        state : Tensor, shape (B, H, D, D)
            With `return_state`.
        """
        phi = _ACTIVATIONS[self.activation]
        q, k, v = (
            phi(project(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, final = lightning_attention(
            q,
            k,
            v,
            -self.slopes,
            state=state,
            return_state=True,
            scale=self.scale,
            chunk_size=self.chunk_size,
            impl=self.impl,
        )
        mixed = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate_proj is not None:
            mixed = mixed * _ACTIVATIONS[self.gate](self.gate_proj(x))
        mixed = self.out_proj(mixed)
        return (mixed, final) if return_state else mixed
