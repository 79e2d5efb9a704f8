"""The public function: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, check_qkv, expand_heads
from brainalign_kernels._dispatch import Operation, Path, triton_missing
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.lightning import chunked, reference

__all__ = ["check_recurrent", "kernel_type_missing", "lightning_attention", "per_sequence"]


def _in_triton(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from brainalign_kernels.lightning.kernel import attend

    return attend(*args, **options)


def _triton_missing(q: Tensor, *args: Tensor | None, scale: float, chunk_size: int) -> str:
    return kernel_type_missing(q) or triton_missing(q, *args)


def kernel_type_missing(q: Tensor) -> str:
    """Why the kernel cannot take tensors like q, or an empty string."""
    if q.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return ""
    return f"the kernel takes float32, float16 and bfloat16, not {q.dtype}."


OPERATION = Operation(
    "lightning_attention",
    reference.lightning_attention,
    compiled=Path(chunked.lightning_attention),
    triton=Path(_in_triton, _triton_missing),
)


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    scale: float = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor | None = ...,
    return_state: Literal[True],
    scale: float = ...,
    chunk_size: int = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    scale: float = 1.0,
    chunk_size: int = 64,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal linear attention with a constant decay per head, in linear time and memory.

    .. math:: S_t = e^{g_h} S_{t-1} + k_t v_t^\top, \qquad o_t = s\, q_t^\top S_t
                 = s \sum_{j \le t} e^{g_h (t - j)} (q_t \cdot k_j)\, v_j
                   + s\, e^{g_h (t + 1)} q_t^\top S_{-1}

    There is no softmax and no normaliser. A sequence may come in pieces of any length, down to one
    token: give each piece the state that the one before returned.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, N, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, N, E)
        Values.
    log_decay : Tensor, shape (H,), or None
        g, finite and not above 0 for a decay; ``-lightning_slopes(H, layer, layers)`` as published.
        None: plain causal linear attention, g = 0.
    state : Tensor, shape (B, H, D, E), optional
        :math:`S_{-1}`; zeros by default.
    return_state : bool
        Return the state after the last token too.
    scale : float
        Factor s of the output.
    chunk_size : int
        Tokens that are handled by one dense product; it does not change the result. The kernel
        takes 16, or 64 for anything above.
    cu_seqlens : sequence of int, length M + 1, optional
        Boundaries, from 0 to N, of M sequences that lie one after the other in a batch of 1. The
        state restarts at each, and states have the shape (M, H, D, E).
    impl : {"auto", "reference", "compiled", "triton"}
        "compiled" works chunk by chunk in PyTorch operations, "triton" in a kernel.

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
    Qin et al. (2024), Lightning attention-2: a free lunch for handling unlimited sequence lengths
    in large language models, eqs. 4 to 12 and algorithms 1 and 2.
    """
    check_qkv(q, k, v, same_length=True)
    k, v = expand_heads(q, k, v)
    if log_decay is None:
        log_decay = torch.zeros(q.shape[1], dtype=accumulation_dtype(q.dtype), device=q.device)
    if log_decay.shape != q.shape[1:2]:
        raise ShapeError(
            f"log_decay must have the shape (heads,) = {tuple(q.shape[1:2])}; got "
            f"{tuple(log_decay.shape)}. For a decay by step use gated_linear_attention."
        )
    rates = log_decay

    def run(
        q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor | None, ...], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = OPERATION(
            impl, q, k, v, rates, state, scale=float(scale), chunk_size=chunk_size
        )
        return out

    check_recurrent(q, v, (log_decay,), state, chunk_size, cu_seqlens)
    out, final = per_sequence(run, q, k, v, (), state, cu_seqlens)
    return (out, final) if return_state else out


def check_recurrent(
    q: Tensor,
    v: Tensor,
    gates: tuple[Tensor | None, ...],
    state: Tensor | None,
    chunk_size: int,
    cu_seqlens: Tensor | Sequence[int] | None,
) -> None:
    """Refuse gates, a state, a chunk size or boundaries that do not fit q and v."""
    for x in (*gates, state):
        if x is not None and (x.device != q.device or not x.is_floating_point()):
            raise ShapeError(
                f"Decays and state must be floating-point tensors on {q.device}, as q is; got "
                f"{x.dtype} on {x.device}."
            )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ShapeError(f"chunk_size must be a positive integer; got {chunk_size!r}.")
    sequences = q.shape[0]
    if cu_seqlens is not None:
        bounds = [int(x) for x in cu_seqlens]
        rising = all(a <= b for a, b in pairwise(bounds))
        if q.shape[0] != 1 or len(bounds) < 2 or not rising:
            raise ShapeError(
                "cu_seqlens are non-decreasing boundaries within a batch of 1; got "
                f"{bounds} and a batch of {q.shape[0]}."
            )
        if bounds[0] != 0 or bounds[-1] != q.shape[2]:
            raise ShapeError(f"cu_seqlens must run from 0 to {q.shape[2]} tokens; got {bounds}.")
        sequences = len(bounds) - 1
    expected = (sequences, q.shape[1], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ShapeError(
            f"state must have the shape (batch or sequences, heads, D, E) = {expected}; got "
            f"{tuple(state.shape)}."
        )


def per_sequence(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor | None, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Call ``run(q, k, v, gates, state)`` once, or once for each of the sequences in the row."""
    if cu_seqlens is None:
        return run(q, k, v, gates, state)
    bounds = [int(x) for x in cu_seqlens]
    outs, states = [], []
    for i, (a, b) in enumerate(pairwise(bounds)):
        parts = [x[:, :, a:b] for x in (q, k, v)]
        cut = tuple(None if g is None else g[:, :, a:b] for g in gates)
        out, final = run(*parts, cut, None if state is None else state[i : i + 1])
        outs.append(out)
        states.append(final)
    return torch.cat(outs, dim=2), torch.cat(states)
