"""The kinds of attention maps that the heads of a model make, summarised by an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from brainalign_kernels.errors import ShapeError

__all__ = ["PatternSummary", "attention_patterns"]


@dataclass(frozen=True)
class PatternSummary:
    """Codes of attention maps, and what they say about the maps.

    Parameters
    ----------
    codes : dict of str to Tensor, shape (B, H, code_dim)
        By layer: maps with near codes are alike. Cluster them to name families of heads.
    maps, reconstructions : dict of str to Tensor, shape (B, H, size, size)
        What the autoencoder was given, and what it makes of the codes; rows are queries.
    explained : float
        Share of the variance of the maps, about their mean, that the reconstructions keep.
    """

    codes: dict[str, Tensor]
    maps: dict[str, Tensor]
    reconstructions: dict[str, Tensor]
    explained: float


def attention_patterns(
    maps: Mapping[str, Tensor],
    *,
    size: int = 16,
    code_dim: int = 4,
    hidden: int = 128,
    steps: int = 500,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> PatternSummary:
    r"""Summarise the attention maps of heads by the codes of an autoencoder.

    .. math:: \min_{E, D} \sum_{l, b, h} \lVert D(E(a_{lbh})) - a_{lbh} \rVert^2

    :math:`a_{lbh}` is the map of head h of layer l for sample b, reduced to size x size by the
    means of its parts, less the mean map and divided by the standard deviation over all. E and D
    have one hidden layer each and see all maps at every step.

    Parameters
    ----------
    maps : mapping of str to Tensor, shape (B, H, N, S)
        By layer, as from `attention_maps`. Layers may differ in all four sizes.
    size : int
        Rows and columns to which a map is reduced.
    code_dim : int
        Numbers that stand for a map.
    hidden : int
        Width of the hidden layers.
    steps : int
        Of Adam.
    learning_rate : float
        Of Adam.
    seed : int
        Of the autoencoder's first weights.

    Returns
    -------
    PatternSummary
        On the CPU, in float32.

    Raises
    ------
    ShapeError
        For no maps, maps of other shapes, values that are not finite, or sizes below 1.

    References
    ----------
    Li et al. (2023), How does attention work in vision transformers? A visual analytics attempt,
    the summary of attention patterns.
    """
    if min(size, code_dim, hidden, steps) < 1:
        raise ShapeError("size, code_dim, hidden and steps must be at least 1.")
    if not maps:
        raise ShapeError("There are no attention maps.")
    for layer, x in maps.items():
        if x.ndim != 4 or 0 in x.shape or not bool(torch.isfinite(x).all()):
            raise ShapeError(
                f"{layer!r}: expected finite maps (samples, heads, queries, keys), none of them "
                f"0; got {tuple(x.shape)}."
            )
    small = {n: adaptive_avg_pool2d(x.detach().float().cpu(), size) for n, x in maps.items()}
    rows = torch.cat([x.flatten(0, 1).flatten(1) for x in small.values()])
    mean, spread = rows.mean(0), (rows - rows.mean(0)).square().mean().sqrt()
    data = (rows - mean) / spread if spread > 0 else rows - mean

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        data = data.clone()
        encoder = _perceptron(data.shape[1], hidden, code_dim)
        decoder = _perceptron(code_dim, hidden, data.shape[1])
        weights = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            mse_loss(decoder(encoder(data)), data).backward()
            optimizer.step()
    with torch.no_grad():
        codes = encoder(data)
        made = decoder(codes)
    lost = float((made - data).square().sum() / data.square().sum()) if spread > 0 else 0.0
    made = made * spread + mean
    heads = [x.shape[:2] for x in small.values()]
    parts = [b * h for b, h in heads]
    by_layer = [
        {n: x.unflatten(0, bh) for n, bh, x in zip(small, heads, rows.split(parts), strict=True)}
        for rows in (codes, made.unflatten(1, (size, size)))
    ]
    return PatternSummary(by_layer[0], small, by_layer[1], 1.0 - lost)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
