"""Maps come back from their files at the place they were written to."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.data import bids, cortex, maps
from brainalign.errors import ConfigError, SchemaError, UnknownNameError

AFFINE = np.array([[-2.0, 0.1, 0, 6], [0, 2, -0.2, -8], [0.3, 0, 2.5, -3], [0, 0, 0, 1]])


@pytest.fixture
def volume(tmp_path):
    """Responses read from a NIfTI image, and scores on their neuroids without attrs."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(5, 6, 7, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "b.nii.gz")
    mask = rng.random((5, 6, 7)) < 0.4
    ds = bids.read_betas(tmp_path / "b.nii.gz", pd.DataFrame({"stimulus_id": list("abca")}),
                         mask=mask)  # fmt: skip
    coords = {c: ds[c] for c in ds.coords if ds[c].dims == ("neuroid",)}
    n = ds.sizes["neuroid"]
    scores = xr.Dataset(
        {
            "r": ("neuroid", rng.uniform(-1, 1, n)),
            "r2": (("layer", "neuroid"), rng.uniform(-1, 1, (2, n))),
            "name": ("neuroid", ["x"] * n),
        },
        coords={**coords, "layer": ["a", "b"]},
    )
    return ds, scores, mask


def test_nifti_roundtrip(volume, tmp_path):
    ds, scores, mask = volume
    path = maps.write_nifti(scores, tmp_path / "r.nii.gz", "r", like=ds)
    image = nib.load(path)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    data = image.get_fdata()
    assert data.shape == (5, 6, 7)
    np.testing.assert_allclose(data[mask], scores["r"].values, atol=1e-6)
    assert np.isnan(data[~mask]).all()
    place = nib.affines.apply_affine(image.affine, np.argwhere(mask))
    np.testing.assert_allclose(place, np.column_stack([ds[a].values for a in "xyz"]), atol=1e-5)
    several = nib.load(
        maps.write_nifti(scores, tmp_path / "m.nii", ["r", "r2"], like=ds, fill=0)
    ).get_fdata()
    assert several.shape == (5, 6, 7, 3)
    np.testing.assert_allclose(several[mask][:, 1:].T, scores["r2"].values, atol=1e-6)
    assert (several[~mask] == 0).all()
    high = scores[["r"]] > 0.5
    again = bids.read_roi(maps.write_nifti(high, tmp_path / "k.nii.gz", "r", like=ds), ds)
    np.testing.assert_array_equal(again, scores["r"].values > 0.5)


def test_affine_is_found_from_places(volume, tmp_path):
    _, scores, _ = volume
    bare = scores.assign_attrs(volume_shape=[5, 6, 7])
    image = nib.load(maps.write_nifti(bare, tmp_path / "r.nii.gz", "r"))
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    with pytest.raises(SchemaError, match="No affine leads"):
        maps.write_nifti(bare.assign_coords(x=bare["x"] ** 2), tmp_path / "s.nii.gz", "r")
    with pytest.raises(SchemaError, match="shape of the volume"):
        maps.write_nifti(scores, tmp_path / "s.nii.gz", "r")
    with pytest.raises(SchemaError, match="affine is not known"):
        maps.write_nifti(bare.drop_vars("x"), tmp_path / "s.nii.gz", "r")
    assert not (tmp_path / "s.nii.gz").exists()


@given(st.integers(1, 400), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_gifti_roundtrip(tmp_path_factory, n, seed):
    folder = tmp_path_factory.mktemp("maps")
    where = cortex.neuroids(n, seed=seed)
    values = np.random.default_rng(seed).normal(size=n)
    ds = where.assign(r=("neuroid", values), q=("neuroid", values**2))
    found = maps.write_gifti(ds, folder / "scores", ["r", "q"])
    assert set(found) == set(where["hemisphere"].values.tolist())
    for side, path in found.items():
        image = nib.load(path)
        rows = where["hemisphere"].values == side
        vertex = where["vertex"].values[rows]
        assert [a.meta["Name"] for a in image.darrays] == ["r", "q"]
        assert path.name == f"scores_hemi-{side}.func.gii"
        data = image.darrays[0].data
        assert data.shape == (10242,) and np.isnan(data).sum() == 10242 - rows.sum()
        np.testing.assert_allclose(data[vertex], values[rows], rtol=1e-6)


def test_gifti_opens_in_nilearn(tmp_path):
    from nilearn.surface import load_surf_data

    ds = cortex.neuroids().assign(r=lambda d: ("neuroid", d["x"].values))
    path = maps.write_gifti(ds, tmp_path / "x", "r")["R"]
    np.testing.assert_allclose(load_surf_data(path), ds["x"].values[10242:], rtol=1e-5)


def test_cifti_roundtrip(volume, tmp_path):
    where = cortex.neuroids(300, seed=1).isel(neuroid=slice(None, None, -1))
    values = np.arange(300.0)
    path = maps.write_cifti(where.assign(r=("neuroid", values), z=("neuroid", -values)),
                            tmp_path / "s.dscalar.nii", ["r", "z"])  # fmt: skip
    image = nib.load(path)
    scalars, models = (image.header.get_axis(i) for i in (0, 1))
    assert scalars.name.tolist() == ["r", "z"] and image.shape == (2, 300)
    data = image.get_fdata()
    for name, part, model in models.iter_structures():
        side = "L" if name.endswith("LEFT") else "R"
        rows = where["hemisphere"].values == side
        expected = dict(zip(where["vertex"].values[rows], values[rows], strict=True))
        assert [expected[v] for v in model.vertex] == data[0, part].tolist()
        assert model.nvertices == {name: 10242}
    ds, scores, _ = volume
    image = nib.load(maps.write_cifti(scores, tmp_path / "v.dscalar.nii", "r", like=ds))
    model = image.header.get_axis(1)
    np.testing.assert_array_equal(model.voxel, np.column_stack([ds[a].values for a in "ijk"]))
    np.testing.assert_allclose(model.affine, AFFINE)
    np.testing.assert_allclose(image.get_fdata()[0], scores["r"].values, atol=1e-6)


def test_what_is_no_map_is_refused(volume, tmp_path):
    ds, scores, _ = volume
    with pytest.raises(UnknownNameError, match="Did you mean 'r2'"):
        maps.write_nifti(scores, tmp_path / "r.nii", "r22", like=ds)
    with pytest.raises(SchemaError, match="needs numbers"):
        maps.write_nifti(scores, tmp_path / "r.nii", "name", like=ds)
    with pytest.raises(ConfigError, match="must end in"):
        maps.write_nifti(scores, tmp_path / "r.img", "r", like=ds)
    with pytest.raises(ConfigError, match="dscalar"):
        maps.write_cifti(scores, tmp_path / "r.nii", "r", like=ds)
    with pytest.raises(SchemaError, match="several neuroids"):
        maps.write_nifti(scores.isel(neuroid=[0, 0, 1]), tmp_path / "r.nii", "r", like=ds)
    with pytest.raises(SchemaError, match="no coordinates hemisphere and vertex"):
        maps.write_gifti(scores, tmp_path / "r", "r")
    surface = cortex.neuroids(30).assign(r=("neuroid", np.ones(30)))
    with pytest.raises(SchemaError, match="no voxels"):
        maps.write_nifti(surface, tmp_path / "r.nii", "r")
    with pytest.raises(SchemaError, match="mesh is not known"):
        maps.write_gifti(surface.assign_attrs(space="T1w"), tmp_path / "r", "r")
    assert [p.name for p in tmp_path.iterdir()] == ["b.nii.gz"]
