"""Attention sinks against the stored files."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from brainalign_kernels.golden.check import FLOAT64, GoldenFile, Run
from brainalign_kernels.sinks import redistribution
from brainalign_kernels.sinks.detection import sink_tokens
from brainalign_kernels.sinks.redistribution import (
    image_centric_rows,
    redistribute_attention,
)

__all__ = ["visual_attention_redistribution"]


def visual_attention_redistribution(file: GoldenFile) -> Iterator[Run]:
    """Yield redistributed weights, and the attention that makes and uses them."""
    meta = file.meta
    attention, v = file.tensor("attention"), file.tensor("v")
    queries, tokens = attention.shape[2:]
    sinks = sink_tokens(
        file.tensor("hidden_states"), file.tensor("sink_dimensions"),
        tau=meta["tau"], eps=meta["rms_eps"],
    )  # fmt: skip
    end = meta["image_begin"] + meta["image_length"]
    image = torch.zeros(tokens, dtype=torch.bool)
    image[meta["image_begin"] : end] = True
    chosen = {"rho": meta["rho"], "image_mass": meta["summ"]}
    moving = chosen | {
        "p": meta["p"],
        "queries": torch.arange(queries) >= (end if meta["stage"] == "prefill" else 0),
    }
    rows = image_centric_rows(attention, sinks, image, **chosen)
    weights = redistribute_attention(attention, sinks, image, **moving)
    yield Run(
        "weights",
        [
            file.compare("sink_indices", sinks[0].nonzero().flatten(), FLOAT64),
            file.compare("selected_coordinates", rows.nonzero(), FLOAT64),
            file.compare("out_attention", weights, FLOAT64),
            file.compare("out", weights @ v, FLOAT64),
        ],
    )
    # Logarithms of the stored weights as a mask, and nothing else in the logits, give them back.
    nothing = v.new_zeros((*attention.shape[:3], 1)), v.new_zeros((*v.shape[:3], 1))
    for impl in ("reference", "compiled"):
        out = redistribution.visual_attention_redistribution(
            *nothing, v, sinks, image, mask=attention.log(), impl=impl, **moving
        )
        yield Run(impl, [file.compare("out", out, FLOAT64)])
