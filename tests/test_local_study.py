"""One's own BIDS derivatives become a study: named files, matched images, clear refusals."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from brainalign.cli import main
from brainalign.data.bundle import read_bundle
from brainalign.data.stimuli import write_stimuli
from brainalign.data.studies import local
from brainalign.errors import ConfigError, SchemaError, UnavailableError

SHAPE = (6, 6, 4)
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
SHOWN = {"1": ["cat", "dog", "car"], "2": ["dog", "car", "cat"]}


def save(data, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    return path


@pytest.fixture
def tree(tmp_path):
    """Two subjects with two runs of betas each, ROI masks, an atlas, and three images."""
    rng = np.random.default_rng(0)
    root = tmp_path / "derivatives"
    brain = np.zeros(SHAPE, np.uint8)
    brain[1:5, 1:5, 1:3] = 1
    ffa = np.zeros(SHAPE, np.uint8)
    ffa[1:3, 1:5, 1:3] = 1
    for sub in ("01", "02"):
        func = root / f"sub-{sub}" / "func"
        for run, shown in SHOWN.items():
            stem = f"sub-{sub}_task-images_run-{run}"
            betas = rng.normal(size=(*SHAPE, 3)).astype(np.float32) * brain[..., None]
            save(betas, func / f"{stem}_space-T1w_betas.nii.gz")
            frame = pd.DataFrame({"onset": [0, 4, 8], "duration": 2.0,
                                  "stim_file": [f"images/{s}.png" for s in shown]})  # fmt: skip
            frame.to_csv(func / f"{stem}_events.tsv", sep="\t", index=False)
        save(brain, func / f"sub-{sub}_task-images_space-T1w_desc-brain_mask.nii.gz")
        save(ffa, root / f"sub-{sub}" / "rois" / "ffa.nii.gz")
        save(ffa + brain, root / f"sub-{sub}" / "rois" / "atlas.nii.gz")
    (root / "atlas.tsv").write_text("index\tname\n1\touter\n2\tinner\n")
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("car", "cat", "dog"):
        pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return root, folder, brain.astype(bool), ffa.astype(bool)


def test_subjects_rois_and_images(tree):
    root, images, brain, ffa = tree
    study = local.load(root, stimuli=images, rois={"FFA": "sub-{subject}/rois/ffa.nii.gz"})
    assert list(study.responses) == ["01", "02"]
    assert study.stimuli.ids == ["car", "cat", "dog"]
    ds = study.responses["02"]
    assert ds.sizes["neuroid"] == brain.sum()
    assert ds["stimulus_id"].values.tolist() == SHOWN["1"] + SHOWN["2"]
    assert ds["repetition"].values.tolist() == [1, 1, 1, 2, 2, 2]
    assert (ds["roi"].values == "FFA").sum() == ffa.sum()
    assert ds.attrs["subject"] == "02" and ds.attrs["space"] == "T1w"
    data = nib.load(root / "sub-02/func/sub-02_task-images_run-2_space-T1w_betas.nii.gz")
    np.testing.assert_array_equal(ds["responses"].values[3:], data.get_fdata()[brain].T)
    one = local.load(root, stimuli=images, subjects=["sub-01"], mask="sub-{subject}/rois/ffa*",
                     entities={"space": "T1w"})  # fmt: skip
    assert list(one.responses) == ["01"] and one.responses["01"].sizes["neuroid"] == ffa.sum()
    atlas = local.load(root, stimuli=images, subjects=["01"], lookup="atlas.tsv",
                       atlas="sub-{subject}/rois/atlas.nii.gz").responses["01"]  # fmt: skip
    assert (atlas["roi"].values == "inner").sum() == ffa.sum()
    assert set(atlas["roi"].values) == {"inner", "outer"}


def test_glmsingle_by_pattern(tree, tmp_path):
    root, images, brain, _ = tree
    betas = np.random.default_rng(1).normal(size=(*SHAPE, 6)).astype(np.float32)
    (root / "sub-01" / "glm").mkdir()
    np.save(root / "sub-01" / "glm" / "TYPED_FITHRF_GLMDENOISE_RR.npy", betas)
    options = {
        "kind": "glmsingle",
        "subjects": ["01"],
        "betas": "sub-{subject}/glm",
        "trials": "sub-{subject}/func/*_events.tsv",
        "mask": "sub-{subject}/func/*_mask.nii.gz",
    }
    # Two tables for one file of betas cannot be told apart; one table can.
    with pytest.raises(SchemaError, match="2 tables for 1 images"):
        local.load(root, stimuli=images, **options)
    frame = pd.DataFrame({"stimulus_id": SHOWN["1"] + SHOWN["2"], "run": [1, 1, 1, 2, 2, 2]})
    frame.to_csv(root / "sub-01" / "trials.tsv", sep="\t", index=False)
    options["trials"] = "sub-{subject}/trials.tsv"
    study = local.load(root, stimuli=images, rois={"FFA": "sub-{subject}/rois/ffa.nii.gz"},
                       **options)  # fmt: skip
    ds = study.responses["01"]
    np.testing.assert_array_equal(ds["responses"].values, betas[brain].T)
    assert ds["run"].values.tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ConfigError, match="needs betas and trials"):
        local.load(root, stimuli=images, kind="glmsingle")
    with pytest.raises(ConfigError, match="betas goes with kind 'glmsingle'"):
        local.load(root, stimuli=images, betas="x")
    with pytest.raises(ConfigError, match="takes no entities"):
        local.load(root, stimuli=images, **options, entities={"space": "T1w"})
    with pytest.raises(ConfigError, match="mask of GLMsingle"):
        local.load(root, stimuli=images, **{**options, "mask": {"L": "a"}})


def test_stimuli_without_image_and_images_without_stimulus(tree, caplog):
    root, images, _, _ = tree
    Image.new("RGB", (8, 8)).save(images / "extra.png")
    with pytest.raises(SchemaError, match=r"1 of 4 images.*'extra'.*unseen='exclude'"):
        local.load(root, stimuli=images)
    study = local.load(root, stimuli=images, unseen="exclude")
    assert study.stimuli.ids == ["car", "cat", "dog"]
    assert "1 of 4 images are left out" in caplog.text
    (images / "cat.png").rename(images / "catt.png")
    with pytest.raises(SchemaError, match=r"sub-01: 1 of 3 stimuli have no image.*Did you mean"):
        local.load(root, stimuli=images)
    Image.new("RGB", (8, 8)).save(images / "dog.jpg")
    with pytest.raises(SchemaError, match=r"dog\.jpg and dog\.png, which are one stimulus id"):
        local.load(root, stimuli=images)
    with pytest.raises(UnavailableError, match="no folder of stimuli"):
        local.load(root, stimuli=images / "none")


def test_images_of_one_name_in_two_folders_are_refused(tree):
    root, images, _, _ = tree
    path = root / "sub-01" / "func" / "sub-01_task-images_run-2_events.tsv"
    path.write_text(path.read_text().replace("images/cat", "others/cat"))
    with pytest.raises(SchemaError, match=r"'images/cat\.png' and 'others/cat\.png'.*one image"):
        local.load(root, stimuli=images)


def test_stimuli_are_checked_before_recordings_are_read(tree):
    root, images, _, _ = tree
    for path in root.rglob("*_betas.nii.gz"):
        path.write_bytes(b"not read")
    (images / "cat.png").unlink()
    with pytest.raises(SchemaError, match="'images/cat.png'"):
        local.load(root, stimuli=images)


def test_patterns_say_what_they_looked_for(tree):
    root, images, _, _ = tree
    with pytest.raises(UnavailableError, match=r"sub-01: no file.*Did you mean 'ffa\.nii\.gz'"):
        local.load(root, stimuli=images, rois={"FFA": "sub-{subject}/rois/fffa.nii.gz"})
    with pytest.raises(ConfigError, match=r"2 files match 'sub-\{subject\}/rois/\*'"):
        local.load(root, stimuli=images, rois={"FFA": "sub-{subject}/rois/*"})
    with pytest.raises(ConfigError, match=r"\{sub\} .*Did you mean 'subject'"):
        local.load(root, stimuli=images, rois={"FFA": "sub-{sub}/rois/ffa.nii.gz"})
    with pytest.raises(ConfigError, match="'L' and 'R'"):
        local.load(root, stimuli=images, rois={"FFA": {"left": "x"}})
    with pytest.raises(ConfigError, match="kind is 'beta'.*Did you mean 'betas'"):
        local.load(root, stimuli=images, kind="beta")
    with pytest.raises(UnavailableError, match="there are subjects 01, 02"):
        local.load(root, stimuli=images, subjects=["3"])
    with pytest.raises(ConfigError, match="different labels"):
        local.load(root, stimuli=images, subjects=["01", "sub-01"])
    with pytest.raises(UnavailableError, match=r"no folder sub-\*"):
        local.load(images, stimuli=images)


def test_through_the_command_line(tree, tmp_path, capsys):
    root, images, _, ffa = tree
    out = tmp_path / "out" / "data"
    parameters = {
        "root": str(root),
        "stimuli": str(images),
        "rois": {"FFA": "sub-{subject}/rois/ffa.nii.gz"},
    }
    words = ["responses", "bids", "--out", str(out), "--subjects", "sub-02", "--parameters"]
    assert main([*words, json.dumps(parameters)]) == 0
    bundle = read_bundle(out)
    assert list(bundle.responses) == ["02"]
    assert bundle.responses["02"]["roi_mask"].values.sum() == ffa.sum()
    bundle.stimuli.verify()
    assert bundle.stimuli.ids == ["car", "cat", "dog"]

    shutil.rmtree(out)
    capsys.readouterr()
    for wrong, message in (
        ({**parameters, "roi": {}}, "takes no parameter 'roi'. Did you mean 'rois'"),
        ({"root": str(root)}, "needs the parameter 'stimuli'"),
        ({**parameters, "subjects": ["01"]}, "takes no parameter 'subjects'"),
        ({**parameters, "stimuli": str(tmp_path / "none")}, "no folder of stimuli"),
    ):
        assert main([*words, json.dumps(wrong)]) == 2
        assert message in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_a_folder_with_an_index_keeps_its_ids(tree, tmp_path):
    root, images, _, _ = tree
    pictures = [Image.open(images / f"{n}.png") for n in ("car", "cat", "dog")]
    ids = [f"images/{n}.png" for n in ("car", "cat", "dog")]
    write_stimuli(tmp_path / "indexed", pictures, ids)
    study = local.load(root, stimuli=tmp_path / "indexed", subjects=["01"])
    assert study.stimuli.ids == ids
    assert set(study.responses["01"]["stimulus_id"].values) == set(ids)
