"""Derivatives read as they were written, and refused, with both names, where they do not fit."""

import json
import logging

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainalign.data import bids, maps, store
from brainalign.data.schema import validate
from brainalign.data.simulate import simulate_timeseries
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError

SHAPE = (5, 6, 4)
AFFINE = np.array([[-2.0, 0, 0, 6], [0, 2, 0, -8], [0, 0, 2.5, -3], [0, 0, 0, 1]])


def save(data, path, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def save_gifti(data, path, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.atleast_2d(data)
    image = nib.GiftiImage(
        darrays=[nib.gifti.GiftiDataArray(c, intent="NIFTI_INTENT_LABEL" if names else "none")
                 for c in columns]
    )  # fmt: skip
    if names:
        for key, name in names.items():
            label = nib.gifti.GiftiLabel(key)
            label.label = name
            image.labeltable.labels.append(label)
    nib.save(image, path)
    return path


def save_table(path, stimuli, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame({"onset": np.arange(len(stimuli)) * 4.0, "duration": 2.0,
                          "trial_type": "image", "stimulus_id": stimuli, **columns})  # fmt: skip
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


@pytest.fixture
def tree(tmp_path):
    """Two sessions of two runs of betas, a brain mask, tables; returns (root, betas)."""
    rng = np.random.default_rng(0)
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 1:5, 1:3] = 1
    stem = "sub-01_ses-{}_task-images_run-{}"
    stimuli = [["a", "b", "c"], ["b", "c", "d"], ["a", "c", "d"], ["d", "a", "b"]]
    betas = []
    for i, (ses, run) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
        folder = tmp_path / "derivatives" / "sub-01" / f"ses-{ses}" / "func"
        name = stem.format(ses, run)
        data = rng.normal(size=(*SHAPE, 3)).astype(np.float32) * mask[..., None]
        betas.append(data)
        save(data, folder / f"{name}_space-T1w_desc-glm_betas.nii.gz")
        save(mask, folder / f"{name}_space-T1w_desc-brain_mask.nii.gz")
        save_table(folder / f"{name}_trials.tsv", stimuli[i])
    return tmp_path / "derivatives", np.concatenate(betas, axis=-1), mask.astype(bool)


def test_beta_series_of_a_derivatives_folder(tree):
    root, betas, mask = tree
    ds = validate(bids.read_derivatives(root, "01"), "responses")
    assert ds["responses"].shape == (12, mask.sum())
    np.testing.assert_array_equal(ds["responses"].values, betas[mask].T)
    i, j, k = (ds[a].values for a in "ijk")
    np.testing.assert_allclose(ds["x"].values, 6 - 2 * i)
    np.testing.assert_allclose(ds["z"].values, -3 + 2.5 * k)
    assert mask[i, j, k].all()
    assert ds["stimulus_id"].values.tolist() == list("abcbcdacddab")
    assert ds["repetition"].values.tolist() == [1, 1, 1, 2, 2, 1, 2, 3, 2, 3, 3, 3]
    assert ds["session"].values.tolist() == [1] * 6 + [2] * 6
    assert ds["run"].values.tolist() == [1, 1, 1, 2, 2, 2] * 2
    assert ds.attrs["space"] == "T1w" and set(ds["subject"].values) == {"01"}
    assert set(ds["hemisphere"].values) == {""}
    one = bids.read_derivatives(root, "sub-01", ses="2", run="1", mask=None)
    assert one["responses"].shape == (3, mask.sum())


def test_one_image_per_trial(tree, tmp_path):
    _, betas, mask = tree
    files = [save(betas[..., i], tmp_path / f"beta_{i:04d}.nii") for i in range(12)]
    table = pd.DataFrame({"stimulus_id": list("abcbcdacddab")})
    ds = bids.read_betas(files, table, mask=mask)
    np.testing.assert_array_equal(ds["responses"].values, betas[mask].T)
    assert set(ds["run"].values) == {1}


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_what_was_read_is_stored_with_its_grid(tree, tmp_path, suffix):
    root, _, mask = tree
    ds = bids.add_rois(bids.read_derivatives(root, "01"), {"all": np.ones(mask.sum(), bool)})
    read = store.read(store.write(ds, tmp_path / f"r{suffix}", "responses"), "responses")
    image = nib.load(maps.write_nifti(read.assign(n=read["roi_mask"][:, 0] * 1.0),
                                      tmp_path / "n.nii.gz", "n", fill=0))  # fmt: skip
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_array_equal(image.get_fdata() > 0, mask)


def test_runs_are_found_in_natural_order_with_their_tables(tree):
    root, _, _ = tree
    for run in ("10", "9"):
        name = f"sub-01_ses-1_task-images_run-{run}"
        folder = root / "sub-01" / "ses-1" / "func"
        save(np.ones((*SHAPE, 1), np.float32), folder / f"{name}_space-T1w_desc-glm_betas.nii.gz")
    runs = bids.find_runs(root, "01", ses="1")
    assert [r.entities["run"] for r in runs] == ["1", "2", "9", "10"]
    assert runs[0].table.name == "sub-01_ses-1_task-images_run-1_trials.tsv"
    assert runs[-1].table is None
    with pytest.raises(UnavailableError, match=r"2 of 6 runs have no table: looked for _trials"):
        bids.read_derivatives(root, "01")


def test_nothing_found_says_what_was_looked_for(tree):
    root, _, _ = tree
    with pytest.raises(UnavailableError, match=r"sub-02_\*.*there are subjects 01.*Did you mean"):
        bids.find_runs(root, "02")
    with pytest.raises(UnavailableError, match=r"space-MNI.*there are sub-01_ses-1"):
        bids.find_runs(root, "01", space="MNI152NLin2009cAsym")
    with pytest.raises(UnavailableError, match=r"_\(bold\)"):
        bids.find_runs(root, "01", suffix="bold")
    with pytest.raises(UnavailableError, match="no folder"):
        bids.find_runs(root / "none", "01")
    folder = root / "sub-01" / "ses-1" / "func"
    save(np.ones((*SHAPE, 3), np.float32),
         folder / "sub-01_ses-1_task-images_run-1_space-MNI_desc-glm_betas.nii.gz")  # fmt: skip
    with pytest.raises(ConfigError, match=r"come with space 'MNI', 'T1w'.*Choose one with space="):
        bids.find_runs(root, "01")


def test_grids_that_differ_are_refused_by_name(tmp_path):
    data = np.ones((*SHAPE, 2), np.float32) * np.arange(2)
    a = save(data, tmp_path / "a.nii.gz")
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.5
    b = save(data, tmp_path / "b.nii.gz", shifted)
    c = save(data[1:], tmp_path / "c.nii.gz")
    table = pd.DataFrame({"stimulus_id": list("abcd")})
    with pytest.raises(SchemaError, match=r"b\.nii\.gz and a\.nii\.gz have diff.*0\.5"):
        bids.read_betas([a, b], table)
    with pytest.raises(SchemaError, match=r"c\.nii\.gz has shape \(4, 6, 4\), a\.nii\.gz has \(5"):
        bids.read_betas([a, c], table)
    mask = save(np.ones(SHAPE, np.uint8), tmp_path / "mask.nii.gz", shifted)
    with pytest.raises(SchemaError, match=r"mask\.nii\.gz and a\.nii\.gz have different affines"):
        bids.read_betas(a, table[:2], mask=mask)
    empty = save(np.zeros(SHAPE, np.uint8), tmp_path / "empty.nii.gz")
    with pytest.raises(SchemaError, match="no neuroid"):
        bids.read_betas(a, table[:2], mask=empty)
    with pytest.raises(UnavailableError, match=r"no aa\.nii\.gz.*Did you mean 'a\.nii\.gz'"):
        bids.read_betas(tmp_path / "aa.nii.gz", table)
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    with pytest.raises(SchemaError, match="no image that can be read"):
        bids.read_betas(tmp_path / "bad.nii.gz", table)


def test_rows_must_match_volumes(tmp_path):
    image = save(np.random.default_rng(0).normal(size=(*SHAPE, 3)), tmp_path / "x.nii.gz")
    with pytest.raises(
        SchemaError, match=r"x\.nii\.gz has 3 volumes, but t\.tsv has 2 rows.*1 more"
    ):
        bids.read_betas(image, save_table(tmp_path / "t.tsv", ["a", None, "b"]))
    with pytest.raises(UnknownNameError, match="Did you mean 'stimulus_id'"):
        bids.read_betas(image, tmp_path / "t.tsv", stimulus_column="stimulus_idd")
    with pytest.raises(SchemaError, match="stimulus_column="):
        bids.read_betas(image, pd.DataFrame({"picture": list("abc")}))
    with pytest.raises(SchemaError, match="2 tables for 1 images"):
        bids.read_betas(image, [pd.DataFrame({"stimulus_id": ["a"]})] * 2)
    table = save_table(tmp_path / "u.tsv", ["a", None, "b", "a"], stim_file=["1", "x", "2", "1"],
                       run=["run-2", "run-2", "run-3", "run-3"], session="ses-imagery")  # fmt: skip
    ds = bids.read_betas(image, table, subject="7")
    assert ds["stimulus_id"].values.tolist() == ["a", "b", "a"]
    assert ds["run"].values.tolist() == [2, 3, 3] and set(ds["session"].values) == {1}
    assert ds["subject"].values[0] == "7"
    with pytest.raises(SchemaError, match="has 4 rows"):
        bids.read_betas(image, table, stimulus_column="stim_file")


def test_nan_and_constant_voxels(tmp_path, caplog):
    data = np.random.default_rng(0).normal(size=(*SHAPE, 4)).astype(np.float32)
    data[0, 0, 0, 2] = np.nan
    data[1, 1, 1] = 5.0
    data[2, 2, 2] = 0.0
    image = save(data, tmp_path / "x.nii.gz")
    table = pd.DataFrame({"stimulus_id": list("abca")})
    message = r"Of 119 neuroids, 1 with NaN or infinite values and 1 constant \(first: 0_0_0\)"
    with pytest.raises(SchemaError, match=message):
        bids.read_betas(image, table)
    with caplog.at_level(logging.WARNING):
        ds = bids.read_betas(image, table, bad="exclude")
    assert ds.sizes["neuroid"] == 117
    assert (ds.attrs["excluded_nan"], ds.attrs["excluded_constant"]) == (1, 1)
    assert "Excluded 2 of 119" in caplog.text
    assert not {"0_0_0", "1_1_1", "2_2_2"} & set(ds["neuroid_id"].values)
    with pytest.raises(ConfigError, match="'raise' or 'exclude'"):
        bids.read_betas(image, table, bad="ignore")


def test_integer_betas_need_a_scale_and_must_not_overflow(tmp_path):
    rng = np.random.default_rng(0)
    betas = rng.normal(scale=2, size=(*SHAPE, 4))
    stored = np.round(betas * 300).astype(np.int16)
    table = pd.DataFrame({"stimulus_id": list("abca")})
    image = save(stored, tmp_path / "x.nii.gz")
    with pytest.raises(ConfigError, match=r"int16 without a scale.*1/300"):
        bids.read_betas(image, table)
    ds = bids.read_betas(image, table, scale=1 / 300)
    i, j, k = (ds[a].values for a in "ijk")
    np.testing.assert_allclose(ds["responses"].values, betas[i, j, k].T, atol=1 / 600 + 1e-6)
    stored[3, 3, 3, 1] = 32767
    image = save(stored, tmp_path / "y.nii.gz")
    with pytest.raises(SchemaError, match=r"1 stored at the limit of their integer type.*3_3_3"):
        bids.read_betas(image, table, scale=1 / 300)
    own = nib.Nifti1Image(betas, AFFINE)
    own.set_data_dtype(np.int16)
    nib.save(own, tmp_path / "z.nii.gz")
    scaled = bids.read_betas(tmp_path / "z.nii.gz", table, bad="exclude")
    i, j, k = (scaled[a].values for a in "ijk")
    np.testing.assert_allclose(scaled["responses"].values, betas[i, j, k].T, atol=1e-3)


def test_faults_are_counted_run_by_run(tree, caplog):
    root, _, mask = tree
    folder = root / "sub-01"
    first, second = (sorted(folder.rglob(f"*ses-{s}*run-2*betas.nii.gz"))[0] for s in (1, 2))
    data = nib.load(second).get_fdata(dtype=np.float32)
    inside = np.argwhere(mask)
    data[tuple(inside[:4].T)] = np.nan
    data[tuple(inside[5])][1] = np.inf
    save(data, second)
    match = (r"Of 24 neuroids, 5 with NaN.*Not finite by run: run 2 of session 2: 12 NaN in 4 "
             r"neuroids, 1 infinite in 1 neuroid\.")  # fmt: skip
    with pytest.raises(SchemaError, match=match):
        bids.read_derivatives(root, "01")
    still = nib.load(first).get_fdata(dtype=np.float32)
    still[tuple(inside[10:12].T)] = 3
    save(still, first)
    with caplog.at_level(logging.WARNING):
        ds = bids.read_derivatives(root, "01", bad="exclude")
    assert ds.sizes["neuroid"] == 19
    assert "run 2 of session 2: 12 NaN in 4 neuroids" in caplog.text
    assert "constant within a run: run 2 of session 1: 2 neuroids." in caplog.text
    save(np.zeros_like(still), first)
    for bad in ("raise", "exclude"):
        save(np.nan_to_num(data, posinf=0) if bad == "raise" else data, second)
        with pytest.raises(SchemaError, match=r"same in 1 of 4 runs: run 2 of session 1\."):
            bids.read_derivatives(root, "01", bad=bad)


@pytest.mark.parametrize("kind", ["nifti", "gifti", "nsd"])
def test_saturated_integers_are_counted_run_by_run(tmp_path, kind):
    import h5py

    rng = np.random.default_rng(3)
    betas = rng.normal(scale=2, size=(*SHAPE, 8))
    stored = np.round(betas * 300).astype(np.int16)
    stored[1, 2, 3, 4:7] = 32767
    stored[2, 2, 2, 5] = -32768
    table = pd.DataFrame({"stimulus_id": list("abcdabcd"), "run": [1] * 4 + [2] * 4})
    if kind == "nifti":
        image = save(stored, tmp_path / "x.nii.gz")

        def read(**options):
            return bids.read_betas(image, table, scale=1 / 300, **options)
    elif kind == "gifti":
        flat = stored.reshape(-1, 8).T
        arrays = [nib.gifti.GiftiDataArray(c, datatype="NIFTI_TYPE_INT32")
                  for c in flat.astype(np.int32)]  # fmt: skip
        nib.save(nib.GiftiImage(darrays=arrays), tmp_path / "l.func.gii")
        limit = np.iinfo(np.int32)
        for c in arrays:
            c.data[c.data == 32767] = limit.max
            c.data[c.data == -32768] = limit.min
        nib.save(nib.GiftiImage(darrays=arrays), tmp_path / "l.func.gii")

        def read(**options):
            return bids.read_betas({"L": tmp_path / "l.func.gii"}, table, scale=1 / 300, **options)
    else:
        with h5py.File(tmp_path / "betas_session01.hdf5", "w") as file:
            file.create_dataset("betas", data=stored.T)
        reference = save(np.zeros(SHAPE, np.float32), tmp_path / "ref.nii.gz")

        def read(**options):
            return bids.read_glmsingle(tmp_path / "betas_session01.hdf5", table, scale=1 / 300,
                                       reference=reference, **options)  # fmt: skip

    match = (
        r"2 stored at the limit.*At the limit by run: run 2 of session 1: 4 values in 2 neuroids"
    )
    with pytest.raises(SchemaError, match=match):
        read()
    ds = read(bad="exclude")
    assert ds.attrs["excluded_saturated"] == 2 and ds["responses"].dtype == np.float32
    keep = np.ones(SHAPE, bool)
    keep[1, 2, 3] = keep[2, 2, 2] = False
    expected = stored[keep].T.astype(np.float32) * np.float32(1 / 300)
    np.testing.assert_array_equal(ds["responses"].values, expected)


def test_a_scale_chosen_by_the_writer_is_no_overflow(tmp_path):
    betas = np.random.default_rng(0).normal(scale=2, size=(*SHAPE, 6))
    table = pd.DataFrame({"stimulus_id": list("abcabc")})
    own = nib.Nifti1Image(betas, AFFINE)
    own.set_data_dtype(np.int16)
    nib.save(own, tmp_path / "own.nii.gz")
    raw = np.asarray(nib.load(tmp_path / "own.nii.gz").dataobj.get_unscaled())
    assert {raw.min(), raw.max()} & {-32768, 32767}
    ds = bids.read_betas(tmp_path / "own.nii.gz", table)
    assert ds.sizes["neuroid"] == np.prod(SHAPE)
    np.testing.assert_allclose(ds["responses"].values, betas.reshape(-1, 6).T, atol=1e-3)
    betas[betas > 1] = 1
    clipped = nib.Nifti1Image(betas, AFFINE)
    clipped.set_data_dtype(np.int16)
    nib.save(clipped, tmp_path / "clipped.nii.gz")
    with pytest.raises(SchemaError, match="stored at the limit of their integer type"):
        bids.read_betas(tmp_path / "clipped.nii.gz", table)


def test_surface_betas_of_both_hemispheres(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "sub-02" / "func"
    data = {s: rng.normal(size=(3, 40)).astype(np.float32) for s in "LR"}
    data["L"][:, :4] = 0
    for s, d in data.items():
        save_gifti(d, folder / f"sub-02_task-x_hemi-{s}_space-fsaverage5_betas.func.gii")
    save_table(folder / "sub-02_task-x_trials.tsv", ["a", "b", "a"])
    ds = bids.read_derivatives(tmp_path, "02")
    assert ds.sizes == {"presentation": 3, "neuroid": 76}
    np.testing.assert_array_equal(ds["responses"].values, np.hstack([data["L"][:, 4:], data["R"]]))
    assert ds["vertex"].values.tolist() == [*range(4, 40), *range(40)]
    assert ds["neuroid_id"].values[0] == "L00004"
    assert list(ds.attrs["n_vertices"]) == [40, 40]
    with pytest.raises(ConfigError, match="Pass a mapping"):
        bids.read_betas(folder / "sub-02_task-x_hemi-L_space-fsaverage5_betas.func.gii", [])
    left = save_gifti(np.ones(40, np.float32), tmp_path / "lh.mask.func.gii")
    only = bids.read_betas(
        {s: folder / f"sub-02_task-x_hemi-{s}_space-fsaverage5_betas.func.gii" for s in "LR"},
        pd.DataFrame({"stimulus_id": ["a", "b", "a"]}), mask={"L": left}, bad="exclude",
    )  # fmt: skip
    assert set(only["hemisphere"].values) == {"L"} and only.sizes["neuroid"] == 36


@pytest.mark.parametrize("kind", ["hdf5", "matlab", "nsd", "npy"])
def test_glmsingle_outputs(tmp_path, kind):
    import h5py

    rng = np.random.default_rng(1)
    betas = rng.normal(size=(*SHAPE, 6)).astype(np.float32)
    betas[0] = 0
    folder = tmp_path / "sub-03" / "glm"
    folder.mkdir(parents=True)
    stem = folder / "TYPED_FITHRF_GLMDENOISE_RR"
    options = {}
    if kind == "npy":
        np.save(f"{stem}.npy", betas)
    else:
        key = {"hdf5": "betasmd", "matlab": "modelmd", "nsd": "betas"}[kind]
        data = betas if kind == "hdf5" else betas.T
        if kind == "nsd":
            data, options = np.round(data * 300).astype(np.int16), {"scale": 1 / 300}
        with h5py.File(f"{stem}.{'mat' if kind == 'matlab' else 'hdf5'}", "w") as file:
            file.create_dataset(key, data=data)
            file.create_dataset("R2", data=np.zeros(SHAPE))
    reference = save(np.zeros(SHAPE, np.float32), tmp_path / "ref.nii.gz")
    table = pd.DataFrame({"stimulus_id": list("abcabc"), "run": [1, 1, 1, 2, 2, 2]})
    ds = bids.read_glmsingle(folder, table, reference=reference, **options)
    assert ds.sizes == {"presentation": 6, "neuroid": 4 * 6 * 4}
    i, j, k = (ds[a].values for a in "ijk")
    np.testing.assert_allclose(ds["responses"].values, betas[i, j, k].T,
                               atol=1 / 600 + 1e-6 if kind == "nsd" else 0)  # fmt: skip
    assert ds["subject"].values[0] == "03" and ds["run"].values.tolist() == [1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(ds["x"].values, 6 - 2 * i)
    with pytest.raises(ConfigError, match="no affine"):
        bids.read_glmsingle(folder, table, **options)
    with pytest.raises(SchemaError, match="has 6 volumes, but the table has 5 rows"):
        bids.read_glmsingle(folder, table[:5], reference=reference, **options)
    other = save(np.zeros((4, 6, 4), np.float32), tmp_path / "other.nii.gz")
    with pytest.raises(SchemaError, match="shape"):
        bids.read_glmsingle(folder, table, reference=other, **options)


def test_glmsingle_lists_of_voxels_and_vertices(tmp_path):
    rng = np.random.default_rng(1)
    betas = rng.normal(size=(24, 1, 1, 4)).astype(np.float32)
    np.save(tmp_path / "TYPED_FITHRF_GLMDENOISE_RR.npy", betas)
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 1:5, 1:3] = 1
    path = save(mask, tmp_path / "mask.nii.gz")
    table = pd.DataFrame({"stimulus_id": list("abca")})
    ds = bids.read_glmsingle(tmp_path, table, mask=path)
    np.testing.assert_array_equal(ds["responses"].values, betas[:, 0, 0].T)
    np.testing.assert_array_equal(np.argwhere(mask)[:, 1], ds["j"].values)
    surface = bids.read_glmsingle(tmp_path, table, n_vertices=(10, 14))
    assert surface["hemisphere"].values.tolist() == ["L"] * 10 + ["R"] * 14
    assert surface["vertex"].values[10] == 0
    mask[4, 4, 2] = 1
    with pytest.raises(SchemaError, match=r"lists 24 voxels; the mask has 25"):
        bids.read_glmsingle(tmp_path, table, mask=save(mask, tmp_path / "mask2.nii.gz"))


def test_pickles_are_never_loaded(tmp_path):
    path = tmp_path / "TYPED_FITHRF_GLMDENOISE_RR.npy"
    np.save(path, np.array({"betasmd": 1}, dtype=object), allow_pickle=True)
    with pytest.raises(SchemaError, match=r"pickles, which are never loaded.*wanthdf5"):
        bids.read_glmsingle(path, [], n_vertices=(1, 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnavailableError, match=r"TYPED_FITHRF_GLMDENOISE_RR\.hdf5 or"):
        bids.read_glmsingle(tmp_path / "empty", [], n_vertices=(1, 1))


def test_rois_and_atlases_of_volumes(tree, tmp_path):
    root, _, _ = tree
    ds = bids.read_derivatives(root, "01")
    ffa = np.zeros(SHAPE, np.uint8)
    ffa[1:3, 1:3, 1:3] = 1
    ppa = np.zeros(SHAPE, np.uint8)
    ppa[2:4, 2:4, 1:3] = 1
    paths = {"FFA": save(ffa, tmp_path / "ffa.nii.gz"), "PPA": save(ppa, tmp_path / "ppa.nii.gz")}
    with_rois = validate(bids.add_rois(ds, paths), "responses")
    at = tuple(ds[a].values for a in "ijk")
    np.testing.assert_array_equal(with_rois["roi_mask"].sel(roi_name="PPA").values, ppa[at] > 0)
    both = (ffa[at] > 0) & (ppa[at] > 0)
    assert both.any() and set(with_rois["roi"].values[both]) == {"FFA"}
    assert set(with_rois["roi"].values[(ffa[at] == 0) & (ppa[at] == 0)]) == {""}

    atlas = np.zeros(SHAPE, np.int16)
    atlas[:, :3], atlas[:, 3:] = 11, 12
    image = save(atlas, tmp_path / "atlas_dseg.nii.gz")
    lookup = tmp_path / "atlas_dseg.tsv"
    lookup.write_text("index\tname\n0\tBackground\n11\tV1\n12\tV2\n")
    labels = bids.read_atlas(image, ds, lookup=lookup)
    assert labels.tolist() == ["V1" if j < 3 else "V2" for j in ds["j"].values]
    more = bids.add_atlas(with_rois, image, lookup=lookup)
    assert more["roi_name"].values.tolist() == ["FFA", "PPA", "V1", "V2"]
    assert bids.read_roi(image, ds, label=12).sum() == (ds["j"].values >= 3).sum()
    with pytest.raises(SchemaError, match=r"without a name: \[12\]"):
        bids.read_atlas(image, ds, lookup={11: "V1"})
    with pytest.raises(UnknownNameError, match=r"No neuroid has label 13.*11, 12"):
        bids.read_roi(image, ds, label=13)
    with pytest.raises(ConfigError, match="lookup="):
        bids.read_atlas(image, ds)
    shifted = AFFINE + np.array([[0, 0, 0, 1.0]] + [[0] * 4] * 3)
    with pytest.raises(SchemaError, match=r"shifted\.nii\.gz and the responses have different aff"):
        bids.read_roi(save(ffa, tmp_path / "shifted.nii.gz", shifted), ds)
    far = np.zeros(SHAPE, np.uint8)
    far[0, 0, 0] = 1
    with pytest.raises(SchemaError, match="No neuroid lies in ROI 'far'"):
        bids.add_rois(ds, {"far": save(far, tmp_path / "far.nii.gz")})


def test_rois_and_atlases_of_surfaces(tmp_path):
    rng = np.random.default_rng(0)
    for s in "LR":
        save_gifti(rng.normal(size=(3, 30)).astype(np.float32), tmp_path / f"x_hemi-{s}_b.func.gii")
    ds = bids.read_betas({s: tmp_path / f"x_hemi-{s}_b.func.gii" for s in "LR"},
                         pd.DataFrame({"stimulus_id": list("aba")}))  # fmt: skip
    label = tmp_path / "lh.FFA.label"
    label.write_text("#!ascii label\n2\n3 0.0 0.0 0.0 0.0\n7 0.0 0.0 0.0 0.0\n")
    inside = bids.read_roi(label, ds)
    assert ds["neuroid_id"].values[inside].tolist() == ["L00003", "L00007"]
    values = np.repeat([0, 1, 2], 10).astype(np.int32)
    names = {0: "???", 1: "V1", 2: "V2"}
    paths = {s: save_gifti(values, tmp_path / f"atlas_hemi-{s}.label.gii", names) for s in "LR"}
    labels = bids.read_atlas(paths, ds)
    assert labels.tolist() == ([""] * 10 + ["V1"] * 10 + ["V2"] * 10) * 2
    assert bids.read_roi(paths, ds, label="V2").sum() == 20
    with pytest.raises(UnknownNameError, match="Did you mean 'V1'"):
        bids.read_roi(paths, ds, label="V11")
    annot = tmp_path / "rh.aparc.annot"
    nib.freesurfer.write_annot(annot, values, np.array([[0, 0, 0, 0], [9, 0, 0, 0], [0, 9, 0, 0]]),
                               ["unknown", "fusiform", "lingual"], fill_ctab=True)  # fmt: skip
    right = bids.read_atlas(annot, ds)
    assert set(right[:30]) == {""} and right[30:].tolist() == (
        [""] * 10 + ["fusiform"] * 10 + ["lingual"] * 10
    )
    small = save_gifti(np.ones(20, np.float32), tmp_path / "lh.small.func.gii")
    with pytest.raises(SchemaError, match="20 vertices; the responses' hemisphere has 30"):
        bids.read_roi(small, ds)
    with pytest.raises(ConfigError, match="does not tell its hemisphere"):
        bids.read_roi(save_gifti(values, tmp_path / "atlas.label.gii", names), ds)
    with pytest.raises(SchemaError, match="is a volume"):
        bids.read_roi(save(np.ones(SHAPE, np.uint8), tmp_path / "v.nii.gz"), ds)


@pytest.fixture(scope="module")
def series():
    rng = np.random.default_rng(0)
    return simulate_timeseries(rng.normal(size=(10, 4)), neuroids=60, n_runs=2, n_repetitions=2,
                               noise_sd=0.05, tr=1.5, seed=1)  # fmt: skip


def test_first_level_gives_back_the_trial_amplitudes(series):
    ds = bids.first_level(series.bold, series.events, signal_scaling=False, noise_model="ols")
    validate(ds, "responses")
    truth = series.responses
    for name in ("stimulus_id", "session", "run", "repetition"):
        np.testing.assert_array_equal(ds[name].values, truth[name].values)
    error = ds["responses"].values - truth["responses"].values
    assert (
        np.corrcoef(ds["responses"].values.ravel(), truth["responses"].values.ravel())[0, 1] > 0.99
    )
    assert abs(error.mean()) < 0.05 and error.std() < 0.2
    assert "sampling_rate" not in ds.attrs
    per_run = [e.drop(columns=["run", "session"]) for _, e in series.events.groupby("run")]
    again = bids.first_level(series.bold, per_run, signal_scaling=False, noise_model="ols")
    np.testing.assert_array_equal(ds["responses"].values, again["responses"].values)


def test_first_level_of_files_equals_nilearns_model(series, tmp_path):
    from nilearn.glm.first_level import FirstLevelModel

    raw, derivatives = (
        tmp_path / "raw" / "sub-01" / "func",
        tmp_path / "fmriprep" / "sub-01" / "func",
    )
    expected = []
    for run in (1, 2):
        bold = series.bold["responses"].values[series.bold["run"].values == run]
        name = f"sub-01_task-x_run-{run}"
        image = nib.Nifti1Image(bold.T.reshape(3, 4, 5, -1), AFFINE)
        derivatives.mkdir(parents=True, exist_ok=True)
        nib.save(image, derivatives / f"{name}_space-MNI152_desc-preproc_bold.nii.gz")
        sidecar = derivatives / f"{name}_space-MNI152_desc-preproc_bold.json"
        sidecar.write_text(json.dumps({"RepetitionTime": 1.5}))
        save(
            np.ones((3, 4, 5), np.uint8),
            derivatives / f"{name}_space-MNI152_desc-brain_mask.nii.gz",
        )
        events = series.events[series.events["run"] == run][["onset", "duration", "stimulus_id"]]
        raw.mkdir(parents=True, exist_ok=True)
        events.to_csv(raw / f"{name}_events.tsv", sep="\t", index=False)
        model = FirstLevelModel(
            t_r=1.5,
            hrf_model="spm",
            noise_model="ar1",
            minimize_memory=True,
            mask_img=nib.Nifti1Image(np.ones((3, 4, 5), np.int8), AFFINE),
        )
        labels = [f"t{i}" for i in range(len(events))]
        model.fit(image, events[["onset", "duration"]].assign(trial_type=labels))
        expected += [model.compute_contrast(t, output_type="effect_size").get_fdata().ravel()
                     for t in labels]  # fmt: skip
    with pytest.raises(UnavailableError, match=r"2 of 2 runs have no table.*tables_root"):
        bids.read_derivatives(tmp_path / "fmriprep", "01", kind="bold")
    ds = bids.read_derivatives(tmp_path / "fmriprep", "01", kind="bold",
                               tables_root=tmp_path / "raw")  # fmt: skip
    np.testing.assert_allclose(ds["responses"].values, expected, atol=2e-4)
    assert ds.attrs["units"] == "percent signal change"
    assert set(ds["hemisphere"].values) == {"R"} and (ds["x"].values > 0).all()


def test_first_level_refuses_what_it_cannot_fit(series):
    late = series.events.assign(onset=series.events["onset"] + 500)
    with pytest.raises(SchemaError, match="10 events of session 1, run 1 start outside the run"):
        bids.first_level(series.bold, late)
    with pytest.raises(SchemaError, match="no column 'onset'"):
        bids.first_level(series.bold, series.events.drop(columns="onset"))
    with pytest.raises(SchemaError, match="run 2 has no events"):
        bids.first_level(series.bold, series.events[series.events["run"] == 1])
    twice = pd.concat([series.events, series.events], ignore_index=True)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        bids.first_level(series.bold, twice)
    with pytest.raises(SchemaError, match="mean 0"):
        bids.first_level(series.bold * 0, series.events)


def test_time_series_know_their_rate(tmp_path):
    data = np.random.default_rng(0).normal(size=(*SHAPE, 8)).astype(np.float32)
    path = save(data, tmp_path / "sub-01_run-1_bold.nii.gz")
    ds = bids.read_timeseries(path, tr=2.0)
    assert ds.sizes == {"time": 8, "neuroid": 120} and ds.attrs["sampling_rate"] == 0.5
    assert ds["seconds"].values[-1] == 14
    image = nib.load(path)
    image.header.set_zooms((2, 2, 2.5, 0))
    nib.save(image, tmp_path / "sub-01_run-2_bold.nii.gz")
    with pytest.raises(ConfigError, match="has a repetition time"):
        bids.read_timeseries(tmp_path / "sub-01_run-2_bold.nii.gz")
