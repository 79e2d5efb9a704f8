"""Which tokens draw attention that they do not use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError

__all__ = ["sink_metric", "sink_share", "sink_tokens"]


def sink_metric(attention: Tensor) -> Tensor:
    r"""Mean attention that a key gets from the queries that can see it.

    .. math:: a_k = \frac{1}{T - k} \sum_{i \ge k} A_{ik}

    Parameters
    ----------
    attention : Tensor, shape (..., T, T)
        Causal attention weights, queries by keys; keys are counted from 0.

    Returns
    -------
    Tensor, shape (..., T)
        Between 0 and 1; in float32 at least.

    Raises
    ------
    ShapeError
        If the last two axes differ.

    References
    ----------
    Gu et al. (2024), When attention sink emerges in language models.
    """
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2]:
        raise ShapeError(
            "The sink metric needs attention among the same tokens, shape (..., T, T); "
            f"got {tuple(attention.shape)}."
        )
    total = attention.sum(dim=-2, dtype=accumulation_dtype(attention.dtype))
    tokens = attention.shape[-1]
    return total / torch.arange(tokens, 0, -1, dtype=total.dtype, device=total.device)


def sink_share(attention: Tensor | Sequence[Tensor], *, threshold: float = 0.3) -> Tensor:
    r"""Share of the heads of all layers in which a token is a sink.

    .. math:: \mathrm{sink}_k = \frac{1}{LH} \sum_{l, h} 1[a^{l,h}_k > \epsilon]

    Parameters
    ----------
    attention : Tensor, shape (..., T, T), or sequence of such
        Causal attention weights; the mean is taken over all leading axes (layers, samples, heads)
        and over the members of a sequence, each head of each layer counting once.
    threshold : float
        Epsilon: the metric above which a token counts as a sink.

    Returns
    -------
    Tensor, shape (T,)
        Usually entry 0, the first token, is reported.

    Raises
    ------
    ShapeError
        For no layers, or layers with different numbers of tokens.

    References
    ----------
    Gu et al. (2024), When attention sink emerges in language models.
    """
    layers = [attention] if isinstance(attention, Tensor) else list(attention)
    if not layers or len({layer.shape[-1] for layer in layers}) != 1:
        raise ShapeError(
            "Expected at least one layer of attention, all with the same number of tokens; got "
            f"{[tuple(layer.shape) for layer in layers]}."
        )
    metrics = [sink_metric(layer).reshape(-1, layer.shape[-1]) for layer in layers]
    return (torch.cat(metrics) > threshold).to(metrics[0].dtype).mean(dim=0)


def sink_tokens(
    hidden_states: Tensor,
    dimensions: Tensor | Sequence[int],
    *,
    tau: float = 20.0,
    eps: float = 1e-6,
) -> Tensor:
    r"""Tokens with a massive activation in one of the known sink dimensions.

    .. math:: \max_{d \in \mathcal{D}}
              \frac{|h_{td}|}{\sqrt{\frac{1}{C} \sum_c h_{tc}^2 + \epsilon}} > \tau

    Parameters
    ----------
    hidden_states : Tensor, shape (..., T, C)
        What enters the layer, before its norm.
    dimensions : Tensor of int or sequence of int
        Sink dimensions of the language model, such as 1415 and 2533 of LLaMA-2 7B.
    tau : float
        Threshold.
    eps : float
        Of the root mean square.

    Returns
    -------
    Tensor of bool, shape (..., T)

    Raises
    ------
    ShapeError
        For no dimensions, or dimensions that the hidden states do not have.

    References
    ----------
    Kang et al. (2025), See what you are told: visual attention sink in large multimodal models.
    """
    chosen = torch.as_tensor(dimensions, dtype=torch.long, device=hidden_states.device).reshape(-1)
    channels = hidden_states.shape[-1]
    if chosen.numel() == 0 or bool(((chosen < 0) | (chosen >= channels)).any()):
        raise ShapeError(
            f"Sink dimensions must lie between 0 and {channels - 1} and be at least one; "
            f"got {chosen.tolist()}."
        )
    wide = hidden_states.to(accumulation_dtype(hidden_states.dtype))
    size = (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (wide.index_select(-1, chosen).abs() / size).amax(dim=-1) > tau
