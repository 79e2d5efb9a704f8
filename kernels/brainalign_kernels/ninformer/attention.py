"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.ninformer import fused, reference
from brainalign_kernels.ninformer.reference import MLP, Affine

__all__ = ["MLP", "Affine", "mixer_gating_unit"]

OPERATION = Operation(
    "mixer_gating_unit", reference.mixer_gating_unit, compiled=Path(fused.mixer_gating_unit)
)


def mixer_gating_unit(
    x: Tensor,
    projection: Affine,
    token_norm: Affine,
    token_mlp: MLP,
    channel_norm: Affine,
    channel_mlp: MLP,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    r"""Gate a projection of the tokens by an MLP-Mixer of the same tokens.

    .. math::
        u = x + \mathrm{MLP}_T(\mathrm{LN}(x)^\top)^\top, \quad
        o = (W x + b) \odot \big(u + \mathrm{MLP}_C(\mathrm{LN}'(u))\big)

    Parameters
    ----------
    x : Tensor, shape (B, N, C)
        Tokens.
    projection : Affine of (C, C), (C,)
        W and b.
    token_norm, channel_norm : Affine of (C,), (C,)
        Gains and shifts of the layer norms.
    token_mlp : MLP of (F, N), (F,), (N, F), (N,)
        Mixes the tokens: a fixed number of them.
    channel_mlp : MLP of (F, C), (F,), (C, F), (C,)
        Mixes the channels.
    eps : float
        Of the layer norms.
    impl : {"auto", "reference", "compiled"}
        "compiled" uses PyTorch's fused layers.

    Returns
    -------
    Tensor, shape (B, N, C)

    Raises
    ------
    ShapeError
        For shapes and types that do not fit.

    References
    ----------
    Abdullah et al. (2024), NiNformer: a network in network transformer with token mixing generated
    gating function.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ShapeError(f"Expected floating-point x (B, N, C); got {x.dtype}, {tuple(x.shape)}.")
    tokens, channels = x.shape[1:]
    _check("projection", projection, (channels, channels), channels)
    _check("token_norm", token_norm, (channels,), channels)
    _check("channel_norm", channel_norm, (channels,), channels)
    for name, layers, size in (
        ("token_mlp", token_mlp, tokens),
        ("channel_mlp", channel_mlp, channels),
    ):
        width = layers.first.weight.shape[0]
        _check(f"{name}.first", layers.first, (width, size), width)
        _check(f"{name}.second", layers.second, (size, width), size)
    out: Tensor = OPERATION(
        impl, x, projection, token_norm, token_mlp, channel_norm, channel_mlp, eps=eps
    )
    return out


def _check(name: str, layer: Affine, weight: tuple[int, ...], bias: int) -> None:
    if layer.weight.shape != weight or layer.bias.shape != (bias,):
        raise ShapeError(
            f"{name} must have shapes {weight} and ({bias},) here; got "
            f"{tuple(layer.weight.shape)} and {tuple(layer.bias.shape)}."
        )
