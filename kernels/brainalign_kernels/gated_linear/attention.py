"""The public function: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from brainalign_kernels._checks import check_qkv, expand_heads
from brainalign_kernels._dispatch import Operation, Path, triton_missing
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.gated_linear import chunked, reference
from brainalign_kernels.lightning.attention import (
    check_recurrent,
    kernel_type_missing,
    per_sequence,
)

__all__ = ["gated_linear_attention"]


def _in_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_decay_value: Tensor | None,
    state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    from brainalign_kernels.lightning.kernel import attend

    return attend(q, k, v, log_decay, state, **options)


def _triton_missing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_decay_value: Tensor | None,
    state: Tensor | None,
    **options: Any,
) -> str:
    if log_decay.ndim == 4 or log_decay_value is not None:
        return "the kernel has one decay per head and token, not one per channel."
    return kernel_type_missing(q) or triton_missing(q, k, v, log_decay, state)


OPERATION = Operation(
    "gated_linear_attention",
    reference.gated_linear_attention,
    compiled=Path(chunked.gated_linear_attention),
    triton=Path(_in_triton, _triton_missing),
)


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    log_decay_value: Tensor | None = ...,
    state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    scale: float = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    log_decay_value: Tensor | None = ...,
    state: Tensor | None = ...,
    return_state: Literal[True],
    scale: float = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    log_decay_value: Tensor | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    scale: float = 1.0,
    chunk_size: int = 64,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention with a decay by token, per head or per channel.

    .. math:: S_t = \mathrm{diag}(e^{g_t})\, S_{t-1}\, \mathrm{diag}(e^{w_t}) + k_t v_t^\top,
              \qquad o_t = s\, q_t^\top S_t

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, N, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, N, E)
        Values.
    log_decay : Tensor, shape (B, H, N) or (B, H, N, D)
        g, not above 0 for a decay: one per head, or one per key channel. -inf resets.
    log_decay_value : Tensor, shape (B, H, N, E), optional
        w, a decay per value channel; none by default.
    state : Tensor, shape (B, H, D, E), optional
        :math:`S_{-1}`; zeros by default.
    return_state : bool
        Return the state after the last token too.
    scale : float
        Factor s of the output.
    chunk_size : int
        Tokens that are handled together; it does not change the result.
    cu_seqlens : sequence of int, length M + 1, optional
        Boundaries, from 0 to N, of M sequences that lie one after the other in a batch of 1. The
        state restarts at each, and states have the shape (M, H, D, E).
    impl : {"auto", "reference", "compiled", "triton"}
        "compiled" works chunk by chunk in PyTorch operations; "triton" in a kernel, for a decay per
        head.

    Returns
    -------
    out : Tensor, shape (B, H, N, E)
    state : Tensor, shape (B, H, D, E)
        With `return_state`: float32 for half precision, otherwise of the type of q.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.
    UnsupportedError
        For an implementation that cannot do this.

    References
    ----------
    Yang et al. (2024), Gated linear attention transformers with hardware-efficient training, eqs. 3
    to 5; Qin et al. (2024), HGRN2: gated linear RNNs with state expansion, eq. 6.
    """
    check_qkv(q, k, v, same_length=True)
    k, v = expand_heads(q, k, v)
    if log_decay.shape not in (q.shape[:3], q.shape):
        raise ShapeError(
            f"log_decay must have the shape (B, H, N) = {tuple(q.shape[:3])} or (B, H, N, D) = "
            f"{tuple(q.shape)}; got {tuple(log_decay.shape)}."
        )
    if log_decay_value is not None and log_decay_value.shape != v.shape:
        raise ShapeError(
            f"log_decay_value must have the shape (B, H, N, E) = {tuple(v.shape)}; got "
            f"{tuple(log_decay_value.shape)}."
        )

    def run(
        q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor | None, ...], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = OPERATION(
            impl, q, k, v, *gates, state, scale=float(scale), chunk_size=chunk_size
        )
        return out

    gates = (log_decay, log_decay_value)
    check_recurrent(q, v, gates, state, chunk_size, cu_seqlens)
    out, final = per_sequence(run, q, k, v, gates, state, cu_seqlens)
    return (out, final) if return_state else out
