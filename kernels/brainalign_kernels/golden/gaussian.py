"""Gaussian adaptive attention against the stored files."""

from __future__ import annotations

from collections.abc import Iterator

from brainalign_kernels.gaussian import GaussianAdaptiveAttention, GaussianAdaptiveBlock
from brainalign_kernels.golden.check import FLOAT64, GoldenFile, Run
from brainalign_kernels.golden.parameters import Place, gradients_by_place, load_parameters

__all__ = ["gaussian_adaptive_attention"]


def gaussian_adaptive_attention(file: GoldenFile) -> Iterator[Run]:
    """Yield one head, several heads, or a block of layers."""
    meta = file.meta
    block = meta["level"] == "block"
    axes = meta["norm_axes"] if block else [meta["norm_axis"]]
    gaussians = meta["num_gaussians"] if block else [meta["num_gaussians"]]
    heads = meta["num_heads"] if block else [meta["num_heads"]]
    places = {}
    for number, count in enumerate(heads):
        for head in range(count):
            upstream = f"layers.{number}." if block else ""
            upstream += "" if meta["level"] == "single" else f"attention_heads.{head}."
            for name in ("mean_offsets", "c"):
                own = f"layers.{number}.{name}" if block else name
                places[upstream + name] = Place(own, head)
    for impl in ("reference", "compiled"):
        layers = [
            GaussianAdaptiveAttention(
                each[0], num_heads=each[1], axis=each[2],
                padding_value=meta["padding_value"], eps=meta["eps"], impl=impl,
            )
            for each in zip(gaussians, heads, axes, strict=True)
        ]  # fmt: skip
        module = GaussianAdaptiveBlock(layers) if block else layers[0]
        module.double()
        load_parameters(module, file, places)
        x = file.tensor("x", grad=True)
        out = module(x)
        compared = [file.compare("out", out, FLOAT64)]
        fed = x
        for number, layer in enumerate(layers):
            made, weights = layer.weights(fed)
            fed = made + fed
            name = f"attention.layer_{number}" if block else "attention"
            compared.append(file.compare(name, weights, FLOAT64))
        yield Run(impl, compared + gradients_by_place(module, file, places, out, x))
