"""Tokens that attract the attention of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brainalign_kernels.adapters import Attend
from brainalign_kernels.errors import UnsupportedError
from brainalign_kernels.probes.capture import Captured, observe

__all__ = ["SinkProfile", "attention_sinks"]


@dataclass(frozen=True)
class SinkProfile:
    """Attention that tokens get from the others.

    Parameters
    ----------
    received : dict of str to Tensor, shape (H, S)
        By layer, mean over samples of the attention that key k gets from a query that can see it.
    share : Tensor, shape (S,)
        Share of heads, over layers and samples, in which the token is a sink.
    threshold : float
        Above which a token counts as one.
    """

    received: dict[str, Tensor]
    share: Tensor
    threshold: float


def attention_sinks(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
    threshold: float = 0.3,
) -> SinkProfile:
    r"""Which tokens are attention sinks, and in how many heads.

    .. math:: a_k = \frac{1}{|Q_k|} \sum_{i \in Q_k} A_{ik}, \qquad
              \mathrm{sink}_k = \frac{1}{LH} \sum_{l,h} 1[a^{l,h}_k > \epsilon]

    :math:`Q_k` are the queries that may see key k: those from k on in a causal layer, all in
    others. Layers that are causal by a mask which also hides padding are refused.

    Parameters
    ----------
    model, run, layers, attention
        See `observe`; all layers must have the same number of tokens.
    threshold : float
        Epsilon.

    Returns
    -------
    SinkProfile

    Raises
    ------
    UnsupportedError
        If layers differ in their tokens, or have a mask that is not the causal one.

    References
    ----------
    Gu et al. (2024), When attention sink emerges in language models; Kang et al. (2025), See what
    you are told: visual attention sink in large multimodal models.
    """
    above: list[Tensor] = []
    heads = 0

    def reduce(captured: Captured) -> Tensor:
        nonlocal heads
        batch, count, queries, _ = captured.q.shape
        keys = captured.k.shape[2]
        causal = _is_causal(captured)
        if (above and above[0].shape[0] != keys) or (causal and queries != keys):
            raise UnsupportedError(
                f"{captured.layer!r} has other tokens: name layers of one stack."
            )
        received = captured.q.new_zeros((batch, count, keys), dtype=torch.float64)
        for start, stop in captured.blocks():
            received += captured.weights(start, stop).double().sum(2)
        seen = torch.arange(keys, 0, -1, device=received.device) if causal else queries
        received = received / seen
        found = (received > threshold).sum((0, 1))
        above[:] = [above[0] + found if above else found]
        heads += batch * count
        return received

    found = observe(model, run, reduce, layers=layers, attention=attention)
    received = {layer: torch.cat(results).mean(0).float().cpu() for layer, results in found.items()}
    return SinkProfile(received, (above[0] / heads).float().cpu(), threshold)


def _is_causal(captured: Captured) -> bool:
    mask = captured.mask
    if mask is None:
        return captured.is_causal
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    size = captured.q.shape[2], captured.k.shape[2]
    past = torch.ones(size, dtype=torch.bool, device=mask.device).tril()
    if bool((seen == past).all()):
        return True
    if bool(seen.all()):
        return captured.is_causal
    raise UnsupportedError(
        f"{captured.layer!r} has a mask that is not causal: run one sequence without padding."
    )
