"""Golden files of Flow-Attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from brainalign_kernels.flow import FlowAttention
from brainalign_kernels.flow import flow_attention as attend
from brainalign_kernels.flow.reference import flow
from brainalign_kernels.golden.check import FLOAT64, GRADIENT64, Comparison, GoldenFile, Run

__all__ = ["flow_attention", "flow_attention_causal"]


def _runs(file: GoldenFile) -> Iterator[Run]:
    meta = file.meta
    options: dict[str, Any] = {"is_causal": bool(meta["causal"]), "eps": float(meta["eps"])}
    for impl, chunk in (("reference", 64), ("compiled", 64), ("compiled", 5)):
        q, k, v = (file.tensor(name, grad=True) for name in "qkv")
        core = attend(q, k, v, chunk_size=chunk, impl=impl, **options)
        made: list[Comparison] = [file.compare("core_out", core, FLOAT64)]
        made += file.gradients(
            core, "grad_core_out", {"grad_q": q, "grad_k": k, "grad_v": v}, GRADIENT64
        )
        tokens = flow(q, k, **options)
        made.append(file.compare("sink_allocation", tokens.allocation, FLOAT64))
        made.append(file.compare("source_competition", tokens.competition, FLOAT64))

        module = FlowAttention(
            meta["d_input"], meta["d_model"], meta["d_output"], meta["n_heads"],
            chunk_size=chunk, impl=impl, **options,
        ).double()  # fmt: skip
        module.load_state_dict(file.parameters())
        names = ["x"] if "x" in file else ["queries", "keys", "values"]
        inputs = [file.tensor(name, grad=True) for name in names]
        out = module(*inputs)
        made.append(file.compare("out", out, FLOAT64))
        wanted: dict[str, torch.Tensor] = {
            f"grad_{name}": x for name, x in zip(names, inputs, strict=True)
        }
        wanted |= {f"grad_param.{name}": p for name, p in module.named_parameters()}
        made += file.gradients(out, "grad_out", wanted, GRADIENT64)
        label = impl if chunk == 64 else f"{impl}, chunks of {chunk}"
        yield Run(label, made)


def flow_attention(file: GoldenFile) -> Iterator[Run]:
    """Not causal."""
    return _runs(file)


def flow_attention_causal(file: GoldenFile) -> Iterator[Run]:
    """Causal."""
    return _runs(file)
