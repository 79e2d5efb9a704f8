"""How far heads look on the grid of image tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brainalign_kernels.adapters import Attend
from brainalign_kernels.probes.capture import Captured, observe, require_grid

__all__ = ["attention_distance", "ring_profile"]


def attention_distance(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
) -> dict[str, Tensor]:
    r"""Mean distance, in patches, between a patch and what it attends to.

    .. math:: d_h = \frac{1}{N} \sum_i \frac{\sum_j A_{ij} \lVert x_i - x_j \rVert_2}{\sum_j A_{ij}}

    Both sums run over patches; class and register tokens are left out, and so are patches that
    attend to no patch.

    Parameters
    ----------
    model, run, layers, attention
        See `observe`; layers must have image tokens.

    Returns
    -------
    dict of str to Tensor, shape (H,)
        Mean over the images of all calls.

    Raises
    ------
    UnsupportedError
        If a layer has no grid of image tokens.

    References
    ----------
    Dosovitskiy et al. (2021), An image is worth 16x16 words, figure 7 right.
    """

    def reduce(captured: Captured) -> tuple[Tensor, Tensor]:
        rows, columns, prefix = require_grid(captured)
        total = captured.q.new_zeros(captured.q.shape[1], dtype=torch.float64)
        count = torch.zeros_like(total)
        for start, stop in _patch_blocks(captured, prefix):
            weights = captured.weights(start, stop)[..., prefix:].double()
            offset = _offsets(rows, columns, start - prefix, stop - prefix, weights.device)
            distance = offset.double().norm(dim=-1)
            mass = weights.sum(-1)
            mean = (weights * distance).sum(-1) / mass.clamp_min(1e-30)
            total += torch.where(mass > 0, mean, 0.0).sum((0, 2))
            count += (mass > 0).sum((0, 2))
        return total, count

    found = observe(model, run, reduce, layers=layers, attention=attention)
    return {layer: _mean(results) for layer, results in found.items()}


def ring_profile(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
    metric: Literal["chebyshev", "manhattan"] = "chebyshev",
) -> dict[str, Tensor]:
    r"""Attention strength by ring of k hops around a patch.

    .. math:: s_{h,k} = \frac{1}{N} \sum_i \sum_{j : \mathrm{hops}(i, j) = k} A_{ij}

    Parameters
    ----------
    model, run, layers, attention
        See `observe`; layers must have image tokens.
    metric : {"chebyshev", "manhattan"}
        A hop goes to one of 8 neighbours, or of 4.

    Returns
    -------
    dict of str to Tensor, shape (H, hops + 1)
        Entry 0 is the patch itself. Mean over patches and over the images of all calls. The rest to
        1 is what goes to class and register tokens.

    Raises
    ------
    UnsupportedError
        If a layer has no grid of image tokens.

    References
    ----------
    Li et al. (2023), How does attention work in vision transformers? A visual analytics attempt
    (attention strength by k-hop neighbours).
    """

    def reduce(captured: Captured) -> tuple[Tensor, int]:
        rows, columns, prefix = require_grid(captured)
        far = max(rows, columns) - 1 if metric == "chebyshev" else rows + columns - 2
        heads = captured.q.shape[1]
        total = captured.q.new_zeros((heads, far + 1), dtype=torch.float64)
        for start, stop in _patch_blocks(captured, prefix):
            weights = captured.weights(start, stop)[..., prefix:].double().sum(0)
            offset = _offsets(rows, columns, start - prefix, stop - prefix, weights.device)
            hops = offset.amax(-1) if metric == "chebyshev" else offset.sum(-1)
            total.index_add_(1, hops.flatten(), weights.flatten(1))
        return total, captured.q.shape[0] * rows * columns

    found = observe(model, run, reduce, layers=layers, attention=attention)
    return {layer: _mean(results) for layer, results in found.items()}


def _patch_blocks(captured: Captured, prefix: int) -> list[tuple[int, int]]:
    blocks = [(max(start, prefix), stop) for start, stop in captured.blocks()]
    return [(start, stop) for start, stop in blocks if start < stop]


def _offsets(rows: int, columns: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Absolute row and column differences of patches from start to stop to all patches."""
    places = torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    )
    return (places[start:stop, None] - places[None]).abs()


def _mean(results: Sequence[tuple[Tensor, Tensor | int]]) -> Tensor:
    """Return one mean of the sums and counts of several calls."""
    total = torch.stack([t for t, _ in results]).sum(0)
    count = torch.stack([torch.as_tensor(c, device=total.device) for _, c in results]).sum(0)
    return (total / count).float().cpu()
