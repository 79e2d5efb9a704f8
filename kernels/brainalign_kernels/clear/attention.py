"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.clear import flex, reference
from brainalign_kernels.clear.mask import check_sizes
from brainalign_kernels.errors import ShapeError

__all__ = ["clear_attention"]

OPERATION = Operation(
    "clear_attention", reference.clear_attention, compiled=Path(flex.clear_attention)
)


def clear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    n_text: int = 0,
    radius: float,
    pooled: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Softmax attention of image tokens to a disc around them and to the text.

    .. math:: o_i = \sum_{j \in V(i)} \mathrm{softmax}_{j \in V(i)}(s\, q_i \cdot k_j)\, v_j, \qquad
              V(y, x) = \{(y', x') : (y - y')^2 + (x - x')^2 < r^2\} \cup \text{text}
                        \cup \text{pooled}

    Text tokens see text and image. See `clear_mask`.

    Parameters
    ----------
    q : Tensor, shape (B, H, n_text + h w, D)
        Queries: text first, then the image, row by row.
    k : Tensor, shape (B, G, n_text + h w, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, n_text + h w, E)
        Values.
    shape : (int, int)
        Rows h and columns w of the image.
    n_text : int
        Text tokens.
    radius : float
        r, in tokens; the published models have 8, 16 and 32.
    pooled : (Tensor, Tensor), shapes (B, G, P, D) and (B, G, P, E), optional
        Keys and values of a smaller image, which all of the image sees.
    scale : float, optional
        s; by default D^-1/2. `clear_scale` is the published rule for large images.
    impl : {"auto", "reference", "compiled"}
        "compiled" is FlexAttention on CUDA where it takes the tensors, otherwise tiles of the
        image with their windows.

    Returns
    -------
    Tensor, shape (B, H, n_text + h w, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Liu et al. (2024), CLEAR: conv-like linearization revs pre-trained diffusion transformers up.
    """
    check_qkv(q, k, v, same_length=True)
    check_sizes(shape, n_text, radius)
    h, w = shape
    if q.shape[2] != n_text + h * w:
        raise ShapeError(
            f"{n_text} text tokens and an image of {h} x {w} are {n_text + h * w} tokens; "
            f"got {q.shape[2]}."
        )
    pooled_k, pooled_v = pooled if pooled is not None else (None, None)
    if pooled_k is not None and pooled_v is not None:
        check_qkv(q, pooled_k, pooled_v)
        if pooled_k.shape[1] != k.shape[1] or pooled_v.shape[3] != v.shape[3]:
            raise ShapeError(
                f"Pooled keys and values must have the heads and channels of k {tuple(k.shape)} "
                f"and v {tuple(v.shape)}; got {tuple(pooled_k.shape)}, {tuple(pooled_v.shape)}."
            )
    return OPERATION(
        impl, q, k, v, shape=(h, w), n_text=n_text, radius=radius, pooled_k=pooled_k,
        pooled_v=pooled_v, scale=default_scale(scale, q.shape[-1]),
    )  # fmt: skip
