"""Subspace attention against the stored files."""

from __future__ import annotations

from collections.abc import Iterator

from brainalign_kernels.golden.check import FLOAT64, GoldenFile, Run
from brainalign_kernels.golden.parameters import Place, gradients_by_place, load_parameters
from brainalign_kernels.ulsam import ULSAM

__all__ = ["ulsam"]


def ulsam(file: GoldenFile) -> Iterator[Run]:
    """Yield the module in evaluation or training, and its running statistics after that."""
    meta = file.meta
    splits, width = meta["num_splits"], meta["C"] // meta["num_splits"]
    places: dict[str, Place] = {}
    for split in range(splits):
        parts = {
            "dws": ("depthwise", slice(split * width, (split + 1) * width)),
            "point": ("pointwise", slice(split, split + 1)),
        }
        for upstream, (own, index) in parts.items():
            stem = f"subspaces.{split}."
            places |= {
                f"{stem}conv_{upstream}.weight": Place(f"{own}_weight", parts["dws"][1]),
                f"{stem}conv_{upstream}.bias": Place(f"{own}_bias", index),
                f"{stem}bn_{upstream}.weight": Place(f"{own}_norm_weight", index),
                f"{stem}bn_{upstream}.bias": Place(f"{own}_norm_bias", index),
                f"{stem}bn_{upstream}.running_mean": Place(f"running_mean_{own}", index),
                f"{stem}bn_{upstream}.running_var": Place(f"running_var_{own}", index),
            }
    for impl in ("reference", "compiled"):
        module = ULSAM(meta["C"], splits, eps=meta["bn_eps"], impl=impl).double()
        load_parameters(module, file, places)
        module.train(meta["batchnorm"].startswith("train"))
        x = file.tensor("x", grad=True)
        out, attention = module.attend(x)
        buffers = dict(module.named_buffers())
        compared = [
            file.compare("out", out, FLOAT64),
            file.compare("attention", attention, FLOAT64),
            *gradients_by_place(module, file, places, out, x),
        ]
        for upstream, place in places.items():
            name = f"new_param.{upstream}"
            if name in file:
                compared.append(file.compare(name, buffers[place.name][place.index], FLOAT64))
        yield Run(impl, compared)
