"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_qkv
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.flow import chunked, reference

__all__ = ["flow_attention"]

OPERATION = Operation(
    "flow_attention", reference.flow_attention, compiled=Path(chunked.flow_attention)
)


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor:
    r"""Flow-Attention.

    .. math:: o_i = \sigma(\hat I_i N / S)\, \frac{\sigma(q_i)}{I_i} \cdot
              \sum_j \sigma(k_j) \otimes S\, \mathrm{softmax}_j(\hat O)_j\, v_j

    with the incoming flow of a sink :math:`I_i = \sigma(q_i) \cdot \sum_j \sigma(k_j)`, the
    outgoing flow of a source :math:`O_j = \sigma(k_j) \cdot \sum_i \sigma(q_i)`, and the conserved
    flows :math:`\hat I_i = \sigma(q_i) \cdot \sum_j \sigma(k_j) / O_j` and
    :math:`\hat O_j = \mathrm{clip}(\sigma(k_j) \cdot \sum_i \sigma(q_i) / I_i, -1, 1)`; `eps` is
    added to both factors of every product. If causal, all sums run over the tokens so far and
    are divided by their number.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries (sinks), before the sigmoid.
    k : Tensor, shape (B, G, S, D)
        Keys (sources), before the sigmoid; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    is_causal : bool
        Token i sees the tokens 0 to i; N = S.
    eps : float
        Added elementwise.
    chunk_size : int
        Tokens of a chunk in the causal "compiled" path; changes time and memory, not the result.
    impl : {"auto", "reference", "compiled"}
        "reference" forms (N, S) scores; "compiled" is linear in the number of tokens.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit, and for a chunk size below 1.

    References
    ----------
    Wu et al. (2022), Flowformer: linearizing transformers with conservation flows.
    """
    check_qkv(q, k, v, same_length=is_causal)
    if chunk_size < 1:
        raise ShapeError(f"chunk_size must be at least 1; got {chunk_size}.")
    return OPERATION(impl, q, k, v, is_causal=is_causal, eps=eps, chunk_size=chunk_size)
