"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.halo import blocks, reference

__all__ = ["halo_attention"]

OPERATION = Operation(
    "halo_attention", reference.halo_attention, compiled=Path(blocks.halo_attention)
)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, int],
    block_size: int,
    halo_size: int,
    stride: int = 1,
    height_rel: Tensor | None = None,
    width_rel: Tensor | None = None,
    scale: float | None = None,
    scale_pos: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Local attention of a block of queries over the keys of the block and a halo around it.

    .. math:: l_{ij} = s\, q_i \cdot k_j + q_i \cdot R^h_{j_y - i_y + w - 1}
                     + q_i \cdot R^w_{j_x - i_x + w - 1}, \qquad
              o_i = \sum_{j \in \mathrm{window}} \mathrm{softmax}_j(l_i) v_j

    i counts inside the block, j inside the window of w = block_size + 2 halo_size keys a side.
    Outside the map, keys and values are zero and take part in the softmax.

    Parameters
    ----------
    q : Tensor, shape (B, H, (h / stride) (w / stride), D)
        Queries, row by row.
    k : Tensor, shape (B, G, h w, D)
        Keys, row by row; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, h w, E)
        Values.
    shape : (int, int)
        Rows h and columns w of the keys' map, multiples of `block_size`.
    block_size : int
        Keys a side of a block.
    halo_size : int
        Keys around it.
    stride : int
        The queries' map is this much smaller; it divides `block_size`, and a block has
        block_size / stride queries a side.
    height_rel, width_rel : Tensor, shape (2 w - 1, D), optional
        Relative positions R^h and R^w.
    scale : float, optional
        s; by default D^-1/2.
    scale_pos : bool
        Multiply the relative terms by s too.
    impl : {"auto", "reference", "compiled"}
        "compiled" is a batch of blocks in PyTorch's scaled_dot_product_attention.

    Returns
    -------
    Tensor, shape (B, H, (h / stride) (w / stride), E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Vaswani et al. (2021), Scaling local self-attention for parameter efficient visual backbones;
    the relative terms: Ramachandran et al. (2019), Stand-alone self-attention in vision models,
    eq. 3.
    """
    check_qkv(q, k, v)
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise ShapeError(
            f"Expected block_size >= 1, halo_size >= 0 and a stride that divides block_size; "
            f"got {block_size}, {halo_size}, {stride}."
        )
    h, w = shape
    if h < 0 or w < 0 or h % block_size or w % block_size:
        raise ShapeError(f"shape must be multiples of block_size {block_size}; got {h} x {w}.")
    queries = (h // stride) * (w // stride)
    if k.shape[2] != h * w or q.shape[2] != queries:
        raise ShapeError(
            f"A map of {h} x {w} with stride {stride} has {h * w} keys and {queries} queries; "
            f"got {k.shape[2]} and {q.shape[2]}."
        )
    size = (2 * (block_size + 2 * halo_size) - 1, q.shape[3])
    for name, table in (("height_rel", height_rel), ("width_rel", width_rel)):
        if table is not None and (tuple(table.shape) != size or table.device != q.device):
            raise ShapeError(
                f"{name} must be {size} on {q.device}; got {tuple(table.shape)} on {table.device}."
            )
    return OPERATION(
        impl, q, k, v, shape=(h, w), block_size=block_size, halo_size=halo_size, stride=stride,
        height_rel=height_rel, width_rel=width_rel,
        scale=default_scale(scale, q.shape[-1]), scale_pos=scale_pos,
    )  # fmt: skip
