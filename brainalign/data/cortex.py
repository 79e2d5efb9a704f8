"""The fsaverage5 cortex: vertices, geodesic distances, and patches where category areas lie.

The mesh ships with nilearn, so nothing is downloaded. The patches serve simulated subjects: they
stand at rounded centres of areas the literature reports, and are no atlas of any person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from brainalign.errors import ConfigError, UnknownNameError, near

__all__ = ["N_VERTICES", "ROIS", "Cortex", "Roi", "fsaverage5", "neuroids"]

N_VERTICES = 10242
"""Vertices of one hemisphere of fsaverage5."""


@dataclass(frozen=True)
class Roi:
    """A patch of cortex and what it responds to.

    Parameters
    ----------
    name : str
        The field's name of the area.
    category : str
        What it prefers: people, bodies, places, words, food, or "" for no category.
    centres : tuple of (x, y, z)
        Centres in mm in MNI space, rounded; x < 0 is left. The patch is made of all vertices
        within `radius` of one of them.
    radius : float
        Geodesic radius in mm.
    source : str
        Where the area was described.
    """

    name: str
    category: str
    centres: tuple[tuple[float, float, float], ...]
    radius: float
    source: str


ROIS: dict[str, Roi] = {
    roi.name: roi
    for roi in (
        Roi("V1", "", ((-9, -90, 0), (9, -90, 0)), 16, "Hinds et al. 2008, NeuroImage 39:1585"),
        Roi(
            "OFA",
            "people",
            ((-39, -79, -12), (39, -79, -12)),
            9,
            "Gauthier et al. 2000, J Cogn Neurosci 12:495",
        ),
        Roi(
            "FFA",
            "people",
            ((-39, -51, -19), (40, -51, -18)),
            11,
            "Kanwisher et al. 1997, J Neurosci 17:4302",
        ),
        Roi(
            "EBA",
            "bodies",
            ((-47, -72, 5), (48, -70, 4)),
            13,
            "Downing et al. 2001, Science 293:2470",
        ),
        Roi(
            "FBA",
            "bodies",
            ((-43, -42, -19), (43, -42, -19)),
            7,
            "Peelen & Downing 2005, J Neurophysiol 93:603",
        ),
        Roi(
            "OPA",
            "places",
            ((-34, -78, 20), (34, -78, 20)),
            11,
            "Dilks et al. 2013, J Neurosci 33:1331",
        ),
        Roi(
            "PPA",
            "places",
            ((-27, -45, -8), (27, -45, -8)),
            13,
            "Epstein & Kanwisher 1998, Nature 392:598",
        ),
        Roi(
            "RSC",
            "places",
            ((-16, -57, 14), (16, -57, 14)),
            11,
            "Epstein et al. 2007, J Neurosci 27:6141",
        ),
        Roi("VWFA", "words", ((-46, -57, -13),), 9, "Cohen et al. 2000, Brain 123:291"),
        Roi(
            "food",
            "food",
            ((-31, -60, -12), (31, -60, -12), (48, -62, -8)),
            9,
            "Jain et al. 2023, Commun Biol 6:175",
        ),
    )
}
"""Areas of the simulated subject, by name."""


@dataclass(frozen=True)
class Cortex:
    """Both hemispheres of fsaverage5, left first.

    Parameters
    ----------
    xyz : ndarray, shape (20484, 3)
        Mid-thickness coordinates in mm.
    white, pial : ndarray, shape (20484, 3)
        Inner and outer surface in mm.
    hemisphere : ndarray of str, shape (20484,)
        "L" or "R".
    vertex : ndarray of int, shape (20484,)
        Index within the hemisphere, 0 to 10241.
    roi : ndarray of str, shape (20484,)
        Name of the patch, "" outside.
    medial_wall : ndarray of bool, shape (20484,)
        Vertices that are not cortex (no thickness).
    edges : csr_array, shape (20484, 20484)
        Length in mm of every mesh edge; no edge joins the hemispheres.
    """

    xyz: NDArray[np.float64]
    white: NDArray[np.float64]
    pial: NDArray[np.float64]
    hemisphere: NDArray[np.str_]
    vertex: NDArray[np.int64]
    roi: NDArray[np.str_]
    medial_wall: NDArray[np.bool_]
    edges: csr_array

    def nearest(self, centre: ArrayLike) -> int:
        """Return the row of the vertex nearest to a point (mm), on the side of its x."""
        point = np.asarray(centre, dtype=np.float64)
        side = self.hemisphere == ("L" if point[0] < 0 else "R")
        distance = np.linalg.norm(self.xyz - point, axis=1)
        return int(np.argmin(np.where(side, distance, np.inf)))

    def within(self, rows: Sequence[int] | NDArray[np.integer], limit: float) -> csr_array:
        """Return geodesic distances (mm) from `rows` to all vertices nearer than `limit`.

        The distance of a vertex to itself is stored as 0.
        """
        from scipy.sparse.csgraph import dijkstra

        rows = np.asarray(rows)
        parts: list[tuple[NDArray[np.integer], ...]] = []
        for start in range(0, len(rows), 512):
            found = dijkstra(self.edges, indices=rows[start : start + 512], limit=limit)
            r, c = np.nonzero(np.isfinite(found))
            parts.append((r + start, c, found[r, c]))
        r, c, d = (np.concatenate(p) for p in zip(*parts, strict=True))
        return csr_array((d, (r, c)), shape=(len(rows), len(self.vertex)))


@lru_cache(maxsize=1)
def fsaverage5() -> Cortex:
    """Return the fsaverage5 cortex with the patches of `ROIS`.

    The mesh is FreeSurfer's average of 40 brains, resampled to 10,242 vertices a hemisphere
    (Fischl et al. 1999, Hum Brain Mapp 8:272), as nilearn ships it. Where two patches overlap, a
    vertex belongs to the one whose centre is nearer in proportion to its radius.
    """
    from nilearn.datasets import load_fsaverage, load_fsaverage_data

    mesh = load_fsaverage("fsaverage5")
    thickness = load_fsaverage_data("fsaverage5", data_type="thickness").data.parts
    sides = ("left", "right")
    white, pial = (
        np.concatenate(
            [np.asarray(mesh[layer].parts[s].coordinates, dtype=np.float64) for s in sides]
        )
        for layer in ("white_matter", "pial")
    )
    xyz = (white + pial) / 2
    faces = np.concatenate(
        [mesh["pial"].parts[s].faces.astype(np.int64) + i * N_VERTICES for i, s in enumerate(sides)]
    )
    pairs = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    length = np.linalg.norm(xyz[pairs[:, 0]] - xyz[pairs[:, 1]], axis=1)
    n = 2 * N_VERTICES
    half = csr_array((length, (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    bare = Cortex(
        xyz=xyz,
        white=white,
        pial=pial,
        hemisphere=np.repeat(["L", "R"], N_VERTICES),
        vertex=np.tile(np.arange(N_VERTICES), 2),
        roi=np.full(n, "", dtype="<U8"),
        medial_wall=np.concatenate([np.asarray(thickness[s]).ravel() < 0.1 for s in sides]),
        edges=csr_array(half + half.T),
    )
    nearest = np.full(n, np.inf)
    for roi in ROIS.values():
        for centre in roi.centres:
            found = bare.within([bare.nearest(centre)], roi.radius)
            relative = found.data / roi.radius
            better = relative < nearest[found.indices]
            nearest[found.indices[better]] = relative[better]
            bare.roi[found.indices[better]] = roi.name
    for array in (bare.xyz, bare.white, bare.pial, bare.roi, bare.vertex, bare.medial_wall):
        array.setflags(write=False)
    return bare


def neuroids(
    n: int | None = None, *, rois: Sequence[str] | Mapping[str, str] | None = None, seed: int = 0
) -> xr.Dataset:
    """Neuroids on fsaverage5: all vertices, some of them, or several depths of each.

    Parameters
    ----------
    n : int, optional
        Number of neuroids. None: all 20,484 vertices. Fewer: half of them (or as many as there
        are) from ROIs, the rest from elsewhere in cortex. More: the whole mesh again at further
        depths between white matter and pial surface.
    rois : sequence of str, optional
        ROIs to keep the name of; others count as the rest of cortex. Default: all of `ROIS`.
    seed : int
        Seed of the choice.

    Returns
    -------
    xarray.Dataset
        Only coordinates on ``neuroid``: neuroid_id, roi, hemisphere, vertex, x, y, z (mm),
        medial_wall.

    Raises
    ------
    UnknownNameError
        If an ROI is not known.
    ConfigError
        If `n` is not positive.
    """
    cortex = fsaverage5()
    total = len(cortex.vertex)
    if n is not None and n < 1:
        raise ConfigError(f"The number of neuroids must be at least 1; got {n}.")
    for name in rois or ():
        if name not in ROIS:
            raise UnknownNameError(f"There is no ROI {name!r}.{near(name, ROIS)}",
                                   f"Known: {', '.join(ROIS)}.")  # fmt: skip
    roi = cortex.roi if rois is None else np.where(np.isin(cortex.roi, list(rois)), cortex.roi, "")
    if n is None or n >= total:
        rows = np.arange(n or total) % total
    else:
        rng = np.random.default_rng(seed)
        inside = rng.permutation(np.flatnonzero(roi != ""))
        outside = rng.permutation(np.flatnonzero((roi == "") & ~cortex.medial_wall))
        wall = rng.permutation(np.flatnonzero(cortex.medial_wall & (roi == "")))
        n_inside = max(min(n // 2, len(inside)), n - len(outside) - len(wall))
        pool = np.concatenate([inside[:n_inside], outside, wall, inside[n_inside:]])
        rows = np.sort(pool[:n])
    depth = np.arange(len(rows)) // total if n is not None and n > total else np.zeros(len(rows))
    levels = int(depth.max()) + 1
    # One depth is the middle of the cortex; more are spread evenly from white matter to pial.
    fraction = ((depth + 0.5) / levels)[:, None]
    xyz = (1 - fraction) * cortex.white[rows] + fraction * cortex.pial[rows]
    side, vertex = cortex.hemisphere[rows], cortex.vertex[rows]
    ids = np.char.add(side, np.char.zfill(vertex.astype(str), 5))
    if levels > 1:
        ids = np.char.add(ids, np.char.add("d", depth.astype(int).astype(str)))
    coords = {
        "neuroid_id": ids,
        "roi": roi[rows].astype(str),
        "hemisphere": side,
        "vertex": vertex,
        "x": xyz[:, 0],
        "y": xyz[:, 1],
        "z": xyz[:, 2],
        "medial_wall": cortex.medial_wall[rows],
    }
    ds = xr.Dataset(coords={k: ("neuroid", v) for k, v in coords.items()})
    for axis in "xyz":
        ds[axis].attrs["units"] = "mm"
    ds.attrs["space"] = "fsaverage5"
    return ds
