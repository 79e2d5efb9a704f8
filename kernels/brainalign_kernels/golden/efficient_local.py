"""Efficient local attention against the stored files, which hold timm's form."""

from __future__ import annotations

from collections.abc import Iterator

from brainalign_kernels.efficient_local import EfficientLocalAttention
from brainalign_kernels.golden.check import FLOAT64, GoldenFile, Run
from brainalign_kernels.golden.parameters import Place, gradients_by_place, load_parameters

__all__ = ["efficient_local_attention"]

OWN = {"conv_h": "conv_rows", "conv_w": "conv_columns"}
OWN |= {"norm_h": "norm_rows", "norm_w": "norm_columns"}


def efficient_local_attention(file: GoldenFile) -> Iterator[Run]:
    """Yield the module and its gradients."""
    meta = file.meta
    places = {}
    for upstream in file.parameters():
        layer, part = upstream.split(".")
        places[upstream] = Place(f"{OWN[layer]}.{part}")
    for impl in ("reference", "compiled"):
        module = EfficientLocalAttention.timm(
            meta["C"],
            meta["kernel_size"],
            bias=meta["bias"],
            norm="norm_h.weight" in places,
            activation=meta["activation"].lower(),
            gate=meta["gate"].lower(),
            has_skip=meta["has_skip"],
            impl=impl,
        ).double()
        load_parameters(module, file, places)
        x = file.tensor("x", grad=True)
        out = module(x)
        yield Run(
            impl,
            [
                file.compare("out", out, FLOAT64),
                *gradients_by_place(module, file, places, out, x),
            ],
        )
