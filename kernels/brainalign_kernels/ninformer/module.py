"""NiNformer's gating unit, block and stack as modules."""

from __future__ import annotations

from torch import Tensor, nn

from brainalign_kernels.ninformer.attention import MLP, Affine, mixer_gating_unit

__all__ = ["MixerGatingUnit", "NiNformer", "NiNformerBlock"]


class FeedForward(nn.Module):
    """Linear map, exact GELU, linear map."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, width)
        self.second = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        out: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return out


class MixerGatingUnit(nn.Module):
    r"""`mixer_gating_unit` with its parameters.

    .. math:: o = (W x + b) \odot \mathrm{Mixer}(x)

    Parameters
    ----------
    d_model : int
        Channels C.
    d_ffn : int
        F, width of both MLPs.
    seq_len : int
        N: exactly that many tokens.
    eps : float
        Of the layer norms.
    impl : {"auto", "reference", "compiled"}
        See `mixer_gating_unit`.

    References
    ----------
    Abdullah et al. (2024), NiNformer: a network in network transformer with token mixing generated
    gating function.
    """

    def __init__(
        self, d_model: int, d_ffn: int, seq_len: int, *, eps: float = 1e-5, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(d_model, d_model)
        self.token_norm = nn.LayerNorm(d_model, eps=eps)
        self.token_mlp = FeedForward(seq_len, d_ffn)
        self.channel_norm = nn.LayerNorm(d_model, eps=eps)
        self.channel_mlp = FeedForward(d_model, d_ffn)
        self.eps, self.impl = eps, impl

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (B, N, C)."""
        return mixer_gating_unit(
            x,
            _affine(self.projection),
            _affine(self.token_norm), _mlp(self.token_mlp),
            _affine(self.channel_norm), _mlp(self.channel_mlp),
            eps=self.eps, impl=self.impl,
        )  # fmt: skip


class NiNformerBlock(nn.Module):
    r"""Gating unit and feed-forward network, sharing one layer norm.

    .. math:: x \leftarrow \mathrm{MGU}(\mathrm{LN}(x)) + x, \quad
              x \leftarrow \mathrm{FFN}(\mathrm{LN}(x)) + x

    Parameters
    ----------
    d_model, d_ffn, seq_len, eps, impl
        See `MixerGatingUnit`.

    References
    ----------
    Abdullah et al. (2024), NiNformer: a network in network transformer with token mixing generated
    gating function.
    """

    def __init__(
        self, d_model: int, d_ffn: int, seq_len: int, *, eps: float = 1e-5, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.gating_unit = MixerGatingUnit(d_model, d_ffn, seq_len, eps=eps, impl=impl)
        self.ffn = FeedForward(d_model, d_ffn)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (B, N, C)."""
        x = self.gating_unit(self.norm(x)) + x
        return self.ffn(self.norm(x)) + x


class NiNformer(nn.Module):
    r"""A stack of `NiNformerBlock`.

    .. math:: x \leftarrow \mathrm{Block}_l(x), \quad l = 1 \dots L

    Parameters
    ----------
    d_model, d_ffn, seq_len, eps, impl
        See `MixerGatingUnit`.
    num_layers : int
        Blocks L.

    References
    ----------
    Abdullah et al. (2024), NiNformer: a network in network transformer with token mixing generated
    gating function.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        seq_len: int,
        num_layers: int,
        *,
        eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                NiNformerBlock(d_model, d_ffn, seq_len, eps=eps, impl=impl)
                for _ in range(num_layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens (B, N, C)."""
        out: Tensor = self.blocks(x)
        return out


def _affine(layer: nn.Linear | nn.LayerNorm) -> Affine:
    return Affine(layer.weight, layer.bias)


def _mlp(layers: FeedForward) -> MLP:
    return MLP(_affine(layers.first), _affine(layers.second))
