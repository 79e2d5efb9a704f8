"""Attention maps, and their rollout through the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainalign_kernels.adapters import Attend
from brainalign_kernels.errors import ShapeError, UnsupportedError
from brainalign_kernels.probes.capture import Captured, observe

__all__ = ["attention_maps", "attention_rollout"]


def attention_maps(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
    average_heads: bool = False,
    queries: slice | None = None,
) -> dict[str, Tensor]:
    """Return the attention weights of layers: all N x S of them, so mind the memory.

    Parameters
    ----------
    model, run, layers, attention
        See `observe`.
    average_heads : bool
        Keep the mean over heads only.
    queries : slice, optional
        Keep these queries only, such as ``slice(0, 1)`` for the class token.

    Returns
    -------
    dict of str to Tensor, shape (B, H, N, S)
        On the CPU; (B, N, S) with `average_heads`. A layer's last call, if there were several.

    Raises
    ------
    UnsupportedError
        If run() calls no attention layer.
    """
    chosen = queries or slice(None)

    def reduce(captured: Captured) -> Tensor:
        parts = []
        kept = torch.zeros(captured.q.shape[2], dtype=torch.bool)
        kept[chosen] = True
        for start, stop in captured.blocks():
            rows = kept[start:stop].to(captured.q.device)
            if bool(rows.any()):
                weights = captured.weights(start, stop)[:, :, rows]
                parts.append((weights.mean(1) if average_heads else weights).cpu())
        return torch.cat(parts, -2)

    found = observe(model, run, reduce, layers=layers, attention=attention)
    return {layer: results[-1] for layer, results in found.items()}


def attention_rollout(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
    residual: float = 0.5,
) -> Tensor:
    r"""Attention from the last layer back to the input tokens.

    .. math:: \hat S = \prod_{l = L}^{1} \big((1 - r)\, \bar S_l + r I\big)

    with the mean over heads :math:`\bar S_l`. Only the running product is kept.

    Parameters
    ----------
    model, run, layers, attention
        See `observe`; layers must be of one stack, such as ``"visual.*"``.
    residual : float
        r, the share of the residual connection.

    Returns
    -------
    Tensor, shape (B, N, N)
        Row i: how much of token i comes from each input token; rows sum to 1.

    Raises
    ------
    ShapeError
        If `residual` is not from 0 to 1.
    UnsupportedError
        If the layers do not all have the same tokens.

    References
    ----------
    Abnar and Zuidema (2020), Quantifying attention flow in transformers, eq. 1.
    """
    if not 0.0 <= residual <= 1.0:
        raise ShapeError(f"residual is {residual}; expected 0 to 1.")
    product: list[Tensor] = []

    def reduce(captured: Captured) -> None:
        batch, _, tokens, _ = captured.q.shape
        if captured.k.shape[2] != tokens or (
            product and product[0].shape != (batch, tokens, tokens)
        ):
            raise UnsupportedError(
                f"{captured.layer!r} has other tokens than the layers before: name the layers of "
                "one stack."
            )
        mean = torch.cat([captured.weights(*block).mean(1) for block in captured.blocks()], 1)
        step = (1.0 - residual) * mean
        step.diagonal(dim1=-2, dim2=-1).add_(residual)
        product[:] = [step @ product[0] if product else step]

    observe(model, run, reduce, layers=layers, attention=attention)
    return product[0]
