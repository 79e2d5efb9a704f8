"""The public functions: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.hip import gathered, reference
from brainalign_kernels.hip.plan import Plan

__all__ = ["hip_attention", "hip_blocks"]

OPERATION = Operation(
    "hip_attention",
    reference.hip_attention,
    compiled=Path(gathered.hip_attention, gathered.missing),
)
BLOCKS = Operation(
    "hip_blocks", reference.hip_blocks, compiled=Path(gathered.hip_blocks, gathered.missing_blocks)
)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int,
    block_size_q: int = 32,
    block_size_k: int = 2,
    group_k: int = 1,
    window: int = 0,
    unsearched: int | None = None,
    sinks: int = 0,
    head_group: int = 1,
    published_slots: bool = False,
    all_blocks: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Causal softmax attention over the keys that a hierarchical search keeps.

    .. math:: o_i = \sum_{j \in S(i)} \mathrm{softmax}_{j \in S(i)}(s\, q_i \cdot k_j)\, v_j, \qquad
              S(i) = \{j \le i : j \in \text{kept blocks} \cup \text{window} \cup \text{sinks}\}

    No training. Gradients go through the softmax, not through the choice. With `top_k` of at least
    S it is causal softmax attention.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries: the last N of the S tokens.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    top_k, block_size_q, block_size_k, group_k, window
        Of the search: see `hip_blocks`. A softmax also has the last `window` keys of its query
        block.
    unsearched, head_group, published_slots, all_blocks
        See `hip_blocks`.
    sinks : int
        First keys, which every softmax has.
    scale : float, optional
        s, positive; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" searches for all query blocks at once and gathers the kept keys.

    Returns
    -------
    Tensor, shape (B, H, N, E)
        A query that sees nothing gives zeros.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Lee et al. (2024), A training-free sub-quadratic cost transformer model serving framework with
    hierarchically pruned attention.
    """
    check_qkv(q, k, v)
    plan = _plan(
        q, k, top_k, block_size_q, block_size_k, group_k, window, unsearched, sinks, head_group,
        published_slots, all_blocks,
    )  # fmt: skip
    scale = default_scale(scale, q.shape[-1])
    if not scale > 0:
        raise ShapeError(f"The search ranks products and needs a positive scale; got {scale}.")
    return OPERATION(impl, q, k, v, plan=plan, scale=scale)


def hip_blocks(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int,
    block_size_q: int = 32,
    block_size_k: int = 2,
    group_k: int = 1,
    window: int = 0,
    unsearched: int | None = None,
    head_group: int = 1,
    published_slots: bool = False,
    all_blocks: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Blocks of keys that matter to a block of queries, by a tree search.

    .. math:: \mathrm{score}(\text{half}) = \max_{i \in \text{voters}}\;
              \max_{j \in \text{first block of the half}} q_i \cdot k_j

    The key blocks that a query block may see are divided into M = top_k / block_size_k slots.
    Then, until a slot is one block: split all slots, keep the M halves of the best score. Voters
    are the 2nd, 4th, ... query of the block (the only one of a block of one).

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries: the last N of the S tokens.
    k : Tensor, shape (B, G, S, D)
        Keys.
    top_k : int
        Keys to keep, per head and query block.
    block_size_q, block_size_k : int
        Queries and keys of a block; keys are counted in groups.
    group_k : int
        The search sees this many keys as their minimum and maximum; the better one counts.
    window : int
        Last keys of a query block, which are kept anyhow and not searched.
    unsearched : int, optional
        Last groups of keys that the search leaves out; by default ``window // group_k``. The
        original leaves out `window` groups.
    head_group : int
        Heads in a row that share their top_k keys.
    published_slots : bool
        All slots of head i of a group start with the size of the i-th, as in the original for
        groups of heads. Slots may then overlap, and a block found twice counts twice.
    all_blocks : bool
        Score a half by all its blocks, and not below 0: as good as the search can be, at the cost
        of full attention. Only in the reference.
    impl : {"auto", "reference", "compiled"}
        See `hip_attention`.

    Returns
    -------
    indices : Tensor of int64, shape (B, H / head_group, query blocks, head_group M)
        First token of every kept block, ascending; in a group, S is added per head.
    counts : Tensor of int64, shape (B, H / head_group, query blocks)
        How many of them are meant; what follows says nothing.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Lee et al. (2024), A training-free sub-quadratic cost transformer model serving framework with
    hierarchically pruned attention, algorithm 1.
    """
    check_qkv(q, k, k)
    plan = _plan(
        q, k, top_k, block_size_q, block_size_k, group_k, window, unsearched, 0, head_group,
        published_slots, all_blocks,
    )  # fmt: skip
    return BLOCKS(impl, q, k, plan=plan)


def _plan(
    q: Tensor,
    k: Tensor,
    top_k: int,
    block_size_q: int,
    block_size_k: int,
    group_k: int,
    window: int,
    unsearched: int | None,
    sinks: int,
    head_group: int,
    published_slots: bool,
    all_blocks: bool,
) -> Plan:
    if min(block_size_q, block_size_k, group_k) < 1 or top_k < group_k:
        raise ShapeError(
            "Expected block_size_q, block_size_k, group_k >= 1 and top_k >= group_k; "
            f"got {block_size_q}, {block_size_k}, {group_k} and {top_k}."
        )
    unsearched = window // group_k if unsearched is None else unsearched
    if min(window, unsearched, sinks) < 0:
        raise ShapeError(
            f"window, unsearched and sinks cannot be negative; got {window}, {unsearched}, {sinks}."
        )
    if head_group < 1 or q.shape[1] % head_group:
        raise ShapeError(f"{q.shape[1]} heads must be a multiple of head_group; got {head_group}.")
    if q.shape[2] > k.shape[2]:
        raise ShapeError(
            f"Queries are the last of the keys' tokens; got {q.shape[2]} queries and "
            f"{k.shape[2]} keys."
        )
    return Plan(
        queries=q.shape[2], keys=k.shape[2], top_k=top_k, block_size_q=block_size_q,
        block_size_k=block_size_k, group_k=group_k, window=window, unsearched=unsearched,
        sinks=sinks, head_group=head_group, published_slots=published_slots,
        all_blocks=all_blocks,
    )  # fmt: skip
