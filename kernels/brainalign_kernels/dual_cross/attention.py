"""The public functions: attention rollout, both cross-attentions, and their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.reversed import reversed_attention
from brainalign_kernels.softmax import reference, sdpa

__all__ = [
    "attention_rollout",
    "class_rollout",
    "global_local_cross_attention",
    "pair_wise_cross_attention",
    "select_top",
    "uncertainty_weighted_loss",
]


def attention_rollout(attentions: Tensor | Sequence[Tensor]) -> Tensor:
    r"""Attention rollout: attention of the last layer's tokens to the input tokens.

    .. math:: \hat S = \bar S_L \cdots \bar S_1, \qquad
              \bar S_l = \tfrac12 \mathrm{mean}_h\, S_{lh} + \tfrac12 I

    Parameters
    ----------
    attentions : sequence of Tensor, shape (B, H, N, N)
        Of layers 1 to L, rows sum to one.

    Returns
    -------
    Tensor, shape (B, N, N)
        Rows sum to one.

    Raises
    ------
    ShapeError
        For no layers, or shapes that differ.

    References
    ----------
    Abnar and Zuidema (2020), Quantifying attention flow in transformers.
    Zhu et al. (2022), Dual cross-attention learning for fine-grained visual categorization and
    object re-identification.
    """
    layers = list(attentions)
    if not layers or any(
        s.ndim != 4 or s.shape != layers[0].shape or s.shape[2] != s.shape[3] for s in layers
    ):
        raise ShapeError(
            "Expected attentions (B, H, N, N) of one shape; "
            f"got {[tuple(s.shape) for s in layers]}."
        )
    wide = accumulation_dtype(layers[0].dtype)
    unit = torch.eye(layers[0].shape[-1], dtype=wide, device=layers[0].device)
    total = unit.expand(layers[0].shape[0], -1, -1)
    for s in layers:
        total = 0.5 * (s.to(wide).mean(dim=1) + unit) @ total
    return total


def _dense_rollout(*tokens: Tensor, token: int, scale: float) -> Tensor:
    layers = len(tokens) // 2
    attentions = []
    for q, k in zip(tokens[:layers], tokens[layers:], strict=True):
        wide = accumulation_dtype(q.dtype)
        attentions.append((scale * q.to(wide) @ k.to(wide).transpose(-1, -2)).softmax(dim=-1))
    return attention_rollout(attentions)[:, token]


def _row_rollout(*tokens: Tensor, token: int, scale: float) -> Tensor:
    # A row times each layer's matrix, the last layer first: reversed attention of one channel.
    layers = len(tokens) // 2
    first = tokens[0]
    row = first.new_zeros((first.shape[0], first.shape[2]), dtype=accumulation_dtype(first.dtype))
    row[:, token] = 1.0
    for q, k in reversed(list(zip(tokens[:layers], tokens[layers:], strict=True))):
        sent = row[:, None, :, None].expand(-1, q.shape[1], -1, -1)
        passed = reversed_attention(q.to(row.dtype), k.to(row.dtype), sent, scale=scale)
        row = 0.5 * (row + passed.squeeze(-1).mean(dim=1))
    return row


ROLLOUT = Operation("class_rollout", _dense_rollout, compiled=Path(_row_rollout))


def class_rollout(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    token: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Row of one token in the attention rollout, from the queries and keys of all layers.

    .. math:: r = e^T \bar S_L \cdots \bar S_1

    Parameters
    ----------
    queries, keys : sequence of Tensor, shape (B, H, N, D)
        Of layers 1 to L.
    token : int
        The class token.
    scale : float, optional
        Of the attention; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "reference" forms the (N, N) matrices; "compiled" carries the row alone through the layers.

    Returns
    -------
    Tensor, shape (B, N)

    Raises
    ------
    ShapeError
        For no layers, or shapes that differ.

    References
    ----------
    Abnar and Zuidema (2020), Quantifying attention flow in transformers.
    """
    tensors = [*queries, *keys]
    if not queries or len(queries) != len(keys) or len({x.shape for x in tensors}) > 1:
        raise ShapeError(
            "Expected one q and one k of one shape for each layer; got "
            f"{[tuple(x.shape) for x in queries]} and {[tuple(x.shape) for x in keys]}."
        )
    check_qkv(queries[0], keys[0], keys[0], same_length=True)
    if not -queries[0].shape[2] <= token < queries[0].shape[2]:
        raise ShapeError(f"There is no token {token} among {queries[0].shape[2]}.")
    return ROLLOUT(impl, *tensors, token=token, scale=default_scale(scale, queries[0].shape[-1]))


def select_top(scores: Tensor, ratio: float, *, leading: int = 1) -> Tensor:
    """Return the indices of the leading tokens and of the best of the others.

    Parameters
    ----------
    scores : Tensor, shape (B, N)
        Such as `class_rollout`.
    ratio : float
        Share of the other tokens to take, rounded up; the paper has 0.1 for fine-grained
        recognition and 0.3 for re-identification.
    leading : int
        First tokens, always taken (the class token).

    Returns
    -------
    Tensor of int, shape (B, leading + R)
        The leading tokens, then the R others with the best first.

    Raises
    ------
    ShapeError
        For a ratio outside [0, 1], or fewer tokens than `leading`.
    """
    if scores.ndim != 2 or not 0 <= leading <= scores.shape[1] or not 0 <= ratio <= 1:
        raise ShapeError(
            f"Expected scores (B, N), 0 <= leading <= N and 0 <= ratio <= 1; got "
            f"{tuple(scores.shape)}, {leading} and {ratio}."
        )
    # The margin keeps a product that is a whole number from being rounded up.
    count = math.ceil(ratio * (scores.shape[1] - leading) - 1e-9)
    best = scores[:, leading:].topk(count, dim=1).indices + leading
    first = torch.arange(leading, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([first, best], dim=1)


def _rows(q: Tensor, indices: Tensor) -> Tensor:
    at = indices[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    return q.gather(2, at)


def _all_then_choose(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, scale: float) -> Tensor:
    out = reference.softmax_attention(q, k, v, mask=None, is_causal=False, scale=scale)
    return _rows(out, indices)


def _choose_then_attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, scale: float
) -> Tensor:
    q = _rows(q, indices)
    return sdpa.softmax_attention(q, k, v, mask=None, is_causal=False, scale=scale)


GLOBAL_LOCAL = Operation(
    "global_local_cross_attention", _all_then_choose, compiled=Path(_choose_then_attend)
)


def global_local_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Global-local cross-attention: chosen queries attend to all keys.

    .. math:: o_r = \sum_j \mathrm{softmax}_j(s\, q_{i_r} \cdot k_j)\, v_j

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    indices : Tensor of int, shape (B, R)
        Queries to use, such as from `select_top`.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" is PyTorch's scaled_dot_product_attention on the chosen queries alone.

    Returns
    -------
    Tensor, shape (B, H, R, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning for fine-grained visual categorization and
    object re-identification.
    """
    check_qkv(q, k, v)
    _check_integers("indices", indices, (q.shape[0], None))
    return GLOBAL_LOCAL(impl, q, k, v, indices, scale=default_scale(scale, q.shape[-1]))


def _paired(k: Tensor, v: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([k, k[pairs]], dim=2), torch.cat([v, v[pairs]], dim=2)


def _dense_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, *, scale: float) -> Tensor:
    k, v = _paired(k, v, pairs)
    return reference.softmax_attention(q, k, v, mask=None, is_causal=False, scale=scale)


def _fused_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, *, scale: float) -> Tensor:
    k, v = _paired(k, v, pairs)
    return sdpa.softmax_attention(q, k, v, mask=None, is_causal=False, scale=scale)


PAIR_WISE = Operation("pair_wise_cross_attention", _dense_pairs, compiled=Path(_fused_pairs))


def pair_wise_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Pair-wise cross-attention: keys and values of a second image join in as distractors.

    .. math:: o = \mathrm{softmax}(s\, q_1 [k_1; k_2]^T)\, [v_1; v_2]

    For training only.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    pairs : Tensor of int, shape (B,)
        Number of the second image of each image in the batch.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" is PyTorch's scaled_dot_product_attention.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning for fine-grained visual categorization and
    object re-identification.
    """
    check_qkv(q, k, v)
    _check_integers("pairs", pairs, (q.shape[0],))
    return PAIR_WISE(impl, q, k, v, pairs, scale=default_scale(scale, q.shape[-1]))


def uncertainty_weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    r"""Sum of losses, each with a learned uncertainty.

    .. math:: \tfrac12 \sum_i (e^{-w_i} L_i + w_i)

    Parameters
    ----------
    losses : Tensor, shape (n,)
        The losses L.
    weights : Tensor, shape (n,)
        w, the logarithms of the variances.

    Returns
    -------
    Tensor, scalar

    Raises
    ------
    ShapeError
        If the shapes differ.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning for fine-grained visual categorization and
    object re-identification.
    """
    if losses.ndim != 1 or losses.shape != weights.shape:
        raise ShapeError(
            f"losses and weights must have one shape (n,); got {tuple(losses.shape)} and "
            f"{tuple(weights.shape)}."
        )
    return 0.5 * ((-weights).exp() * losses + weights).sum()


def _check_integers(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = x.ndim == len(shape) and all(m in (None, n) for n, m in zip(x.shape, shape, strict=True))
    if x.dtype != torch.long or not fits:
        raise ShapeError(
            f"{name} must hold int64 numbers, of shape {shape} (None: any); got {x.dtype} of "
            f"shape {tuple(x.shape)}."
        )
