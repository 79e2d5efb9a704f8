"""Read golden files, run what they name, and compare.

A folder holds one folder per mechanism, and that one ``.npz`` archive per configuration: inputs,
``param.*``, ``out``, cotangents ``grad_out``, gradients ``grad_*`` and a JSON string ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Comparison", "GoldenFile", "Run", "check_file", "check_folder"]

#: Largest |difference| over largest |value|, unless a mechanism's note says otherwise.
FLOAT64, GRADIENT64, FLOAT32 = 1e-9, 1e-7, 2e-5

_VANISHING = 1e-12

#: How the names of stored outputs and gradients begin.
_RESULTS = ("out", "core_out", "agent_v", "gated_heads", "state", "grad_", "new_param.")

#: Folder name: module of this package whose function of that name yields the runs of a file.
MECHANISMS: dict[str, str] = {
    "agent_attention_core": "agent",
    "agent_attention_cswin": "agent",
    "agent_attention_deit": "agent",
    "agent_attention_pvt": "agent",
    "agent_attention_swin": "agent",
    "attention_adversarial_training": "adversarial",
    "clear_attention": "clear",
    "clear_mask": "clear",
    "decay_linear_attention": "lightning",
    "dsf_attention": "dynamics",
    "efficient_local_attention": "efficient_local",
    "flow_attention": "flow",
    "flow_attention_causal": "flow",
    "gaussian_adaptive_attention": "gaussian",
    "gla_naive": "lightning",
    "halo_attention": "halo",
    "hip_attention_draft": "hip",
    "hip_attention_head_group": "hip",
    "lightnet_additive_recurrence": "lightnet",
    "lightnet_fla": "lightnet",
    "lightnet_xmixers": "lightnet",
    "lightning_attention": "lightning",
    "lightning_attention_recurrent": "lightning",
    "lrpe_1d": "lrpe",
    "md_lrpe": "lrpe",
    "md_tpe": "tpe",
    "moh_dit": "moh",
    "moh_vit": "moh",
    "moh_vit_aggregated": "moh",
    "neighborhood_attention_1d": "neighborhood",
    "neighborhood_attention_2d": "neighborhood",
    "neighborhood_attention_3d": "neighborhood",
    "ninformer": "ninformer",
    "tpe": "tpe",
    "ulsam": "ulsam",
    "visual_attention_redistribution": "sinks",
}


@dataclass(frozen=True)
class Comparison:
    """One array that was computed, beside the stored one.

    Parameters
    ----------
    name : str
        Of the stored array.
    got, expected : Tensor
        Compared by the largest difference over the largest expected value; booleans and integers
        must be equal.
    tolerance : float
        At most this.
    scale : float
        Of comparable arrays. If all expected values vanish beside it they are rounding errors of
        zero, as the gradient of a bias on all keys of a softmax is, and this is what differences
        are divided by.
    """

    name: str
    got: Tensor
    expected: Tensor
    tolerance: float
    scale: float = 0.0

    @property
    def error(self) -> float:
        """Relative error; infinite if shapes differ or a value on either side is not finite."""
        got, expected = self.got.detach(), self.expected.detach()
        if got.shape != expected.shape:
            return float("inf")
        if not expected.is_floating_point():
            return float((got != expected).sum())
        if got.numel() == 0:
            return 0.0
        if not bool(torch.isfinite(got).all() and torch.isfinite(expected).all()):
            return float("inf")
        difference = (got.double() - expected.double()).abs().max()
        size = float(expected.double().abs().max())
        if size < _VANISHING * self.scale:
            size = self.scale
        return float(difference / size) if size > 0 else float(difference)

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Run:
    """All comparisons of one implementation with one file.

    Parameters
    ----------
    path : str
        The implementation.
    comparisons : list of Comparison
    """

    path: str
    comparisons: list[Comparison]


class GoldenFile:
    """Arrays of one golden file as tensors, and its hyper-parameters.

    Parameters
    ----------
    file : Path
        Archive, read without pickle.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        self.meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
        self.arrays = arrays
        self.compared: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, grad: bool = False) -> Tensor:
        """Return a stored array; floating-point ones in `dtype` if given."""
        made = torch.from_numpy(np.array(self.arrays[name]))
        if dtype is not None and made.is_floating_point():
            made = made.to(dtype)
        return made.requires_grad_(grad) if grad else made

    def parameters(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """``param.*`` by their upstream names."""
        return {
            name.removeprefix("param."): self.tensor(name, dtype)
            for name in self.arrays
            if name.startswith("param.")
        }

    def compare(
        self, name: str, got: Tensor, tolerance: float, *, scale: float = 0.0
    ) -> Comparison:
        """Compare with the stored array `name`."""
        self.compared.add(name)
        return Comparison(name, got, self.tensor(name), tolerance, scale)

    def compare_gradients(self, found: dict[str, Tensor], tolerance: float) -> list[Comparison]:
        """Compare those that are stored, by their names, such as ``grad_q``."""
        known = {name: x for name, x in found.items() if name in self}
        sizes = [float(self.tensor(name).abs().max()) for name, x in known.items() if x.numel()]
        scale = max(sizes, default=0.0)
        return [self.compare(name, x, tolerance, scale=scale) for name, x in known.items()]

    def gradients(
        self, out: Tensor, cotangent: str, inputs: dict[str, Tensor], tolerance: float
    ) -> list[Comparison]:
        """Compare the gradients of ``(out * cotangent).sum()``.

        Parameters
        ----------
        out : Tensor
            With a graph.
        cotangent : str
            Name of the stored cotangent.
        inputs : dict of str to Tensor
            Name of the stored gradient, such as ``grad_q``, to the tensor that it belongs to.
        tolerance : float
            Of each.
        """
        known = {name: x for name, x in inputs.items() if name in self}
        total = (out * self.tensor(cotangent, out.dtype)).sum()
        found = torch.autograd.grad(
            total, list(known.values()), retain_graph=True, materialize_grads=True
        )
        return self.compare_gradients(dict(zip(known, found, strict=True)), tolerance)

    def left_out(self) -> list[str]:
        """Name the stored outputs and gradients that no comparison has asked for."""
        results = {name for name in self.arrays if name.startswith(_RESULTS)}
        return sorted(results - self.compared - {"grad_out", "grad_core_out"})


def check_file(file: Path, mechanism: str) -> list[Run]:
    """Run every implementation that can do it on one golden file.

    Parameters
    ----------
    file : Path
        Archive.
    mechanism : str
        Name of its folder.

    Returns
    -------
    list of Run

    Raises
    ------
    KeyError
        For a mechanism that is not known, or an array that the file lacks.
    ValueError
        If the file stores an output or a gradient that nothing was compared with.
    """
    module = import_module(f"{__package__}.{MECHANISMS[mechanism]}")
    check: Callable[[GoldenFile], Iterator[Run]] = getattr(module, mechanism)
    stored = GoldenFile(file)
    runs = list(check(stored))
    if stored.left_out():
        raise ValueError(f"nothing was compared with {', '.join(stored.left_out())}")
    return runs


def check_folder(folder: Path) -> Iterator[tuple[bool, str]]:
    """Check every golden file under a folder.

    Parameters
    ----------
    folder : Path
        One folder per mechanism, with archives in them.

    Yields
    ------
    ok : bool
    line : str
        What was checked, the largest error of each implementation, and where it occurred.
    """
    folder = folder.resolve()
    files = sorted(folder.rglob("*.npz"))
    if not files:
        yield False, f"FAIL  {folder}: no golden files (*.npz) here"
        return
    for empty in sorted(f for f in folder.iterdir() if f.is_dir() and not any(f.rglob("*.npz"))):
        yield False, f"FAIL  {empty.name}: no golden files (*.npz) here"
    for file in files:
        good, line = _check(file, file.parent.name)
        yield good, f"{'ok  ' if good else 'FAIL'}  {file.parent.name}/{file.name}: {line}"


def _check(file: Path, mechanism: str) -> tuple[bool, str]:
    if mechanism not in MECHANISMS:
        return False, f"unknown mechanism {mechanism!r}"
    try:
        runs = check_file(file, mechanism)
    except Exception as fault:  # a damaged file must not hide the others
        return False, f"cannot be checked: {type(fault).__name__}: {' '.join(str(fault).split())}"
    good = bool(runs) and all(c.holds for run in runs for c in run.comparisons)
    return good, "; ".join(_summary(run) for run in runs) or "nothing ran"


def _summary(run: Run) -> str:
    worst = max(run.comparisons, key=lambda c: c.error / c.tolerance if c.tolerance else c.error)
    return (
        f"{run.path} {worst.error:.1e} of {worst.tolerance:g} "
        f"({worst.name}, {len(run.comparisons)} arrays)"
    )
