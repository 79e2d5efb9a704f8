"""Mean scores of ROIs in bootstrap samples, as sums that add up over blocks of neuroids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.encoding.partition import JOINED, shares_of
from brainalign.errors import SchemaError, UnknownNameError, near
from brainalign.evaluation.significance import bootstrap_counts, bootstrap_r

__all__ = ["ALL_ROIS", "NESTED", "RoiSums", "roi_members"]

#: Name of the row in which each neuroid's layer is chosen in the training folds.
NESTED = "chosen layer"
#: Name of all neuroids that lie in some ROI, taken together.
ALL_ROIS = "all ROIs"
#: What is resampled, and what is averaged over the neuroids of a ROI.
OVER = ("stimuli", "both")
MEASURES = ("r", "normalised")
_NEUROIDS_AT_ONCE = 512


def roi_members(neuroids: xr.Dataset, rois: Sequence[str] | None = None) -> dict[str, NDArray]:
    """Return the indices of the neuroids of each ROI, from the ``roi`` coordinate and ``roi_mask``.

    Parameters
    ----------
    neuroids : Dataset
        Any Dataset with the neuroids' coordinates.
    rois : sequence of str, optional
        Which, in order; by default all, in order of name. ``"all ROIs"`` stands for every neuroid
        that lies in one, ``"all"`` for every neuroid; without any ROI this is the default.

    Raises
    ------
    UnknownNameError
        For a ROI that no neuroid has.
    SchemaError
        If ROI masks have no names.
    """
    names = neuroids["roi"].values.astype(str)
    members = {r: np.flatnonzero(names == r) for r in sorted(set(names.tolist()) - {""})}
    if "roi_mask" in neuroids.variables:
        if "roi_name" not in neuroids.coords:
            raise SchemaError("'roi_mask' has no coordinate 'roi_name' with the ROIs' names.")
        for name in neuroids["roi_name"].values.astype(str).tolist():
            mask = neuroids["roi_mask"].sel(roi_name=name).values
            if mask.any():
                members[name] = np.flatnonzero(mask)
    everything = np.arange(len(names))
    if rois is None:
        return members or {"all": everything}
    known = {"all": everything, **members}
    if members:
        known[ALL_ROIS] = np.unique(np.concatenate(list(members.values())))
    for name in rois:
        if name not in known:
            raise UnknownNameError(f"There is no ROI {name!r}.{near(name, known)}")
    return {name: known[name] for name in rois}


class RoiSums:
    r"""Sums over the neuroids of every ROI, in every bootstrap sample, of r and of its share.

    .. math:: total_{s, ROI} = \sum_{v \in ROI} w_{sv} \, x_{sv}, \qquad
              count_{s, ROI} = \sum_{v \in ROI} w_{sv}

    with x a neuroid's r in sample s, or :math:`r |r|` over its noise ceiling, and w = 1 where
    stimuli are resampled, or a Poisson(1) number where neuroids are too. Sums of disjoint neuroids
    add up, and their quotient is the mean of the ROI. Samples depend on nothing but the stimuli,
    the neuroids' ids, their number and the seed: they are the same for all models.

    Parameters
    ----------
    rows : sequence of str
        Layers, and `NESTED`.
    members : mapping of str to array of int
        Neuroids of each ROI.
    stimulus_id : array of str, shape (n_tested,)
        Stimulus of each tested row; rows of one are drawn together.
    neuroid_id : array of str, shape (n_neuroids,)
        Their names.
    ceiling : ndarray, shape (n_neuroids,)
        Noise ceilings; NaN for neuroids that get no share.
    n_bootstrap : int
        Samples; with 0 nothing is computed.
    seed : int
        Seed.
    device : str
        As in `brainalign.evaluation.bootstrap_r`.

    References
    ----------
    Hanley & MacGibbon (2006), Computer Methods and Programs in Biomedicine 83, 57-62 (Poisson
    weights).
    """

    def __init__(
        self,
        rows: Sequence[str],
        members: Mapping[str, NDArray[np.intp]],
        stimulus_id: NDArray[np.str_],
        neuroid_id: NDArray[np.str_],
        ceiling: NDArray[np.float64],
        *,
        n_bootstrap: int,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.rows, self.rois = list(rows), list(members)
        self.attrs = {"n_bootstrap": n_bootstrap, "seed": seed}
        self._n, self._device, self._ceiling = n_bootstrap, device, ceiling
        shape = (len(OVER), len(MEASURES), n_bootstrap, len(self.rows), len(self.rois))
        self._total, self._count = np.zeros(shape), np.zeros(shape)
        self._explained: dict[tuple[str, ...], NDArray[np.float64]] = {}
        self._defined = np.zeros((n_bootstrap, len(self.rois)))
        if not n_bootstrap:
            return
        inside = np.zeros((len(neuroid_id), len(self.rois)))
        for j, index in enumerate(members.values()):
            inside[index, j] = 1
        self._used = np.flatnonzero(inside.any(axis=1))
        self._inside = inside[self._used]
        self._draws = bootstrap_counts(len(stimulus_id), n_bootstrap, groups=stimulus_id, seed=seed)
        self._weights = _poisson(neuroid_id[self._used], n_bootstrap, seed)

    def add(self, row: int, measured: NDArray[np.float32], predicted: NDArray[np.float32]) -> None:
        """Add neuroids' deviations (n_tested, n_neuroids), as predicted by one of the rows."""
        if not self._n:
            return
        for start in range(0, len(self._used), _NEUROIDS_AT_ONCE):
            here = slice(start, start + _NEUROIDS_AT_ONCE)
            part = self._used[here]
            r = bootstrap_r(measured[:, part], predicted[:, part], self._draws, device=self._device)
            inside, weights = self._inside[here], self._weights[here].T
            for m, x in enumerate((r, r * np.abs(r) / self._ceiling[part])):
                defined = np.isfinite(x)
                filled = np.where(defined, x, 0.0)
                self._total[0, m, :, row] += filled @ inside
                self._count[0, m, :, row] += defined @ inside
                self._total[1, m, :, row] += (filled * weights) @ inside
                self._count[1, m, :, row] += (defined * weights) @ inside

    def add_explained(
        self,
        name: tuple[str, ...],
        measured: NDArray[np.float32],
        own: NDArray[np.float32],
        whole: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the variance that a term `own` of the predictions `whole` explains.

        See `brainalign.evaluation.product_measure`; that of the whole itself is R^2.
        """
        if not self._n:
            return
        total = np.zeros((self._n, len(self.rois)))
        for start in range(0, len(self._used), _NEUROIDS_AT_ONCE):
            here = slice(start, start + _NEUROIDS_AT_ONCE)
            part = self._used[here]
            y, f = (a[:, part].astype(np.float64) for a in (measured, own))
            w = f if whole is None else whole[:, part].astype(np.float64)
            square = self._draws @ (y * y)
            with np.errstate(invalid="ignore", divide="ignore"):
                x = np.where(square > 0, self._draws @ (f * (2 * y - w)) / square, 0.0)
            total += x @ self._inside[here]
            if not self._explained:
                self._defined += (square > 0) @ self._inside[here]
        self._explained[name] = total

    def dataset(self, method: str | None = None) -> xr.Dataset:
        """Return ``total`` and ``count`` (over, measure, sample, layer, roi).

        With a method of partition, also ``share_total`` (sample, part, roi) and ``share_count``
        (sample, roi).
        """
        dims = ("over", "measure", "sample", "layer", "roi")
        out = xr.Dataset(
            {"total": (dims, self._total), "count": (dims, self._count)},
            coords={"over": list(OVER), "measure": list(MEASURES), "layer": self.rows,
                    "roi": self.rois},
            attrs=self.attrs,
        )  # fmt: skip
        if method is None or not self._explained:
            return out
        shares = shares_of(method, self._explained)
        return out.assign(
            share_total=(("sample", "part", "roi"), np.stack(list(shares.values()), axis=1)),
            share_count=(("sample", "roi"), self._defined),
        ).assign_coords(part=[JOINED.join(part) for part in shares])


def _poisson(neuroid_id: NDArray[np.str_], n: int, seed: int) -> NDArray[np.uint8]:
    """Poisson(1) numbers (n_neuroids, n) that depend on the seed and each neuroid's id alone."""
    out = np.empty((len(neuroid_id), n), dtype=np.uint8)
    for i, name in enumerate(neuroid_id.tolist()):
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        out[i] = np.random.default_rng([seed, key]).poisson(1.0, n)
    return out
