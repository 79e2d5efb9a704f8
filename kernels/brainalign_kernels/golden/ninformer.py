"""NiNformer against the stored files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from brainalign_kernels.golden.check import FLOAT64, GoldenFile, Run
from brainalign_kernels.golden.parameters import Place, gradients_by_place, load_parameters
from brainalign_kernels.ninformer import MixerGatingUnit, NiNformer

__all__ = ["ninformer"]

UNIT = {
    "proj": "projection",
    "Mixer.token_mix.0": "token_norm",
    "Mixer.token_mix.2.net.0": "token_mlp.first",
    "Mixer.token_mix.2.net.3": "token_mlp.second",
    "Mixer.channel_mix.0": "channel_norm",
    "Mixer.channel_mix.1.net.0": "channel_mlp.first",
    "Mixer.channel_mix.1.net.3": "channel_mlp.second",
}
BLOCK = {"norm": "norm", "ffn.net.0": "ffn.first", "ffn.net.3": "ffn.second"}
BLOCK |= {f"mgu.{upstream}": f"gating_unit.{own}" for upstream, own in UNIT.items()}


def ninformer(file: GoldenFile) -> Iterator[Run]:
    """Yield a stack of blocks, or one gating unit."""
    meta = file.meta
    sizes = meta["d_model"], meta["d_ffn"], meta["seq_len"]
    if meta["module"] == "MixerGatingUnit":
        names = UNIT
    else:
        names = {
            f"model.{layer}.{upstream}": f"blocks.{layer}.{own}"
            for layer in range(meta["num_layers"])
            for upstream, own in BLOCK.items()
        }
    places = {
        f"{upstream}.{part}": Place(f"{own}.{part}")
        for upstream, own in names.items()
        for part in ("weight", "bias")
    }
    for impl in ("reference", "compiled"):
        module: nn.Module
        if meta["module"] == "MixerGatingUnit":
            module = MixerGatingUnit(*sizes, impl=impl)
        else:
            module = NiNformer(*sizes, meta["num_layers"], impl=impl)
        module.double()
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
