"""Vision-aware head divergence and reinforcement, on outputs of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError

__all__ = ["reinforce_heads", "select_vision_heads", "vision_aware_head_divergence"]


def vision_aware_head_divergence(with_image: Tensor, without_image: Tensor) -> Tensor:
    r"""How much the output of a head changes when the image is taken away.

    .. math:: \mathrm{VHD}_{l,h} = \lVert o_{l,h}(\text{image}, \text{text})
                                   - o_{l,h}(\text{text}) \rVert_2

    Parameters
    ----------
    with_image, without_image : Tensor, shape (..., H, D)
        Outputs of the heads before the output projection, at the first generated token; further
        axes in front, such as layers and samples.

    Returns
    -------
    Tensor, shape (..., H)
        In float32 at least.

    Raises
    ------
    ShapeError
        If the shapes differ or have no axes for heads and channels.

    References
    ----------
    He et al. (2025), Cracking the code of hallucination in LVLMs with vision-aware head
    divergence.
    """
    if with_image.shape != without_image.shape or with_image.ndim < 2:
        raise ShapeError(
            "Head outputs with and without the image must have one shape (..., heads, channels); "
            f"got {tuple(with_image.shape)} and {tuple(without_image.shape)}."
        )
    wide = accumulation_dtype(with_image.dtype)
    return torch.linalg.vector_norm(with_image.to(wide) - without_image.to(wide), dim=-1)


def select_vision_heads(divergence: Tensor, *, last_layers: int | None = None) -> Tensor:
    r"""Heads whose divergence is above the median of their layer.

    .. math:: \mathrm{VHD}_{l,h} > \mathrm{median}_{h'} \mathrm{VHD}_{l,h'}, \quad l > L - n

    Parameters
    ----------
    divergence : Tensor, shape (..., L, H)
        Of all layers.
    last_layers : int, optional
        n: only in the last layers, such as 14 for LLaVA and 18 for InstructBLIP; by default in
        all.

    Returns
    -------
    Tensor of bool, shape (..., L, H)

    Raises
    ------
    ShapeError
        For no axes of layers and heads, or more last layers than there are.

    References
    ----------
    He et al. (2025), Cracking the code of hallucination in LVLMs with vision-aware head
    divergence.
    """
    if divergence.ndim < 2 or divergence.shape[-1] == 0:
        raise ShapeError(
            f"Expected a divergence of shape (..., layers, heads); got {tuple(divergence.shape)}."
        )
    layers = divergence.shape[-2]
    if last_layers is not None and not 0 <= last_layers <= layers:
        raise ShapeError(f"last_layers is {last_layers}; expected 0 to {layers}.")
    wide = divergence.to(accumulation_dtype(divergence.dtype))
    chosen = wide > wide.quantile(0.5, dim=-1, keepdim=True)
    first = 0 if last_layers is None else layers - last_layers
    late = torch.arange(layers, device=divergence.device) >= first
    return chosen & late[:, None]


def reinforce_heads(
    head_outputs: Tensor, heads: Tensor, *, factor: float = 2.0, head_axis: int = 1
) -> Tensor:
    r"""Scale the outputs of chosen heads before the output projection.

    .. math:: o_h \leftarrow \alpha\, o_h \quad (h \text{ chosen})

    Parameters
    ----------
    head_outputs : Tensor, shape (B, H, N, D)
        Heads on `head_axis`.
    heads : Tensor of bool, shape (H,) or (B, H)
        Chosen heads of this layer, fixed at the first generated token; see `select_vision_heads`.
    factor : float
        Alpha.
    head_axis : int
        Axis of the heads; the batch is axis 0.

    Returns
    -------
    Tensor, shape of `head_outputs`

    Raises
    ------
    ShapeError
        If `heads` does not fit.

    References
    ----------
    He et al. (2025), Cracking the code of hallucination in LVLMs with vision-aware head
    divergence.
    """
    ndim = head_outputs.ndim
    axis = head_axis + ndim if head_axis < 0 else head_axis
    if not 0 < axis < ndim:
        raise ShapeError(f"head_axis is {head_axis}; expected 1 to {ndim - 1} or its negative.")
    want = (head_outputs.shape[0], head_outputs.shape[axis])
    if heads.dtype != torch.bool or heads.shape not in (want, want[1:]):
        raise ShapeError(
            f"heads must be bool, shape (H,) or (B, H) = {want}; got {heads.dtype}, "
            f"{tuple(heads.shape)}."
        )
    shape = [1] * ndim
    shape[0], shape[axis] = want
    return torch.where(heads.expand(want).reshape(shape), factor * head_outputs, head_outputs)
