"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.ulsam import batched, reference
from brainalign_kernels.ulsam.reference import BatchNorm

__all__ = ["BatchNorm", "subspace_attention", "subspace_weights"]


OPERATION = Operation(
    "subspace_attention",
    reference.subspace_attention,
    compiled=Path(batched.subspace_attention),
)


def subspace_attention(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor],
    depthwise_norm: BatchNorm,
    pointwise: tuple[Tensor, Tensor],
    pointwise_norm: BatchNorm,
    *,
    training: bool = False,
    momentum: float = 0.9,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    r"""Weigh the positions of a feature map, with one attention map per group of channels.

    .. math::
        A_g = \mathrm{softmax}_{hw}\big(\phi(\mathrm{PW}(\mathrm{maxpool}_{3 \times 3}(
              \phi(\mathrm{DW}(x_g)))))\big), \quad o_g = A_g x_g + x_g

    DW is a depthwise and PW a pointwise 1 x 1 convolution to one channel; phi is batch norm, then
    ReLU. The G groups are contiguous.

    Parameters
    ----------
    x : Tensor, shape (B, C, H, W)
        Feature map.
    depthwise : (Tensor, Tensor), shapes (C,) and (C,)
        Weights and biases of the depthwise convolutions.
    depthwise_norm : BatchNorm of (C,)
        After them.
    pointwise : (Tensor, Tensor), shapes (C,) and (G,)
        Weights and biases of the pointwise convolutions; G divides C.
    pointwise_norm : BatchNorm of (G,)
        After them.
    training : bool
        Use the statistics of the batch, and update the running ones in place.
    momentum : float
        Weight of the new statistics.
    eps : float
        Of the batch norms.
    impl : {"auto", "reference", "compiled"}
        "compiled" does all groups at once.

    Returns
    -------
    Tensor, shape (B, C, H, W)

    Raises
    ------
    ShapeError
        For shapes and types that do not fit, or a batch of one value in training.

    References
    ----------
    Saini et al. (2020), ULSAM: ultra-lightweight subspace attention module for compact
    convolutional neural networks.
    """
    return subspace_weights(
        x, depthwise, depthwise_norm, pointwise, pointwise_norm,
        training=training, momentum=momentum, eps=eps, impl=impl,
    )[0]  # fmt: skip


def subspace_weights(
    x: Tensor,
    depthwise: tuple[Tensor, Tensor],
    depthwise_norm: BatchNorm,
    pointwise: tuple[Tensor, Tensor],
    pointwise_norm: BatchNorm,
    *,
    training: bool = False,
    momentum: float = 0.9,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Give the output of `subspace_attention`, and the attention (B, G, H, W)."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ShapeError(
            f"Expected floating-point x (B, C, H, W); got {x.dtype}, {tuple(x.shape)}."
        )
    channels = x.shape[1]
    splits = pointwise[1].shape[0] if pointwise[1].ndim == 1 else 0
    if splits == 0 or channels % splits:
        raise ShapeError(
            f"The pointwise biases must be (G,), G a divisor of the {channels} channels; got "
            f"{tuple(pointwise[1].shape)}."
        )
    for name, parts, size in (
        ("depthwise", depthwise, channels),
        ("depthwise_norm", depthwise_norm, channels),
        ("pointwise weights", pointwise[:1], channels),
        ("pointwise_norm", pointwise_norm, splits),
    ):
        if any(part.shape != (size,) for part in parts):
            raise ShapeError(
                f"{name} must have shape ({size},); got {[tuple(p.shape) for p in parts]}."
            )
    if training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ShapeError(f"Batch statistics need more than one value; got x {tuple(x.shape)}.")
    options = {"training": training, "momentum": momentum, "eps": eps}
    out, attention = OPERATION(
        impl, x, depthwise, depthwise_norm, pointwise, pointwise_norm, **options
    )
    return out, attention
