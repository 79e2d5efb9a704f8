"""The Natural Scenes Dataset's loader, on a small folder of the study's own layout."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.io import savemat

from brainalign.cli import main
from brainalign.data.bundle import read_bundle, write_bundle
from brainalign.data.studies import allen2022
from brainalign.errors import (
    ChecksumError,
    ConfigError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)

SHAPE, SESSIONS, RUNS, TRIALS = (7, 6, 5), 3, 2, 9
AFFINE = np.array([[-1.8, 0, 0, 5], [0, 1.8, 0, -4], [0, 0, 1.8, -3], [0, 0, 0, 1.0]])
#: Images: 4 shared ones (0-based nsdId) and 5 of each subject, each shown three times.
SHARED, OWN, N_IMAGES = np.array([3, 11, 12, 40]), 5, 60
SUBJECT = "subj03"


def nifti(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, AFFINE), path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder as Amazon's client leaves it, and what is in it."""
    root = tmp_path_factory.mktemp("nsd")
    rng = np.random.default_rng(0)
    experiment = root / "nsddata/experiments/nsd"
    experiment.mkdir(parents=True)
    others = np.setdiff1d(np.arange(N_IMAGES), SHARED)
    subjectim = np.stack([np.concatenate([SHARED, others[5 * k : 5 * k + OWN]]) for k in range(8)])
    order = rng.permutation(np.repeat(np.arange(9), 3))
    # Image 40 is shown only in the last session, which subject 4 never had.
    order = np.concatenate([order[order != 3], [3, 3, 3]])
    pattern = np.zeros((SESSIONS, RUNS, 8))
    pattern[:, 0, :5], pattern[:, 1, :4] = 1, 1
    savemat(
        experiment / "nsd_expdesign.mat",
        {
            "masterordering": order[None] + 1,
            "subjectim": subjectim + 1,
            "sharedix": SHARED[None] + 1,
            "stimpattern": pattern,
        },
    )
    pd.DataFrame(
        {
            "cocoId": 1000 + np.arange(N_IMAGES),
            "cocoSplit": ["val2017"] * N_IMAGES,
            "nsdId": np.arange(N_IMAGES),
            "shared1000": np.isin(np.arange(N_IMAGES), SHARED),
        }
    ).to_csv(experiment / "nsd_stim_info_merged.csv")
    images = rng.integers(0, 256, (N_IMAGES, 4, 4, 3), dtype=np.uint8)
    path = root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["imgBrick"] = images

    roi = np.full((*SHAPE, 8), -1)
    roi[1:6, 1:5, :, :] = 0
    faces, bodies, places, words, early, hcp, general, left = np.moveaxis(roi, -1, 0)
    faces[1, 1, :], faces[1, 2, :], faces[1, 3, :2] = 1, 2, 3
    bodies[1, 3, :] = 1
    places[2, 1, :3] = 2
    words[2, 2, 0] = 2
    early[5, :, :][early[5] == 0] = 1
    faces[5, 1, 0] = 1  # in an early area: left out
    hcp[3, 1:5, :], hcp[4, 1:5, :], hcp[5, 1:5, :] = 7, 22, 1
    general[1:6, 1:3, :] = 1
    left[1:3] = np.where(left[1:3] == 0, 5, left[1:3])
    names = dict(zip(("floc-faces", "floc-bodies", "floc-places", "floc-words", "prf-visualrois",
                      "HCP_MMP1", "nsdgeneral", "lh.HCP_MMP1"),
                     np.moveaxis(roi, -1, 0), strict=True))  # fmt: skip
    rois = root / f"nsddata/ppdata/{SUBJECT}/func1pt8mm/roi"
    for name, data in names.items():
        nifti(rois / f"{name}.nii.gz", data.astype(np.int16))
    labels = root / f"nsddata/freesurfer/{SUBJECT}/label"
    labels.mkdir(parents=True)
    for name, text in {
        "floc-faces": "0 Unknown\n1 OFA\n2 FFA-1\n3 FFA-2\n4 mTL-faces\n",
        "floc-bodies": "0 Unknown\n1 EBA\n",
        "floc-places": "0 Unknown\n1 OPA\n2 PPA\n3 RSC\n",
        "floc-words": "0 Unknown\n1 OWFA\n2 VWFA-1\n",
        "prf-visualrois": "0 Unknown\n1 V1v\n",
        "HCP_MMP1": "0 ??? 25 5 25 0\n1 V1 1 2 3 0\n7 V8 4 5 6 0\n22 i6-8 7 8 9 0\n",
    }.items():
        (labels / f"{name}.mgz.ctab").write_text(text)

    betas = root / f"nsddata_betas/ppdata/{SUBJECT}/func1pt8mm/betas_fithrf_GLMdenoise_RR"
    ncsnr = rng.uniform(0.1, 0.3, SHAPE)
    ncsnr[4] += 0.5  # the second parcel, after that of the early areas
    ncsnr[5] += 0.9
    ncsnr[3, 1, 0] = np.nan
    nifti(betas / "ncsnr.nii.gz", ncsnr.astype(np.float32))
    signal = rng.normal(size=(*SHAPE, N_IMAGES))
    shown = subjectim[2][order]
    values = signal[..., shown] + 0.2 * rng.normal(size=(*SHAPE, len(order)))
    percent = np.round(300 * values).astype(np.int16)
    for session in range(SESSIONS):
        part = percent[..., session * TRIALS : (session + 1) * TRIALS]
        if session == 1:
            nifti(betas / f"betas_session{session + 1:02d}.nii.gz", part)
            continue
        with h5py.File(betas / f"betas_session{session + 1:02d}.hdf5", "w") as file:
            file.create_dataset("betas", data=part.T, chunks=(TRIALS, 1, 1, 1))
    return {"root": root, "percent": percent, "shown": shown, "images": images,
            "ncsnr": ncsnr, "rois": names, "betas": betas}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINALIGN_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("BRAINALIGN_MIRROR", raising=False)
    # The experiment of the small folder: three sessions, of which subject 4 had two.
    sessions = dict.fromkeys(allen2022.SESSIONS, 3) | {"subj04": 2}
    monkeypatch.setattr(allen2022, "SESSIONS", sessions)


def load(copy, **options):
    return allen2022.load(copy["root"], subjects=[SUBJECT], **options)


@pytest.fixture
def changed(copy, tmp_path):
    """The same folder with files of its own that a test may spoil: links to the others."""
    root = tmp_path / "own"
    for path in copy["root"].rglob("*"):
        if path.is_file():
            target = root / path.relative_to(copy["root"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return {**copy, "root": root, "betas": root / copy["betas"].relative_to(copy["root"])}


def test_every_trial_of_every_chosen_voxel_is_the_z_score_of_its_session(copy):
    ds = load(copy, parcels=2).responses[SUBJECT]
    faces, early = copy["rois"]["floc-faces"], copy["rois"]["prf-visualrois"]
    inside = np.any([copy["rois"][r] > 0 for r in allen2022._FLOC], axis=0)
    inside = (inside | (copy["rois"]["HCP_MMP1"] == 22)) & (early <= 0)
    ijk = np.argwhere(inside)
    np.testing.assert_array_equal(np.stack([ds[a].values for a in "ijk"], axis=1), ijk)
    y = copy["percent"][tuple(ijk.T)].T.astype(np.float64).reshape(SESSIONS, TRIALS, -1)
    z = (y - y.mean(axis=1, keepdims=True)) / y.std(axis=1, keepdims=True)
    np.testing.assert_allclose(
        ds["responses"].values, z.reshape(-1, len(ijk)), rtol=2e-6, atol=2e-6
    )

    assert ds["stimulus_id"].values.tolist() == [f"nsd{i:05d}" for i in copy["shown"]]
    np.testing.assert_array_equal(ds["session"], np.repeat([1, 2, 3], TRIALS))
    np.testing.assert_array_equal(ds["run"], np.tile(np.repeat([1, 2], [5, 4]), SESSIONS))
    seen: dict[int, int] = {}
    for image, repetition in zip(copy["shown"], ds["repetition"].values, strict=True):
        assert repetition == seen.get(image, 0)
        seen[image] = repetition + 1
    np.testing.assert_allclose(
        ds["ncsnr"].values, np.nan_to_num(copy["ncsnr"])[tuple(ijk.T)], rtol=1e-6
    )
    xyz = np.stack([ds[a].values for a in "xyz"], axis=1)
    np.testing.assert_allclose(xyz, ijk @ AFFINE[:3, :3].T + AFFINE[:3, 3], atol=1e-5)
    masks = {str(n): ds["roi_mask"].sel(roi_name=n).values for n in ds["roi_name"].values}
    assert set(masks) == {"OFA", "FFA-1", "FFA-2", "FFA", "EBA", "PPA", "VWFA-1", "VWFA", "i6-8"}
    np.testing.assert_array_equal(masks["OFA"], faces[tuple(ijk.T)] == 1)
    np.testing.assert_array_equal(masks["FFA"], masks["FFA-1"] | masks["FFA-2"])
    assert (masks["FFA-2"] & masks["EBA"]).sum() == 2
    np.testing.assert_array_equal(ds["hemisphere"], np.where(ijk[:, 0] < 3, "L", ""))


def test_vertices_of_fsaverage5_lie_in_voxels(changed):
    assert load(changed).extras == {}
    transforms = changed["root"] / f"nsddata/ppdata/{SUBJECT}/transforms"
    transforms.mkdir(parents=True)
    rng = np.random.default_rng(1)
    ijk, nearest = {}, {}
    for side in ("lh", "rh"):
        # Places count from 1, and 9999 is nowhere; so do the numbers of vertices.
        ijk[side] = rng.uniform(0, np.array(SHAPE) - 1, (50, 3))
        place = ijk[side] + 1
        place[7] = 9999
        nearest[side] = np.concatenate([np.arange(50), rng.integers(0, 50, 163842 - 50)])
        for name, data in (
            ("func1pt8-to-layerB2", place),
            ("white-to-fsaverage", nearest[side] + 1),
        ):
            shaped = data.reshape(len(data), 1, 1, *data.shape[1:]).astype(np.float32)
            nibabel.save(nibabel.MGHImage(shaped, np.eye(4)), transforms / f"{side}.{name}.mgz")
    study = load(changed)
    surface = study.extras[f"surface_{SUBJECT}"]
    assert surface.sizes == {"vertex": 20484}
    for k, side in enumerate(("lh", "rh")):
        found = surface["neuroid_id"].values[k * 10242 : (k + 1) * 10242]
        assert found[7] == ""
        for vertex in (0, 49, 60, 10241):
            own = nearest[side][vertex]
            expected = "-".join(str(round(x)) for x in ijk[side][own]) if own != 7 else ""
            assert found[vertex] == expected
    assert set(surface["hemisphere"].values[:10242]) == {"L"}
    assert set(allen2022.addresses([SUBJECT])) >= {
        f"nsddata/ppdata/{SUBJECT}/transforms/{side}.{name}.mgz"
        for side in ("lh", "rh") for name in ("func1pt8-to-layerB2", "white-to-fsaverage")
    }  # fmt: skip
    small = np.ones((9, 1, 1), np.float32)
    nibabel.save(nibabel.MGHImage(small, np.eye(4)), transforms / "lh.white-to-fsaverage.mgz")
    with pytest.raises(SchemaError, match="do not fit"):
        load(changed)


def test_hdf5_and_nifti_betas_give_the_same(changed):
    both = load(changed).responses[SUBJECT]
    source = changed["betas"] / "betas_session01.hdf5"
    source.unlink()
    nifti(changed["betas"] / "betas_session01.nii.gz", changed["percent"][..., :TRIALS])
    xr.testing.assert_identical(load(changed).responses[SUBJECT].load(), both.load())


def test_percent_signal_change_and_general_roi(copy):
    ds = load(copy, voxels="nsdgeneral", normalise="none").responses[SUBJECT]
    ijk = np.argwhere(copy["rois"]["nsdgeneral"] > 0)
    want = copy["percent"][tuple(ijk.T)].T / 300
    np.testing.assert_allclose(ds["responses"].values, want, rtol=1e-6)
    assert "V1v" in ds["roi_name"].values and ds.attrs["units"] == "% signal change"


def test_a_food_mask_adds_its_voxels(changed):
    mask = np.zeros(SHAPE, dtype=np.int16)
    mask[3, 4, 4] = mask[5, 1, 1] = 1
    nifti(changed["root"] / f"food/{SUBJECT}.nii.gz", mask)
    ds = load(changed, parcels=2, food="food/{subject}.nii.gz").responses[SUBJECT]
    food = ds["roi_mask"].sel(roi_name="food").values
    # The other one lies in an early area.
    assert ds["neuroid_id"].values[food].tolist() == ["3-4-4"]


def test_parcels_are_chosen_by_mean_ncsnr_outside_early_areas():
    parcel = np.array([0, 5, 5, 9, 9, 9, 2, 2])
    ncsnr = np.array([9.0, 0.2, 0.4, 0.9, np.nan, 0.1, 0.5, 0.7])
    localised = np.array([1, 0, 0, 0, 0, 0, 0, 0])
    early = np.array([0, 0, 0, 1, 0, 0, 0, 0])
    voxels, best = allen2022.choose_voxels(localised, early, parcel, ncsnr, 2)
    assert best == [2, 9]  # means 0.6 and 0.5, and 0.3 of parcel 5
    np.testing.assert_array_equal(voxels, [1, 0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(SchemaError, match="No voxel is left"):
        allen2022.choose_voxels(localised, np.ones(8), parcel, ncsnr, 2)
    with pytest.raises(SchemaError, match="different shapes"):
        allen2022.choose_voxels(localised, early[1:], parcel, ncsnr)


def test_z_scores_have_no_scale_and_tell_bad_voxels():
    y = np.random.default_rng(1).normal(3, 5, (40, 4))
    y[:, 1], y[7, 2] = 2.5, np.nan
    z, bad = allen2022.zscore_sessions(y)
    np.testing.assert_array_equal(bad, [False, True, True, False])
    assert np.isnan(z[:, bad]).all()
    np.testing.assert_allclose(z[:, ~bad].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(z[:, ~bad].std(axis=0), 1, rtol=1e-6)


def test_images_are_those_seen_and_say_which_all_eight_saw(copy):
    stimuli = load(copy).stimuli
    seen = np.unique(copy["shown"])
    assert stimuli.ids == allen2022.stimulus_ids(seen)
    for i in (0, 5):
        np.testing.assert_array_equal(np.asarray(stimuli.open(i)), copy["images"][seen[i]])
    index = stimuli.index
    np.testing.assert_array_equal(index["shared1000"], np.isin(seen, SHARED))
    np.testing.assert_array_equal(index["seen_by_all"], np.isin(seen, [3, 11, 12]))
    np.testing.assert_array_equal(index["coco_id"], 1000 + seen)
    stimuli.verify()


def test_the_index_of_images_is_kept_until_the_file_changes(copy, changed, monkeypatch):
    load(copy)
    calls = []
    real = allen2022.index_hdf5
    monkeypatch.setattr(allen2022, "index_hdf5", lambda *a, **k: calls.append(1) or real(*a, **k))
    load(copy)
    assert not calls
    os.utime(copy["root"] / allen2022._STIMULI)
    load(copy)
    assert len(calls) == 1


def test_an_image_that_changed_is_told(changed):
    stimuli = load(changed).stimuli
    path = changed["root"] / allen2022._STIMULI
    path.unlink()
    with h5py.File(path, "w") as file:
        file["imgBrick"] = 255 - changed["images"]
    with pytest.raises(ChecksumError, match="not the one that was indexed"):
        stimuli.verify()


def test_the_bundle_keeps_everything_and_copies_no_image(copy, tmp_path):
    study = load(copy, parcels=2)
    write_bundle(study, tmp_path / "data")
    back = read_bundle(tmp_path / "data")
    xr.testing.assert_equal(back.responses[SUBJECT].load(), study.responses[SUBJECT].load())
    assert back.stimuli.hash == study.stimuli.hash
    np.testing.assert_array_equal(
        np.asarray(back.stimuli.open(3)), np.asarray(study.stimuli.open(3))
    )
    assert (tmp_path / "data/stimuli/nsd_stimuli.hdf5").is_symlink()
    back.stimuli.verify()


def test_the_command_line_reads_only_the_subjects_it_is_told(copy, tmp_path, capsys):
    out = tmp_path / "data"
    words = ["responses", "allen2022", "--out", str(out), "--parameters"]
    folder = f'{{"folder": "{copy["root"]}", "parcels": 2}}'
    assert main([*words, folder, "--subjects", SUBJECT]) == 0
    assert [p.name for p in (out / "responses").iterdir()] == [f"{SUBJECT}.zarr"]
    assert main([*words, folder, "--subjects", "subj09"]) == 2
    assert "Did you mean 'subj0" in capsys.readouterr().err


def test_a_missing_session_is_named_or_left_out(changed):
    (changed["betas"] / "betas_session02.nii.gz").unlink()
    with pytest.raises(UnavailableError, match=r"1 of 3 sessions .*betas_session02"):
        load(changed)
    ds = load(changed, missing="exclude").responses[SUBJECT]
    assert sorted(set(ds["session"].values.tolist())) == [1, 3]
    whole = np.r_[0:TRIALS, 2 * TRIALS : 3 * TRIALS]
    assert ds["stimulus_id"].values.tolist() == allen2022.stimulus_ids(changed["shown"][whole])
    np.testing.assert_array_equal(ds["trial"], whole)
    assert ds.attrs["missing_sessions"] == [2]
    # The first sessions only: what lies behind is not asked for.
    assert load(changed, sessions=1).responses[SUBJECT].sizes["presentation"] == TRIALS


@pytest.mark.parametrize("value", [0, np.nan])
def test_voxels_that_a_session_lacks_are_left_out_or_refused(changed, value):
    path = changed["betas"] / "betas_session02.nii.gz"
    part = changed["percent"][..., TRIALS : 2 * TRIALS] / 300
    part[1, 1, 0] = value
    path.unlink()
    nifti(path, part.astype(np.float32))
    with pytest.raises(SchemaError, match=r"1 of \d+ voxels .*\(1 in session 2"):
        load(changed, bad="raise").responses[SUBJECT]
    ds = load(changed).responses[SUBJECT]
    whole = load({**changed, "root": changed["root"]}, sessions=1).responses[SUBJECT]
    assert ds.attrs["excluded_neuroids"] == 1
    assert set(whole["neuroid_id"].values) - set(ds["neuroid_id"].values) == {"1-1-0"}
    same = ds.isel(presentation=slice(TRIALS))["responses"].values
    np.testing.assert_array_equal(
        same, whole.isel(neuroid=(whole["neuroid_id"] != "1-1-0").values)["responses"].values
    )


def test_files_that_do_not_fit_are_named_before_betas_are_read(changed):
    path = changed["betas"] / "betas_session03.hdf5"
    path.unlink()
    with h5py.File(path, "w") as file:
        file["betas"] = np.zeros((TRIALS - 1, *SHAPE[::-1]), dtype=np.int16)
    with pytest.raises(SchemaError, match=r"session03.* shape \(7, 6, 5, 8\); expected .* 9\)"):
        load(changed)
    path.unlink()
    with h5py.File(path, "w") as file:
        file["other"] = 0
    with pytest.raises(SchemaError, match="holds no betas"):
        load(changed)


def test_a_mask_of_another_grid_is_refused(changed):
    path = changed["root"] / f"nsddata/ppdata/{SUBJECT}/func1pt8mm/roi/floc-places.nii.gz"
    path.unlink()
    nifti(path, np.zeros((7, 6, 6), dtype=np.int16))
    with pytest.raises(SchemaError, match=r"floc-places.* shape \(7, 6, 6\)"):
        load(changed)


def test_a_label_without_name_is_refused(changed):
    path = changed["root"] / f"nsddata/freesurfer/{SUBJECT}/label/floc-faces.mgz.ctab"
    path.unlink()
    path.write_text("0 Unknown\n1 OFA\n")
    with pytest.raises(SchemaError, match="label 2 of floc-faces has no name"):
        load(changed).responses[SUBJECT]


def test_a_design_that_contradicts_the_table_of_images_is_refused(changed):
    path = changed["root"] / allen2022._INFO
    table = pd.read_csv(path, index_col=0)
    path.unlink()
    # As if nsdId counted from 1.
    table["shared1000"] = np.roll(table["shared1000"], 1)
    table.to_csv(path)
    with pytest.raises(SchemaError, match="name different shared images"):
        load(changed)


def test_options_are_checked(copy):
    with pytest.raises(UnknownNameError, match="Did you mean 'subj0"):
        allen2022.load(copy["root"], subjects=["subj9"])
    with pytest.raises(ConfigError, match="different names"):
        allen2022.load(copy["root"], subjects=[])
    with pytest.raises(ConfigError, match="expected higher or nsdgeneral"):
        load(copy, voxels="all")
    with pytest.raises(ConfigError, match="sessions is 0"):
        load(copy, sessions=0)


def test_fetch_finds_a_copy_and_says_how_to_make_one(copy, tmp_path, monkeypatch):
    with pytest.raises(UnavailableError, match="asks for your agreement"):
        allen2022.fetch(copy["root"])
    assert allen2022.fetch(copy["root"], accept_terms=True) == copy["root"]
    with pytest.raises(UnavailableError, match=r"nsd_expdesign(.|\n)*aws s3 sync"):
        allen2022.fetch(accept_terms=True)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / allen2022.FOLDER).symlink_to(copy["root"])
    monkeypatch.setenv("BRAINALIGN_MIRROR", str(mirror))
    assert allen2022.fetch(accept_terms=True) == mirror / allen2022.FOLDER
    assert allen2022.load(subjects=[SUBJECT]).responses[SUBJECT].sizes["presentation"] == 27


def test_addresses_are_those_of_the_public_bucket():
    found = allen2022.addresses(["subj04"])
    session = (
        "nsddata_betas/ppdata/subj04/func1pt8mm/betas_fithrf_GLMdenoise_RR/betas_session02.hdf5"
    )
    assert found[session] == "https://natural-scenes-dataset.s3.amazonaws.com/" + session
    assert session.replace("02.", "03.") not in found
    assert "nsddata/freesurfer/subj04/label/floc-faces.mgz.ctab" in found


def test_what_is_in_memory_is_a_session_not_a_subject(changed):
    """A subject of 12 times the size of a session is read with the memory of about three."""
    n_trials = TRIALS * 400
    pattern = np.ones((12, 1, n_trials))
    images = np.tile(np.arange(9), (8, 1)) + 1
    order = np.resize(np.arange(9), 12 * n_trials)
    path = changed["root"] / allen2022._DESIGN
    path.unlink()
    savemat(path, {"masterordering": order[None] + 1, "subjectim": images,
                   "sharedix": SHARED[None] + 1, "stimpattern": pattern})  # fmt: skip
    allen2022.SESSIONS.update(dict.fromkeys(allen2022.SESSIONS, 12))
    for old in changed["betas"].glob("betas_*"):
        old.unlink()
    rng = np.random.default_rng(0)
    for session in range(1, 13):
        with h5py.File(changed["betas"] / f"betas_session{session:02d}.hdf5", "w") as file:
            noise = rng.integers(-900, 900, (n_trials, *SHAPE[::-1]), dtype=np.int16)
            file.create_dataset("betas", data=noise, chunks=(n_trials, 1, 1, 1))
    del noise
    study = load(changed)
    gc.collect()
    tracemalloc.start()
    ds = study.responses[SUBJECT]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    session = n_trials * ds.sizes["neuroid"] * 8
    assert ds["responses"].nbytes == 6 * session
    assert peak < 5 * session
