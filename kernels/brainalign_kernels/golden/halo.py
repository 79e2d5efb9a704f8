"""Halo attention over feature maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from brainalign_kernels.golden.check import FLOAT64, GRADIENT64, GoldenFile, Run
from brainalign_kernels.halo import HaloAttention

PATHS = ("reference", "compiled")


def halo_attention(file: GoldenFile) -> Iterator[Run]:
    """Halo attention with its projections; stride 2 by queries or by pooling."""
    meta = file.meta
    pools = meta["pools_output"]
    for impl in PATHS:
        block = HaloAttention(
            meta["C"], file.tensor("out").shape[1], stride=2 if pools else meta["block_stride"],
            num_heads=meta["num_heads"], dim_head=meta["dim_head_qk"],
            block_size=meta["block_size"], halo_size=meta["halo_size"],
            qkv_bias="param.q.bias" in file, avg_down=pools,
            scale_pos_embed=meta.get("scale_pos_embed", False), impl=impl,
        ).to(torch.float64)  # fmt: skip
        block.load_state_dict(file.parameters())
        x = file.tensor("x", grad=True)
        out = block(x)
        inputs = {"grad_x": x}
        inputs |= {f"grad_param.{n}": p for n, p in block.named_parameters()}
        made = file.gradients(out, "grad_out", inputs, GRADIENT64)
        yield Run(impl, [file.compare("out", out, FLOAT64), *made])
