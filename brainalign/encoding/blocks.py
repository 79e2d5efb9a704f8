"""How many neuroids are worked on at once, so that a memory limit is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xarray as xr

from brainalign.errors import ConfigError
from brainalign.linear.streaming import warn_narrow
from brainalign.memory import free_bytes, readable, resident_bytes

__all__ = ["Plan", "Sizes", "neuroid_chunk", "part_slice", "plan_blocks"]

logger = logging.getLogger(__name__)

#: Memory for what is not counted, and what freed memory is lost in gaps, as a factor.
RESERVE, GAPS = 2**27, 1.25
#: Neuroids that `align` and the bootstrap work on at once in float64.
_ALIGNED_AT_ONCE, _BOOTSTRAPPED_AT_ONCE = 4096, 512
#: Share of the free memory that is taken where no limit is given.
_SHARE = 0.5


@dataclass(frozen=True)
class Sizes:
    """What the memory of an analysis depends on.

    Parameters
    ----------
    presentations, rows : int
        Of the responses as stored, and as fitted.
    features : sequence of int
        Features of each layer.
    folds : int
        Outer folds.
    inner : int
        Inner folds; 1 for closed forms.
    bootstraps : int
        Samples.
    null : int
        Exchanged columns.
    predictions : bool
        Whether predictions are kept.
    parts : int
        Feature spaces whose contributions to the predictions are held.
    """

    presentations: int
    rows: int
    features: Sequence[int]
    folds: int
    inner: int
    bootstraps: int
    null: int
    predictions: bool
    parts: int = 0

    def result(self, n: int) -> int:
        """Bytes of the result of `n` neuroids."""
        kept = 8 * self.rows if self.predictions else 0
        return n * (4 * max(self.features) + 64 * (len(self.features) + 2) + kept)

    def solvers(self, keep: bool) -> int:
        """Bytes of features and solvers, one of them being built."""
        n, total, largest, building = self.rows, 0, 0, 0
        for p in self.features:
            small = min(n, p)
            one = 4 * (2 * n * p + 2 * n * small + small * p + self.inner * (2 * small**2))
            total += one * (self.folds + 1)
            largest = max(largest, one)
            building = max(building, 8 * (n * p + 5 * small**2))
        features = 8 * n * sum(self.features)
        return features + building + (total if keep else largest)

    def block(self, n: int) -> int:
        """Bytes of `n` neuroids in flight."""
        reading = n * 14 * self.presentations
        reading += min(n, _ALIGNED_AT_ONCE) * 32 * self.presentations
        fitting = (n + self.null) * 4 * (2 * self.rows + 4 * self.rows)
        fitting += n * 12 * self.rows * self.parts
        resampled = self.bootstraps * (16 * self.rows + n)
        resampled += min(n, _BOOTSTRAPPED_AT_ONCE) * (80 * self.bootstraps + 48 * self.rows)
        return int(GAPS * max(reading, fitting + (resampled if self.bootstraps else 0)))


@dataclass(frozen=True)
class Plan:
    """Blocks of the neuroids.

    Parameters
    ----------
    step : int
        Neuroids of a block.
    keep : bool
        Whether solvers are kept from one block to the next.
    room : int
        Neuroids that would fit.
    """

    step: int
    keep: bool
    room: int

    def blocks(self, within: slice) -> Iterator[slice]:
        """Yield the blocks of a slice of the neuroids."""
        for start in range(within.start, within.stop, self.step):
            yield slice(start, min(start + self.step, within.stop))


def plan_blocks(
    sizes: Sizes,
    n: int,
    chunk: int,
    memory_gib: float | None,
    devices: Sequence[torch.device],
) -> Plan:
    """Choose the largest blocks, of whole chunks, that keep the limit.

    Parameters
    ----------
    sizes : Sizes
        Of the analysis.
    n : int
        Neuroids.
    chunk : int
        Neuroids that are stored together.
    memory_gib : float, optional
        Most memory (GiB) of the process, the program included; by default what it holds now and
        half of what is free.
    devices : sequence of torch.device
        Each works on blocks of its own, with solvers of its own; the limit is kept by their sum. A
        GPU has a limit of its own besides: four fifths of its free memory.

    Raises
    ------
    ConfigError
        If not even one neuroid fits, or the result does not.
    """
    resident = resident_bytes()
    limit = resident + _SHARE * free_bytes() if memory_gib is None else memory_gib * 2**30
    # While blocks are joined, the result stands there twice.
    fixed = resident + RESERVE + 2 * sizes.result(n)

    def fits(width: int, keep: bool) -> bool:
        need = sizes.solvers(keep) + sizes.block(width)
        if fixed + len(devices) * need > limit:
            return False
        return all(
            devices.count(d) * need <= 0.8 * torch.cuda.mem_get_info(d)[0]
            for d in devices
            if d.type == "cuda"
        )

    chunk = min(chunk, n)
    keep = fits(chunk, True)
    if not fits(1, keep):
        need = fixed + len(devices) * (sizes.solvers(False) + sizes.block(chunk))
        raise ConfigError(
            f"The memory limit is {readable(limit)}. The program holds {readable(resident)}; with "
            f"features, the solvers of {sizes.folds} folds, results and one chunk of {chunk} "
            f"neuroids on {len(devices)} device(s) it would hold about {readable(need)}.",
            "Raise memory_gib, "
            + ("leave out the predictions (keep_predictions=False), " if sizes.predictions else "")
            + "use fewer features, or encode the neuroids in parts.",
        )
    room = 1
    while fits(2 * room, keep) and room < 2**30:
        room *= 2
    step = room
    while step > 1:
        step //= 2
        if fits(room + step, keep):
            room += step
    width = room // chunk * chunk
    if room < chunk:
        width = room
        warn_narrow(chunk, room, limit)
    # A share for each device.
    share = -(-n // len(devices))
    if room >= chunk:
        share = -(-share // chunk) * chunk
    return Plan(min(width, share, n), keep, room)


def neuroid_chunk(responses: xr.Dataset) -> int:
    """Neuroids that are stored, and so are read, together."""
    v = responses["responses"]
    chunks = v.encoding.get("chunks")
    if not chunks or len(chunks) != v.ndim:
        return 1
    return int(chunks[v.dims.index("neuroid")])


def part_slice(n: int, chunk: int, part: tuple[int, int]) -> slice:
    """Neuroids of the k-th of m about equal parts, at the limits of chunks where they suffice.

    Parameters
    ----------
    n : int
        Neuroids.
    chunk : int
        Neuroids that are stored together.
    part : (int, int)
        k, from 1, and m.

    Raises
    ------
    ConfigError
        If there is no such part.
    """
    k, m = part
    if not 1 <= k <= m or m > n:
        raise ConfigError(f"There is no part {k} of {m} of {n} neuroids.")
    unit = chunk if -(-n // chunk) >= m else 1
    units = -(-n // unit)
    return slice((k - 1) * units // m * unit, min(k * units // m * unit, n))
