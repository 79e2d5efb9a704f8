"""The public functions: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_qkv, expand_heads
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.dynamics import reference
from brainalign_kernels.dynamics.system import run_system
from brainalign_kernels.dynamics.views import qlstm_system, s6_system
from brainalign_kernels.errors import ShapeError

__all__ = ["dsf_attention", "qlstm", "s6_layer"]


def _scanned_qlstm(
    x: Tensor, forget: Tensor, take: Tensor, give: Tensor, *, exponent: Tensor | None
) -> Tensor:
    system = qlstm_system(forget, take, give, exponent=exponent)
    return run_system(system, x, impl="compiled")[0]


def _scanned_s6(
    x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None
) -> Tensor:
    return run_system(s6_system(step, decay, b, c, d), x, impl="compiled")[0]


ATTENTION = Operation("dsf_attention", reference.dsf_attention, compiled=Path(reference.chunked))
QLSTM = Operation("qlstm", reference.qlstm, compiled=Path(_scanned_qlstm))
S6 = Operation("s6_layer", reference.s6_layer, compiled=Path(_scanned_s6))


def dsf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    log_normaliser: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor:
    r"""Causal attention of the dynamical systems framework, in its direct form.

    .. math:: o_t = \sum_{j \le t} \frac{\phi(q_t) \cdot \phi(k_j)}{\eta_t} v_j

    softmax: :math:`\phi(q) \cdot \phi(k) = e^{s q \cdot k}`, :math:`\eta_t` the sum of the scores;
    linear: :math:`\phi = \mathrm{elu} + 1`, :math:`\eta_t` the sum of the scores;
    norm: :math:`\phi(x) = x`, :math:`\eta_t = e^{n_t}`.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, N, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, N, E)
        Values.
    kind : {"softmax", "linear", "norm"}
    log_normaliser : Tensor, shape (B, H, N), optional
        n, for "norm" only.
    scale : float, optional
        s, for "softmax" only; by default D^-1/2.
    chunk_size : int
        Tokens of a chunk in the "compiled" path; changes time and memory, not the result.
    impl : {"auto", "reference", "compiled"}
        "reference" forms (N, N) scores; "compiled" is PyTorch's fused attention (softmax) or
        linear in the number of tokens.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types, devices or options that do not fit.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models: attention, state
    space models, and recurrent neural networks.
    """
    check_qkv(q, k, v, same_length=True)
    if kind not in ("softmax", "linear", "norm"):
        raise ShapeError(f"kind is {kind!r}; expected 'softmax', 'linear' or 'norm'.")
    if (kind == "norm") != (log_normaliser is not None):
        raise ShapeError(f"kind 'norm', and no other, needs log_normaliser; kind is {kind!r}.")
    if log_normaliser is not None and log_normaliser.shape != q.shape[:3]:
        raise ShapeError(
            f"log_normaliser must have shape {tuple(q.shape[:3])}; "
            f"got {tuple(log_normaliser.shape)}."
        )
    if scale is not None and kind != "softmax":
        raise ShapeError(f"Only kind 'softmax' has a scale; kind is {kind!r}.")
    if chunk_size < 1:
        raise ShapeError(f"chunk_size must be at least 1; got {chunk_size}.")
    k, v = expand_heads(q, k, v)
    return ATTENTION(
        impl,
        q,
        k,
        v,
        kind=kind,
        log_normaliser=log_normaliser,
        scale=scale,
        chunk_size=chunk_size,
    )


def qlstm(
    x: Tensor,
    forget: Tensor,
    take: Tensor,
    give: Tensor,
    *,
    exponent: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""qLSTM: an LSTM whose gates do not depend on its state.

    .. math:: h_t = f_t h_{t-1} + \sigma(i_t) x_t, \qquad y_t = \sigma(o_t) h_t

    with :math:`f_t = \sigma(\hat f_t)`, or with an exponent the reversed sigmoid
    :math:`f_t = \sigma(-\hat f_t)^{\mathrm{relu}(\alpha)}`.

    Parameters
    ----------
    x : Tensor, shape (B, H, N, E)
        Input.
    forget, take, give : Tensor, shape (B, H, N, E)
        Gates f, i and o before their sigmoid.
    exponent : Tensor, broadcastable to (B, H, N, E), optional
        alpha.
    impl : {"auto", "reference", "compiled"}
        "reference" forms (N, N, E) weights; "compiled" scans.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes that do not fit.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    shapes = [tuple(y.shape) for y in (x, forget, take, give)]
    if x.ndim != 4 or len(set(shapes)) > 1:
        raise ShapeError(f"x and its three gates must have one shape (B, H, N, E); got {shapes}.")
    return QLSTM(impl, x, forget, take, give, exponent=exponent)


def s6_layer(
    x: Tensor,
    step: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    r"""S6-like selective state space layer.

    .. math:: h_t = \sigma(-\hat f_t)^{\mathrm{relu}(\alpha)} h_{t-1}
                    + \mathrm{softplus}(\hat f_t)\, b_t x_t, \qquad y_t = c_t \cdot h_t + d\, x_t

    As :math:`\sigma(-\hat f) = e^{-\mathrm{softplus}(\hat f)}`, this is S6 with step size
    softplus(f) and continuous-time decay relu(alpha).

    Parameters
    ----------
    x : Tensor, shape (B, H, N, E)
        Input.
    step : Tensor, shape (B, H, N, E)
        f, the step size before its softplus.
    decay : Tensor, broadcastable to (B, H, N, n, E)
        alpha, of each of the n rows of the state.
    b, c : Tensor, shape (B, H, N, n)
        Input and output vectors.
    d : Tensor, broadcastable to (B, H, N, E), optional
        Feedthrough.
    impl : {"auto", "reference", "compiled"}
        "reference" forms (N, N, n, E) weights; "compiled" scans.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes that do not fit.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    Gu and Dao (2023), Mamba.
    """
    if x.ndim != 4 or x.shape != step.shape:
        raise ShapeError(
            f"x and step must have one shape (B, H, N, E); got {tuple(x.shape)} "
            f"and {tuple(step.shape)}."
        )
    if b.ndim != 4 or b.shape != c.shape or b.shape[:3] != x.shape[:3] or decay.ndim != 5:
        raise ShapeError(
            f"b and c must have one shape (B, H, N, n) and decay 5 axes; got {tuple(b.shape)}, "
            f"{tuple(c.shape)} and {tuple(decay.shape)}, with x {tuple(x.shape)}."
        )
    return S6(impl, x, step, decay, b, c, d)
