"""Maps over neuroids as NIfTI, GIfTI and CIFTI files that any viewer opens.

Where a neuroid stands comes from its coordinates (i, j, k, or hemisphere and vertex) and from the
attrs that the readers leave on responses: ``affine`` and ``volume_shape``, or ``n_vertices``.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data import store
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near

__all__ = ["write_cifti", "write_gifti", "write_nifti"]

_MESHES = {"fsaverage": 163842, "fsaverage6": 40962, "fsaverage5": 10242, "fsLR": 32492}


def write_nifti(
    ds: xr.Dataset,
    path: str | Path,
    variables: str | Sequence[str],
    *,
    like: xr.Dataset | None = None,
    fill: float = np.nan,
) -> Path:
    """Write maps over voxels as one NIfTI image.

    Parameters
    ----------
    ds : xarray.Dataset
        Scores or anything else with variables on ``neuroid`` and coordinates i, j, k.
    path : path
        Ends in ``.nii`` or ``.nii.gz``.
    variables : str or sequence of str
        Which variables. One of dims (neuroid,) gives a 3-D image; more, or one of dims (layer,
        neuroid), a 4-D one with a map per volume, in order.
    like : xarray.Dataset, optional
        Responses whose attrs hold ``affine`` and ``volume_shape``, where `ds` has lost them. The
        affine is otherwise found from i, j, k and x, y, z.
    fill : float
        Value outside the neuroids.

    Returns
    -------
    Path
        The file, float32.

    Raises
    ------
    SchemaError
        If neuroids have no voxel, two share one, or the grid is not known.
    UnknownNameError
        If there is no such variable.
    """
    import nibabel as nib

    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"{path.name!r} must end in .nii or .nii.gz.")
    maps, names = _maps(ds, variables)
    affine, shape, ijk = _voxels(ds, like)
    data = np.full((*shape, len(maps)), fill, dtype=np.float32)
    data[tuple(ijk.T)] = maps.T
    image = nib.Nifti1Image(data[..., 0] if len(maps) == 1 else data, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = ", ".join(names)[:79].encode()
    return _save(image, path)


def write_gifti(
    ds: xr.Dataset,
    stem: str | Path,
    variables: str | Sequence[str],
    *,
    like: xr.Dataset | None = None,
    fill: float = np.nan,
) -> dict[str, Path]:
    """Write maps over surface vertices as one GIfTI file per hemisphere.

    Parameters
    ----------
    ds : xarray.Dataset
        Variables on ``neuroid`` with coordinates hemisphere and vertex.
    stem : path
        ``maps`` gives ``maps_hemi-L.func.gii`` and ``maps_hemi-R.func.gii``.
    variables : str or sequence of str
        Which variables; each map is one named data array.
    like : xarray.Dataset, optional
        Responses whose attrs hold ``n_vertices`` or ``space``, where `ds` has lost them.
    fill : float
        Value at vertices without a neuroid.

    Returns
    -------
    dict of str to Path
        By hemisphere; only those that have neuroids.

    Raises
    ------
    SchemaError
        If neuroids have no vertex, two share one, or the size of the mesh is not known.
    UnknownNameError
        If there is no such variable.
    """
    import nibabel as nib

    maps, names = _maps(ds, variables)
    written = {}
    for side, (size, rows, vertex) in _vertices(ds, like).items():
        data = np.full((len(maps), size), fill, dtype=np.float32)
        data[:, vertex] = maps[:, rows]
        arrays = [
            nib.gifti.GiftiDataArray(
                values,
                intent="NIFTI_INTENT_NONE",
                datatype="NIFTI_TYPE_FLOAT32",
                meta=nib.gifti.GiftiMetaData(Name=name),
            )
            for values, name in zip(data, names, strict=True)
        ]
        structure = {"L": "CortexLeft", "R": "CortexRight"}[side]
        meta = nib.gifti.GiftiMetaData(AnatomicalStructurePrimary=structure)
        path = Path(f"{stem}_hemi-{side}.func.gii")
        written[side] = _save(nib.GiftiImage(meta=meta, darrays=arrays), path)
    return written


def write_cifti(
    ds: xr.Dataset,
    path: str | Path,
    variables: str | Sequence[str],
    *,
    like: xr.Dataset | None = None,
) -> Path:
    """Write maps over surface vertices or voxels as one CIFTI-2 file of scalars.

    Parameters
    ----------
    ds : xarray.Dataset
        Variables on ``neuroid``.
    path : path
        Ends in ``.dscalar.nii``.
    variables : str or sequence of str
        Which variables; each map is one named row.
    like : xarray.Dataset, optional
        As in `write_nifti` and `write_gifti`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    SchemaError
        As in `write_nifti` and `write_gifti`.
    """
    import nibabel as nib
    from nibabel import cifti2

    path = Path(path)
    if not path.name.endswith(".dscalar.nii"):
        raise ConfigError(f"{path.name!r} must end in .dscalar.nii.")
    maps, names = _maps(ds, variables)
    if "vertex" in ds.coords:
        axis, order = None, []
        for side, (size, rows, vertex) in _vertices(ds, like).items():
            by_vertex = np.argsort(vertex)
            structure = {"L": "CORTEX_LEFT", "R": "CORTEX_RIGHT"}[side]
            part = cifti2.BrainModelAxis.from_surface(vertex[by_vertex], size, structure)
            axis = part if axis is None else axis + part
            order.append(rows[by_vertex])
        columns = np.concatenate(order)
    else:
        affine, shape, ijk = _voxels(ds, like)
        columns = np.arange(len(ijk))
        axis = cifti2.BrainModelAxis(
            "CIFTI_STRUCTURE_OTHER", voxel=ijk, affine=affine, volume_shape=shape
        )
    header = cifti2.Cifti2Header.from_axes((cifti2.ScalarAxis(names), axis))
    image = nib.Cifti2Image(maps[:, columns], header)
    image.update_headers()
    image.nifti_header.set_intent("NIFTI_INTENT_CONNECTIVITY_DENSE_SCALARS")
    return _save(image, path)


def _maps(ds: xr.Dataset, variables: str | Sequence[str]) -> tuple[NDArray, list[str]]:
    """Return all maps, shape (map, neuroid), and their names."""
    wanted = [variables] if isinstance(variables, str) else list(variables)
    if not wanted:
        raise ConfigError("No variable was named.")
    maps, names = [], []
    for name in wanted:
        if name not in ds.variables:
            raise UnknownNameError(
                f"There is no variable {name!r}.{near(name, map(str, ds.data_vars))}"
            )
        v = ds[name]
        if "neuroid" not in v.dims or v.ndim > 2:
            raise SchemaError(f"{name!r} has dimensions {v.dims}; a map is on 'neuroid'.")
        if v.dtype.kind not in "fiub":
            raise SchemaError(f"{name!r} is {v.dtype}; a map needs numbers.")
        if v.ndim == 1:
            maps.append(v.values[None])
            names.append(name)
            continue
        other = next(d for d in v.dims if d != "neuroid")
        labels = ds[other].values if other in ds.coords else np.arange(v.sizes[other])
        maps.append(v.transpose(other, "neuroid").values)
        names += [f"{name} {label}" for label in labels.tolist()]
    return np.concatenate(maps).astype(np.float32), names


def _attr(name: str, ds: xr.Dataset, like: xr.Dataset | None) -> Any:
    for source in (ds, like):
        if source is not None and name in source.attrs and np.size(source.attrs[name]):
            return source.attrs[name]
    return None


def _voxels(ds: xr.Dataset, like: xr.Dataset | None) -> tuple[NDArray, tuple[int, ...], NDArray]:
    if not {"i", "j", "k"} <= set(ds.coords):
        raise SchemaError("Neuroids have no coordinates i, j, k: they are no voxels.")
    ijk = np.column_stack([ds[a].values for a in "ijk"]).astype(int)
    _once(ijk, "voxel")
    shape = _attr("volume_shape", ds, like)
    if shape is None:
        raise SchemaError(
            "The shape of the volume is not known.",
            "Pass the responses as like=, or set attrs['volume_shape'].",
        )
    size = tuple(int(n) for n in shape)
    if ijk.min() < 0 or (ijk >= size).any():
        raise SchemaError(f"Voxels run to {tuple(ijk.max(axis=0).tolist())} in a volume of {size}.")
    found = _attr("affine", ds, like)
    if found is not None:
        return np.reshape(np.asarray(found, dtype=float), (4, 4)), size, ijk
    if not {"x", "y", "z"} <= set(ds.coords):
        raise SchemaError(
            "The affine is not known.", "Pass the responses as like=, or set attrs['affine']."
        )
    xyz = np.column_stack([ds[a].values for a in "xyz"])
    design = np.column_stack([ijk, np.ones(len(ijk))])
    solved, _, rank, _ = np.linalg.lstsq(design, xyz, rcond=None)
    if rank < 4 or np.abs(design @ solved - xyz).max() > 1e-3:
        raise SchemaError(
            "No affine leads from i, j, k to x, y, z of these neuroids.",
            "Pass the responses as like=.",
        )
    affine = np.eye(4)
    affine[:3] = solved.T
    return affine, size, ijk


def _vertices(
    ds: xr.Dataset, like: xr.Dataset | None
) -> dict[str, tuple[int, NDArray[np.intp], NDArray[np.intp]]]:
    """Return mesh size, rows of the Dataset and vertices of each hemisphere that has some."""
    if "vertex" not in ds.coords or "hemisphere" not in ds.coords:
        raise SchemaError("Neuroids have no coordinates hemisphere and vertex.")
    side = ds["hemisphere"].values.astype(str)
    if not np.isin(side, ["L", "R"]).all():
        raise SchemaError(f"{int((~np.isin(side, ['L', 'R'])).sum())} neuroids have no hemisphere.")
    sizes = _attr("n_vertices", ds, like)
    space = str(_attr("space", ds, like) or "")
    if sizes is None:
        if space not in _MESHES:
            raise SchemaError(
                f"The mesh is not known (space {space!r}).",
                "Pass the responses as like=, or set attrs['n_vertices'] to left and right.",
            )
        sizes = (_MESHES[space], _MESHES[space])
    found = {}
    for number, name in enumerate("LR"):
        rows = np.flatnonzero(side == name)
        if len(rows) == 0:
            continue
        vertex = ds["vertex"].values[rows].astype(np.intp)
        size = int(np.ravel(sizes)[number])
        _once(vertex[:, None], f"vertex of hemisphere {name}")
        if vertex.min() < 0 or vertex.max() >= size:
            raise SchemaError(f"Vertex {vertex.max()} is not on a mesh of {size} vertices.")
        found[name] = (size, rows, vertex)
    return found


def _once(places: NDArray, what: str) -> None:
    unique, counts = np.unique(places, axis=0, return_counts=True)
    if (counts > 1).any():
        raise SchemaError(
            f"{int((counts > 1).sum())} places have several neuroids (first: {what} "
            f"{unique[counts > 1][0].tolist()}).",
            "Average them first: a map has one value per place.",
        )


def _save(image: Any, path: Path) -> Path:
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    with store.atomic_file(path) as made:
        made.write_bytes(content)
    return path
