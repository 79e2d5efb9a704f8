"""Stored parameters in modules, and gradients back under their stored names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brainalign_kernels.golden.check import GRADIENT64, Comparison, GoldenFile

__all__ = ["Place", "gradients_by_place", "load_parameters"]


class Place(NamedTuple):
    """Where a stored parameter lies in a module."""

    #: Of the module's parameter or buffer.
    name: str
    #: The part of it that is the stored one, up to its shape.
    index: Any = slice(None)


def load_parameters(module: nn.Module, file: GoldenFile, places: dict[str, Place]) -> None:
    """Copy every stored parameter to its place.

    Raises
    ------
    KeyError
        If a stored parameter has no place, or the module's are not all given.
    """
    stored = file.parameters()
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if stored.keys() != places.keys() or {p.name for p in places.values()} != own.keys():
        raise KeyError(
            f"{file.file}: {sorted(stored.keys() ^ places.keys())} stored without a place or the "
            f"reverse; the module has {sorted(own)}."
        )
    with torch.no_grad():
        for upstream, place in places.items():
            part = own[place.name][place.index]
            part.copy_(stored[upstream].reshape(part.shape))


def gradients_by_place(
    module: nn.Module, file: GoldenFile, places: dict[str, Place], out: Tensor, x: Tensor
) -> list[Comparison]:
    """Compare the gradients of ``(out * grad_out).sum()`` for the input and all parameters."""
    own = dict(module.named_parameters())
    total = (out * file.tensor("grad_out")).sum()
    grad_x, *found = torch.autograd.grad(total, [x, *own.values()], materialize_grads=True)
    grads = dict(zip(own, found, strict=True))
    made = {"grad_x": grad_x}
    for upstream, place in places.items():
        name = f"grad_param.{upstream}"
        if name in file and place.name in grads:
            made[name] = grads[place.name][place.index].reshape(file.arrays[name].shape)
    return file.compare_gradients(made, GRADIENT64)
