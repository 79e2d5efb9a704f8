"""The public functions: checks, then dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from brainalign_kernels._checks import accumulation_dtype, check_qkv, expand_heads
from brainalign_kernels._dispatch import Operation, Path, triton_missing
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.lightnet import chunked, reference

__all__ = ["State", "lightnet_attention", "lightnet_recurrence", "running_log_sum"]

#: Weighted mean of values (B, G, D, E), and log-sum of k (B, G, D), over the tokens seen.
State = tuple[Tensor, Tensor]


def _kernel(name: str) -> Path:
    """Return a function of `kernel`, which imports Triton, once it is called."""

    def run(*args: Any, **options: Any) -> Any:
        from brainalign_kernels.lightnet import kernel

        return getattr(kernel, name)(*args, **options)

    return Path(run, _kernel_missing)


def _kernel_missing(*tensors: Tensor, **options: Any) -> str:
    if any(t.dtype == torch.float64 for t in tensors):
        return "The kernel computes in float32; the tensors are in float64."
    return triton_missing(*tensors)


CAUSAL = Operation(
    "lightnet_attention",
    reference.lightnet_attention,
    compiled=Path(chunked.lightnet_attention),
    triton=_kernel("lightnet_attention"),
)
BIDIRECTIONAL = Operation("lightnet_attention", reference.bidirectional)
RECURRENCE = Operation(
    "lightnet_recurrence",
    reference.lightnet_recurrence,
    compiled=Path(chunked.lightnet_recurrence),
    triton=_kernel("lightnet_recurrence"),
)
LOG_SUM = Operation(
    "lightnet_log_sum",
    reference.log_sum,
    compiled=Path(chunked.log_sum),
    triton=_kernel("log_sum"),
)


def lightnet_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    modulation: Tensor | None = None,
    mask: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    zero_start: bool = False,
    activation: str = "none",
    scale: float = 1.0,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    r"""LightNet attention: per channel, a softmax of k over time weighs the values.

    .. math:: o_t = s \sum_d \phi(q_{td}) \sum_{j \le t}
                    \frac{\exp(k_{jd})}{\sum_{l \le t} \exp(k_{ld})} m_{jd} v_j

    As a recurrence, with :math:`z_t = \log \sum_{l \le t} \exp k_l`:
    :math:`S_t = \mathrm{diag}(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} m_t \otimes v_t`,
    :math:`o_t = s\, \phi(q_t)^\top S_t`. Time and memory grow linearly with the tokens.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, N, D)
        Logits of the weights, of any size; H is a multiple of G.
    v : Tensor, shape (B, G, N, E)
        Values.
    is_causal : bool
        Otherwise all sums run over the whole sequence, in one pass.
    modulation : Tensor, shape (B, G, N, D), optional
        m: factor of the weights after their normalisation; by default 1.
    mask : Tensor of bool, shape (B, N), optional
        False: the token counts for nothing. Where nothing has been seen, the output is zero.
    state : tuple of Tensor, shapes (B, G, D, E) and (B, G, D), optional
        What an earlier call returned: the sequence goes on from there. Causal only.
    return_state : bool
        Return the state after the last token too.
    zero_start : bool
        The log-sum starts at 0 instead of minus infinity: 1 is added to the denominator.
    activation : {"none", "silu"}
        phi; LightNet's own is SiLU.
    scale : float
        Factor s of the output.
    chunk_size : int
        Tokens that "compiled" handles as one matrix; the kernel always takes 64.
    impl : {"auto", "reference", "compiled", "triton"}
        "compiled" goes chunk by chunk; "triton" too, on a GPU, not in float64.

    Returns
    -------
    out : Tensor, shape (B, H, N, E)
    state : tuple of Tensor
        If `return_state`; at least in float32.

    Raises
    ------
    ShapeError
        For shapes, types or options that do not fit.
    UnsupportedError
        For an implementation that cannot do this.

    References
    ----------
    Qin et al. (2024), You only scan once: efficient multi-dimension sequential modeling with
    LightNet, sec. 3 (additive linear recurrence).
    """
    check_qkv(q, k, v, same_length=True)
    if modulation is not None and (modulation.shape != k.shape or modulation.dtype != k.dtype):
        raise ShapeError(
            f"modulation must be as k, {tuple(k.shape)} {k.dtype}; "
            f"got {tuple(modulation.shape)} {modulation.dtype}."
        )
    if activation not in ("none", "silu"):
        raise ShapeError(f"activation must be 'none' or 'silu'; got {activation!r}.")
    if not is_causal and (state is not None or return_state):
        raise ShapeError("Only causal attention has a state; leave it out or set is_causal=True.")
    q = silu(q) if activation == "silu" else q
    q = q if scale == 1.0 else q * scale
    if mask is not None:
        if mask.shape != (k.shape[0], k.shape[2]) or mask.dtype != torch.bool:
            raise ShapeError(
                f"mask must be bool of shape {(k.shape[0], k.shape[2])}; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        k = k.masked_fill(~mask[:, None, :, None], -torch.inf)
    groups = q.shape[1] // k.shape[1]
    start = _start(k, v, state, 0.0 if zero_start else -torch.inf)
    k, v = expand_heads(q, k, v)
    if groups > 1 and modulation is not None:
        modulation = modulation.repeat_interleave(groups, dim=1)
    if not is_causal:
        out: Tensor = BIDIRECTIONAL(impl, q, k, v, modulation=modulation, zero_start=zero_start)
        return out
    _check_chunk(chunk_size)
    out, memory, total = CAUSAL(
        impl,
        q,
        k,
        v,
        modulation=modulation,
        state=_expand(start, groups),
        chunk_size=chunk_size,
    )
    return (out, (memory[:, ::groups], total[:, ::groups])) if return_state else out


def lightnet_recurrence(
    q: Tensor,
    kappa: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    state: State | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    r"""LightNet's recurrence for weights and log-sums that are given.

    .. math:: S_t = \mathrm{diag}(e^{z_{t-1} - z_t}) S_{t-1} + \kappa_t \otimes v_t, \quad
              o_t = q_t^\top S_t

    `lightnet_attention` is the case :math:`\kappa_t = e^{k_t - z_t}`; here the weights may also
    have been rotated by a position encoding.

    Parameters
    ----------
    q, kappa : Tensor, shape (B, H, N, D)
        Queries and weights; the weights may be in float32 where the queries are in half precision.
    v : Tensor, shape (B, H, N, E)
        Values.
    z : Tensor, shape (B, H, N, D) or (B, H, N, 1)
        Never falls along the tokens; -inf where nothing has been seen (kappa is 0 there).
    state : tuple of Tensor, shapes (B, H, D, E) and (B, H, D), optional
        S and z before the first token.
    return_state, chunk_size, impl
        See `lightnet_attention`.

    Returns
    -------
    out : Tensor, shape (B, H, N, E)
    state : tuple of Tensor
        If `return_state`.

    Raises
    ------
    ShapeError
        For shapes or types that do not fit.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3.
    """
    check_qkv(q, q, v, same_length=True)
    if kappa.dtype not in (q.dtype, accumulation_dtype(q.dtype)):
        raise ShapeError(f"kappa must be {q.dtype} as q or wider; got {kappa.dtype}.")
    if kappa.shape != q.shape or z.shape not in (q.shape, (*q.shape[:3], 1)):
        raise ShapeError(
            f"q and kappa must have one shape, z the same or one channel; got q {tuple(q.shape)}, "
            f"kappa {tuple(kappa.shape)}, z {tuple(z.shape)}."
        )
    _check_chunk(chunk_size)
    start = _start(kappa, v, state, -torch.inf)
    z = z.expand(q.shape)
    out, memory = RECURRENCE(impl, q, kappa, v, z, state=start, chunk_size=chunk_size)
    total = z[:, :, -1] if z.shape[2] else start[1]
    return (out, (memory, total)) if return_state else out


def running_log_sum(
    k: Tensor, start: Tensor | float = -torch.inf, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of k over the tokens seen, and each token's share of it.

    Parameters
    ----------
    k : Tensor, shape (B, H, N, D)
        Logits; -inf counts for nothing.
    start : Tensor, shape (B, H, D), or float
        Log-sum before the first token.
    impl : {"auto", "reference", "compiled", "triton"}
        See `lightnet_attention`.

    Returns
    -------
    z, kappa : Tensor, shape (B, H, N, D)
        At least in float32; where nothing has been seen, z is a very negative number.
    """
    k = k.to(accumulation_dtype(k.dtype))
    if not isinstance(start, Tensor):
        start = k.new_full((*k.shape[:2], k.shape[3]), start)
    z, kappa = LOG_SUM(impl, k, start.to(k.dtype))
    return z, kappa


def _start(k: Tensor, v: Tensor, state: State | None, empty: float) -> State:
    """Check the state, or make the one before any token."""
    batch, heads, _, channels = k.shape
    wide = accumulation_dtype(k.dtype)
    shapes = (batch, heads, channels, v.shape[3]), (batch, heads, channels)
    if state is None:
        return k.new_zeros(shapes[0], dtype=wide), k.new_full(shapes[1], empty, dtype=wide)
    if len(state) != 2 or (tuple(state[0].shape), tuple(state[1].shape)) != shapes:
        raise ShapeError(
            f"state must be two tensors of shapes {shapes[0]} and {shapes[1]}; "
            f"got {[tuple(x.shape) for x in state]}."
        )
    return state[0].to(wide), state[1].to(wide)


def _expand(state: State, groups: int) -> State:
    if groups == 1:
        return state
    return state[0].repeat_interleave(groups, dim=1), state[1].repeat_interleave(groups, dim=1)


def _check_chunk(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ShapeError(f"chunk_size must be at least 1; got {chunk_size}.")
