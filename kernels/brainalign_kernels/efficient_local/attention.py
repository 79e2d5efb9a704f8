"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.efficient_local import convolution, reference
from brainalign_kernels.efficient_local.reference import ACTIVATIONS, GATES, Strip
from brainalign_kernels.errors import ShapeError

__all__ = ["Strip", "efficient_local_attention"]


OPERATION = Operation(
    "efficient_local_attention",
    reference.efficient_local_attention,
    compiled=Path(convolution.efficient_local_attention),
)


def efficient_local_attention(
    x: Tensor,
    rows: Strip,
    columns: Strip | None = None,
    *,
    norm_groups: int = 1,
    activation: str = "identity",
    gate: str = "sigmoid",
    has_skip: bool = False,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    r"""Weigh every row and every column of a feature map, by channel.

    .. math::
        a^h = \sigma\big(\phi(\mathrm{GN}(\mathrm{conv}_h(\bar x^{w})))\big), \quad
        a^w = \sigma\big(\phi(\mathrm{GN}(\mathrm{conv}_w(\bar x^{h})))\big), \quad
        o_{chw} = x_{chw}\, a^h_{ch}\, a^w_{cw}

    with the means of x over columns and over rows. Published form: one convolution without bias and
    one group norm for both axes (`columns` left out), no activation phi. timm's form: two depthwise
    convolutions, two norms with one group, SiLU.

    Parameters
    ----------
    x : Tensor, shape (B, C, H, W)
        Feature map.
    rows : Strip
        Convolution and norm along the height.
    columns : Strip, optional
        Along the width; by default those of `rows`.
    norm_groups : int
        Of the group norm; divides C.
    activation : {"identity", "relu", "silu", "gelu"}
        Phi.
    gate : {"sigmoid", "hardsigmoid"}
        Sigma.
    has_skip : bool
        Add x to the output.
    eps : float
        Of the group norm.
    impl : {"auto", "reference", "compiled"}
        "compiled" uses PyTorch's convolution and group norm.

    Returns
    -------
    Tensor, shape (B, C, H, W)

    Raises
    ------
    ShapeError
        For shapes, types or options that do not fit.

    References
    ----------
    Xu and Wan (2024), ELA: efficient local attention for deep convolutional neural networks.
    """
    columns = rows if columns is None else columns
    if x.ndim != 4 or not x.is_floating_point():
        raise ShapeError(
            f"Expected floating-point x (B, C, H, W); got {x.dtype}, {tuple(x.shape)}."
        )
    channels = x.shape[1]
    for name, strip in (("rows", rows), ("columns", columns)):
        _check_strip(name, strip, channels)
    if norm_groups < 1 or channels % norm_groups:
        raise ShapeError(f"norm_groups is {norm_groups}; it must divide the {channels} channels.")
    if activation not in ACTIVATIONS or gate not in GATES:
        raise ShapeError(
            f"activation is {activation!r} and gate {gate!r}; expected one of "
            f"{', '.join(ACTIVATIONS)} and one of {', '.join(GATES)}."
        )
    out: Tensor = OPERATION(
        impl, x, rows, columns, norm_groups=norm_groups, activation=activation, gate=gate,
        has_skip=has_skip, eps=eps,
    )  # fmt: skip
    return out


def _check_strip(name: str, strip: Strip, channels: int) -> None:
    weight = strip.weight
    if weight.ndim != 3 or weight.shape[0] != channels or 0 in weight.shape:
        raise ShapeError(
            f"The weight of {name} must be (C, C / groups, K) with C = {channels}; got "
            f"{tuple(weight.shape)}."
        )
    if weight.shape[2] % 2 == 0 or channels % weight.shape[1]:
        raise ShapeError(
            f"The weight of {name} is {tuple(weight.shape)}; K must be odd and C / groups must "
            f"divide {channels}."
        )
    if (strip.norm_weight is None) != (strip.norm_bias is None):
        raise ShapeError(f"{name}: norm_weight and norm_bias belong together; one is missing.")
    for part in (strip.bias, strip.norm_weight, strip.norm_bias):
        if part is not None and part.shape != (channels,):
            raise ShapeError(
                f"Biases and norm parameters of {name} must be ({channels},); got "
                f"{tuple(part.shape)}."
            )
