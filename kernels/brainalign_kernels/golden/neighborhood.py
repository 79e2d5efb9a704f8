"""Golden files of neighborhood attention on 1, 2 and 3 axes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from brainalign_kernels.golden.check import (
    FLOAT32,
    FLOAT64,
    GRADIENT64,
    Comparison,
    GoldenFile,
    Run,
)
from brainalign_kernels.neighborhood import neighborhood_attention, neighborhood_mask

__all__ = ["neighborhood_attention_1d", "neighborhood_attention_2d", "neighborhood_attention_3d"]


def neighborhood_attention_1d(file: GoldenFile) -> Iterator[Run]:
    """One axis."""
    yield from _runs(file)


def neighborhood_attention_2d(file: GoldenFile) -> Iterator[Run]:
    """Two axes."""
    yield from _runs(file)


def neighborhood_attention_3d(file: GoldenFile) -> Iterator[Run]:
    """Three axes."""
    yield from _runs(file)


def _runs(file: GoldenFile) -> Iterator[Run]:
    meta = file.meta
    shape = tuple(meta["spatial"])
    options = {name: meta[name] for name in ("kernel_size", "dilation", "stride", "is_causal")}
    yield Run("mask", _mask(file, shape, options))
    for impl in ("reference", "compiled"):
        exact, inputs = _attend(file, torch.float64, shape, options, impl)
        compared = [file.compare("out_float64", exact, FLOAT64)]
        compared += file.gradients(exact, "grad_out", inputs, GRADIENT64)
        single, _ = _attend(file, torch.float32, shape, options, impl)
        compared.append(file.compare("out", single, FLOAT32))
        yield Run(impl, compared)


def _mask(file: GoldenFile, shape: tuple[int, ...], options: dict[str, object]) -> list[Comparison]:
    made = neighborhood_mask(shape, **options)  # type: ignore[arg-type]
    packed = torch.from_numpy(np.packbits(made.numpy(), axis=-1))
    counts = made.sum(dim=1)
    lowest_highest = torch.stack([counts.min(), counts.max()])
    return [
        file.compare("mask_packed", packed, 0.0),
        Comparison(
            "keys_per_query", lowest_highest, torch.tensor(file.meta["keys_per_query"]), 0.0
        ),
    ]


def _attend(
    file: GoldenFile,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    options: dict[str, object],
    impl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, *shape, H, D), and the leaves in that layout."""
    stored = {name: file.tensor(name, dtype, grad=True) for name in ("q", "k", "v")}
    flat = [x.flatten(1, -3).transpose(1, 2) for x in stored.values()]
    made = neighborhood_attention(
        *flat, shape=shape, scale=file.meta.get("scale"), impl=impl, **options  # type: ignore[arg-type]
    )  # fmt: skip
    out = made.transpose(1, 2).unflatten(1, shape)
    return out, {f"grad_{name}": x for name, x in stored.items()}
