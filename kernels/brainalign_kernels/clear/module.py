"""CLEAR with its projections and pooling weights, with the parameter names of its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brainalign_kernels.clear.attention import clear_attention
from brainalign_kernels.clear.mask import clear_scale
from brainalign_kernels.errors import ShapeError

__all__ = ["ClearAttention"]


class ClearAttention(nn.Module):
    r"""CLEAR attention of a diffusion transformer.

    .. math:: K_P(y, x) = \sum_{a, b < f} w_{ab}\, K(f y + a, f x + b), \qquad
              O = \mathrm{clear}(Q, [K; K_P], [V; V_P])

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    radius : float
        Of the disc, in tokens.
    down_factor : int, optional
        f: append keys and values pooled over f x f cells with learned weights, which start at
        1 / f^2. Rows and columns beyond a multiple of f are left out.
    encoder_stream : bool
        The text comes apart from the image, with projections of its own, and both leave through
        an output projection. Otherwise text and image come as one and leave unprojected.
    proportional_attention : bool
        Scale by `clear_scale` instead of D^-1/2.
    bias : bool
        Give the projections a bias.
    impl : str
        See `clear_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Liu et al. (2024), CLEAR: conv-like linearization revs pre-trained diffusion transformers up.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        radius: float,
        *,
        down_factor: int | None = None,
        encoder_stream: bool = False,
        proportional_attention: bool = False,
        bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(f"dim {dim} must be a multiple of num_heads {num_heads}.")
        if down_factor is not None and down_factor < 1:
            raise ShapeError(f"down_factor must be at least 1; got {down_factor}.")
        self.dim, self.num_heads, self.radius = dim, num_heads, radius
        self.down_factor, self.encoder_stream = down_factor, encoder_stream
        self.proportional_attention, self.impl = proportional_attention, impl
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        if encoder_stream:
            self.add_q_proj = nn.Linear(dim, dim, bias=bias)
            self.add_k_proj = nn.Linear(dim, dim, bias=bias)
            self.add_v_proj = nn.Linear(dim, dim, bias=bias)
            self.to_out = nn.Sequential(nn.Linear(dim, dim, bias=bias))
            self.to_add_out = nn.Linear(dim, dim, bias=bias)
        if down_factor is not None:
            f = down_factor
            self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, f, 1, f, 1), 1 / f**2))

    def project(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values (B, heads, tokens, channels), text first."""
        made = [f(hidden_states) for f in (self.to_q, self.to_k, self.to_v)]
        if encoder_hidden_states is not None:
            text = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            made = [
                torch.cat([f(encoder_hidden_states), x], dim=1)
                for f, x in zip(text, made, strict=True)
            ]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in made)
        return q, k, v

    def pool(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Pool the image (B, heads, h*w, channels) over cells."""
        f = self.down_factor or 1
        h, w = shape[0] // f, shape[1] // f
        cells = x.unflatten(2, shape)[:, :, : h * f, : w * f]
        cells = cells.unflatten(3, (w, f)).unflatten(2, (h, f))
        return (cells * self.spatial_weight).sum(dim=(3, 5)).flatten(2, 3)

    def core(self, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], n_text: int) -> Tensor:
        """Attention of projected tokens."""
        scale = None
        pools = self.down_factor is not None
        if self.proportional_attention:
            scale = clear_scale(q.shape[2], q.shape[3], pooled=pools)
        pooled: Any = None
        if pools:
            pooled = tuple(self.pool(x[:, :, n_text:], shape) for x in (k, v))
        return clear_attention(
            q, k, v, shape=shape, n_text=n_text, radius=self.radius, pooled=pooled, scale=scale,
            impl=self.impl,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        shape: tuple[int, int],
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Parameters
        ----------
        hidden_states : Tensor, shape (B, h w, dim), or (B, text + h w, dim) without a text stream
            Image, or text and image.
        shape : (int, int)
            Rows h and columns w of the image.
        encoder_hidden_states : Tensor, shape (B, text, dim), optional
            The text, where it is a stream of its own.

        Returns
        -------
        out : Tensor, shape of `hidden_states`
        text : Tensor, shape of `encoder_hidden_states`
            Only with a text stream.
        """
        if self.encoder_stream != (encoder_hidden_states is not None):
            raise ShapeError(
                "encoder_hidden_states must be given with encoder_stream, and only with it."
            )
        for x in (hidden_states, encoder_hidden_states):
            if x is not None and (x.ndim != 3 or x.shape[2] != self.dim):
                raise ShapeError(f"Expected (batch, tokens, {self.dim}); got {tuple(x.shape)}.")
        q, k, v = self.project(hidden_states, encoder_hidden_states)
        n_text = q.shape[2] - shape[0] * shape[1]
        out = self.core(q, k, v, shape, n_text).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        return self.to_out(out[:, n_text:]), self.to_add_out(out[:, :n_text])
