"""The command line: one-line errors with the remedy, tracebacks on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainalign.cli import main


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in (
        "fetch",
        "layers",
        "features",
        "encode",
        "evaluate",
        "report",
        "demo",
        "doctor",
    ):
        assert f"\n    {command} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch", "kay2071"], "Did you mean 'kay2017'"),
        (["layers", "timm:resnet5"], "Did you mean"),
        (["layers", "v1", "--select", "nowhere"], "nowhere"),
        (["run", "nowhere.yaml"], "no configuration"),
    ],
)
def test_an_error_is_one_line_with_its_remedy(words, message, capsys):
    assert main(words) == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith(f"brainalign {words[0]}:")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in text


def test_debug_shows_the_traceback():
    finished = subprocess.run(
        [sys.executable, "-m", "brainalign.cli", "fetch", "nothing", "--debug"],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr and "UnknownNameError" in finished.stderr


def test_layers_and_features_of_a_folder_of_images(images, tmp_path, capsys):
    assert main(["layers", "pixels"]) == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed
    out = tmp_path / "f.json"
    words = ["features", "pixels", "--stimuli", str(images), "--store", str(tmp_path / "store")]
    assert main([*words, "--out", str(out), "--workers", "0"]) == 2
    assert "workers must be at least 1" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--workers", "3"]) == 0
    from brainalign.features import read_manifest

    layers = read_manifest(out)
    assert set(layers) <= set(listed) and layers
    for ds in layers.values():
        assert ds["stimulus_id"].values.tolist() == ["0", "1", "2", "3", "4"]
        assert np.isfinite(ds["features"].values).all()


def test_words_after_two_dashes_are_those_of_snakemake(monkeypatch):
    called = []

    def run(command, **_):
        called.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    config = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
    assert main(["run", config, "--cores", "1", "--", "-n", "small_models"]) == 0
    assert main(["run", config, "--", "-n"]) == 0
    assert [c[c.index("--keep-going") + 1 :] for c in called] == [["-n", "small_models"], ["-n"]]


def test_features_with_another_attention(images, tmp_path, capsys):
    from brainalign.features import read_manifest

    out = tmp_path / "f.json"
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    words = ["features", "random:timm:vit_tiny_patch16_224", "--stimuli", str(images)]
    words += ["--options", json.dumps(size), "--image-size", "32", "--layers", "blocks.0"]
    words += ["--store", str(tmp_path / "store"), "--out", str(out), "--attention"]
    assert main([*words, "agent:m=4"]) == 0
    assert read_manifest(out)["blocks.0"].attrs["attention"].startswith("agent:")
    out.unlink()
    assert main([*words, "agnt"]) == 2
    assert "Known: agent:m=49" in capsys.readouterr().err
    assert not out.exists()


def test_an_optional_model_that_cannot_be_had_says_why(tmp_path):
    card = tmp_path / "card.json"
    words = ["layers", "timm:mobilenetv2_100", "--weights", "nowhere.safetensors"]
    assert main([*words, "--out", str(card)]) == 2
    assert not card.exists()
    assert main([*words, "--out", str(card), "--optional"]) == 0
    record = json.loads(card.read_text())
    assert record["available"] is False and "nowhere.safetensors" in record["reason"]


def test_an_optional_study_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINALIGN_DATA", str(tmp_path / "data"))
    status = tmp_path / "s.json"

    def refuse(*args, **kwargs):
        from brainalign.errors import UnavailableError

        raise UnavailableError("No source gave it.", "Set BRAINALIGN_MIRROR.")

    monkeypatch.setattr("brainalign.data.studies.haxby2001.fetch", refuse)
    assert main(["fetch", "haxby2001", "--status", str(status)]) == 2
    assert not status.exists()
    assert main(["fetch", "haxby2001", "--status", str(status), "--optional"]) == 0
    record = json.loads(status.read_text())
    assert record["available"] is False
    assert record["reason"] == "No source gave it. Set BRAINALIGN_MIRROR."


def test_doctor_finds_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BRAINALIGN_MIRROR", str(tmp_path))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "data folder" in text and "holds no known study" in text
    monkeypatch.setenv("BRAINALIGN_MIRROR", str(tmp_path / "nowhere"))
    assert main(["doctor"]) == 1
    assert "-> export BRAINALIGN_MIRROR=" in capsys.readouterr().out


def test_time_series_from_simulation_to_section(images, tmp_path):
    """Simulated BOLD, image features put on time, a joint model, and its section."""
    from brainalign.data.section import read_section
    from brainalign.data.stimuli import write_stimuli
    from brainalign.encoding import read_result

    rng = np.random.default_rng(0)
    names = [f"im{i:02d}" for i in range(36)]
    pictures = list(rng.integers(0, 255, (36, 32, 32, 3), dtype=np.uint8))
    write_stimuli(tmp_path / "stimuli", pictures, names)
    common = ["--stimuli", str(tmp_path / "stimuli")]
    for name, layers in (("pixels", ["luminance"]), ("v1", ["amplitude"])):
        words = ["features", name, *common, "--store", str(tmp_path / "store")]
        assert main([*words, "--layers", *layers, "--out", str(tmp_path / f"{name}.json")]) == 0
    design = {"time_series": True, "neuroids": 40, "ncsnr": 3, "null": 0.5, "n_runs": 6,
              "n_repetitions": 1, "drift": 0, "noise_sd": 0.1}  # fmt: skip
    words = ["simulate", "--features", str(tmp_path / "v1.json"), *common]
    words += ["--out", str(tmp_path / "data"), "--parameters", json.dumps(design)]
    assert main(words) == 0
    encode = [
        "encode", *common, "--responses", str(tmp_path / "data/responses/sim1.zarr"),
        "--delays", "0", "12", "--inner", "3", "--folds", "3", "--permutations", "50",
        "--bootstraps", "20", "--alphas", "1", "100", "10000", "1000000",
    ]  # fmt: skip
    manifests = [str(tmp_path / f"{n}.json") for n in ("pixels", "v1")]
    out = tmp_path / "sim1"
    assert main([*encode, "--features", manifests[1], "--out", str(out / "v1")]) == 0
    joint = ["--regression", "banded", "--partition", "product", "--candidates", "3"]
    joint += ["--features", *manifests, "--out", str(out / "both")]
    assert main([*encode, *joint]) == 0
    result = read_result(out / "both")
    assert result.best.attrs["delays"] == [0.0, 12.0]
    assert result.best["part"].values.tolist() == ["pixels", "v1"]
    words = ["evaluate", "encoding", "--data", str(tmp_path / "data"), *common]
    words += ["--encoded", str(out / "v1"), str(out / "both"), "--out", str(tmp_path / "section")]
    assert main(words) == 0
    section = read_section(tmp_path / "section")
    assert "partition-both" in [f.id for f in section.figures]
    assert "delayed by 0 to 12 s" in section.methods and "[@duprelatour2022]" in section.methods
    assert "duprelatour2022" in section.references and "lin2024" not in section.references
    # Time series have no clusters of images.
    clusters = ["--clusters", "4", "--embedding", manifests[1], "amplitude"]
    assert main([*encode, "--features", manifests[1], "--out", str(out / "x"), *clusters]) == 2
    # Several models without a joint regression are refused.
    assert main([*encode, "--features", *manifests, "--out", str(out / "x")]) == 2


def test_encode_tests_flagged_images_and_keeps_to_a_half(tmp_path, capsys):
    import xarray as xr

    from brainalign.data.splits import halves
    from brainalign.data.stimuli import write_stimuli
    from brainalign.data.store import read, write

    rng = np.random.default_rng(0)
    ids = np.array([f"im{i:03d}" for i in range(80)])
    shared = np.arange(80) % 4 == 0
    pictures = list(rng.integers(0, 255, (80, 8, 8, 3), dtype=np.uint8))
    stimuli = write_stimuli(tmp_path / "stimuli", pictures, ids, extra={"shared": shared})
    common = ["--stimuli", str(tmp_path / "stimuli")]
    words = ["features", "pixels", *common, "--store", str(tmp_path / "store")]
    assert main([*words, "--layers", "luminance", "--out", str(tmp_path / "pixels.json")]) == 0
    # This subject saw the first 70, twice.
    seen = np.tile(np.arange(70), 2)
    whole = np.zeros(140, dtype=int)
    responses = xr.Dataset(
        {"responses": (("presentation", "neuroid"), rng.normal(size=(140, 3)))},
        coords={
            "stimulus_id": ("presentation", ids[seen]), "subject": "s",
            **{c: ("presentation", whole) for c in ("repetition", "session", "run")},
            "neuroid_id": ("neuroid", ["a", "b", "c"]), "roi": ("neuroid", ["V1"] * 3),
            "hemisphere": ("neuroid", ["L"] * 3),
        },
    )  # fmt: skip
    write(responses, tmp_path / "s.zarr", "responses")
    encode = ["encode", *common, "--features", str(tmp_path / "pixels.json"), "--responses",
              str(tmp_path / "s.zarr"), "--permutations", "0", "--bootstraps", "0", "--inner",
              "gcv"]  # fmt: skip
    half = halves(np.array(stimuli.sha256))[:70]
    for which, kept in ((None, half > 0), ("1", half == 1), ("2", half == 2)):
        out = tmp_path / f"half{which}"
        words = [] if which is None else ["--half", which]
        assert main([*encode, "--out", str(out), "--test", "shared", *words]) == 0
        attrs = read(out / "best.zarr").attrs
        assert json.loads(attrs["stimuli"]) == ids[:70][kept].tolist()
        tested = read(out / "bootstrap.nc")["stimulus_id"].values
        assert sorted(tested.tolist()) == ids[:70][kept & shared[:70]].tolist()
    assert main([*encode, "--out", str(tmp_path / "x"), "--test", "share"]) == 2
    assert "no column 'share'. Did you mean 'shared'" in capsys.readouterr().err
    # What was presented must have features.
    write(responses.assign_coords(stimulus_id=("presentation", np.repeat("new", 140))),
          tmp_path / "s.zarr", "responses", overwrite=True)  # fmt: skip
    assert main([*encode, "--out", str(tmp_path / "x")]) == 2
    assert "have no features" in capsys.readouterr().err


@pytest.fixture
def called(monkeypatch):
    """What the commands call, by name: functions of the same signatures that do nothing."""
    from unittest.mock import create_autospec

    from brainalign import captioning, features, synthesis
    from brainalign.data import section
    from brainalign.synthesis import sections

    made = {}
    for room, names in (
        (synthesis, ("dive", "ascend_pixels", "judge")),
        (sections, ("section_from_folders",)),
        (captioning, ("caption_result", "section_from_captions")),
    ):
        for name in names:
            made[name] = create_autospec(getattr(room, name))
            monkeypatch.setattr(room, name, made[name], raising=False)
    made["load_model"] = create_autospec(features.load_model)
    monkeypatch.setattr(features, "load_model", made["load_model"], raising=False)
    monkeypatch.setattr(section, "write_section", lambda *args, **options: None)
    return made


def test_targets_guidance_and_halves_reach_what_makes_images(called, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("1-2-3\n4-5-6\n")
    common = ["--encoded", "guide", "--rerank", "judge", "--out", "out", "--seed", "7"]
    guidance = json.dumps({"scale": 100, "through_unet": False, "jitter": {"copies": 4}})
    words = ["dive", *common, "--pipeline", "sd", "--guidance", guidance, "--batch-size", "auto"]
    assert main([*words, "--roi", "OPA", "--cluster", "1", "--n-clusters", "2"]) == 0
    given = called["dive"].call_args.kwargs
    assert (given["roi"], given["cluster"], given["n_clusters"]) == ("OPA", 1, 2)
    assert (given["scale"], given["through_unet"], given["batch_size"]) == (100, False, "auto")
    assert (given["seed"], [str(p) for p in given["rerank"]]) == (7, ["judge"])
    assert given["jitter"] == {"copies": 4}
    ascent = ["ascend", *common, "--neuroids", str(ids), "--size", "64"]
    assert main([*ascent, "--jitter", '{"copies": 3}']) == 0
    given = called["ascend_pixels"].call_args.kwargs
    assert given["jitter"] == {"copies": 3}
    assert given["neuroids"] == ("1-2-3", "4-5-6") and given["roi"] is None


def test_prompts_are_given_or_made_of_captions_of_the_target(called, monkeypatch, caplog, tmp_path):
    from brainalign import captioning, synthesis

    words = ["dive", "--encoded", "guide", "--out", "out", "--pipeline", "sd", "--neuroids"]
    ids = Path("ids.txt")
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "n3\nn1\n")
    assert main([*words, str(ids), "--prompts", "a dog", "a cat", "--text-scale", "7.5"]) == 0
    given = called["dive"].call_args.kwargs
    assert (given["prompt"], given["text_scale"]) == (["a dog", "a cat"], 7.5)
    asked = []
    monkeypatch.setattr(synthesis, "read_encoder", lambda path: [encoder_of("n0 n1 n2 n3", "s1")])
    monkeypatch.setattr(
        captioning, "region_prompts",
        lambda captions, region, top: asked.append((str(captions), region, top)) or ["a fox"],
    )  # fmt: skip
    captions = captions_of(tmp_path / "captions.zarr", {"n1": "a fox"}, "s1")
    words += [str(ids), "--captions", str(captions), "--top-nouns", "2"]
    assert main(words) == 0 and called["dive"].call_args.kwargs["prompt"] == ["a fox"]
    assert asked == [(str(captions), ["n1", "n3"], 2)]
    monkeypatch.setattr(captioning, "region_prompts", lambda *_, **__: [])
    assert main(words) == 0 and called["dive"].call_args.kwargs["prompt"] == [""]
    assert "the prompt is empty" in caplog.text


def test_prompts_are_of_the_neuroids_of_the_captioned_subject(
    called, monkeypatch, capsys, tmp_path
):
    from brainalign import captioning, synthesis

    # Both subjects have an n2: in s1 it lies outside the region.
    encoders = {
        "one": encoder_of("n1 n2", "s1", rois="FFA V1"),
        "two": encoder_of("n2 n3", "s2", rois="FFA FFA"),
    }
    monkeypatch.setattr(synthesis, "read_encoder", lambda path: [encoders[path.name]])
    asked = []
    monkeypatch.setattr(
        captioning, "region_prompts", lambda _, region, top: asked.append(region) or ["a fox"]
    )
    words = ["dive", "--encoded", "one", "two", "--out", "out", "--pipeline", "sd", "--roi", "FFA"]
    for subject, neuroids in (("s1", ["n1"]), ("s2", ["n2", "n3"])):
        captions = captions_of(tmp_path / f"{subject}.zarr", {"n1": "a fox"}, subject)
        assert main([*words, "--captions", str(captions)]) == 0 and asked.pop() == neuroids
    captions = captions_of(tmp_path / "s3.zarr", {"n1": "a fox"}, "s3")
    assert main([*words, "--captions", str(captions)]) != 0 and not asked
    assert "captions of subject 's3'; the neuroids are of 's1', 's2'" in capsys.readouterr().err


def test_words_of_judged_neuroids_are_of_the_captioned_subject(called, monkeypatch, tmp_path):
    import xarray as xr

    from brainalign import captioning

    monkeypatch.setattr(captioning, "region_nouns", lambda _, region: dict.fromkeys(region, 1.0))
    captions = captions_of(tmp_path / "s1.zarr", {"n1": "a fox", "n2": "a house"}, "s1")
    judged = tmp_path / "FFA.nc"
    xr.Dataset(
        coords={"neuroid_id": ("neuroid", ["n1", "n2"]), "subject": ("neuroid", ["s1", "s2"])}
    ).to_netcdf(judged)
    panel = {"judged": str(judged), "generated": {"generated": "images"}, "captions": str(captions)}
    words = ["dive-section", "--natural", "stimuli", "--out", "section", "--panels"]
    assert main([*words, json.dumps({"both, FFA": panel})]) == 0
    given = called["section_from_folders"].call_args.kwargs["words"]
    assert given == {"both, FFA": {"n1": 1.0}}


def encoder_of(ids, subject, rois=None):
    import xarray as xr

    coords = {"neuroid_id": ("neuroid", ids.split())}
    if rois is not None:
        coords["roi"] = ("neuroid", rois.split())
    return xr.Dataset(coords=coords, attrs={"subject": subject})


def captions_of(path, said, subject):
    import xarray as xr

    from brainalign.data.store import write

    ds = xr.Dataset(
        {"caption": (("neuroid", "draw"), [[text] for text in said.values()])},
        {"neuroid_id": ("neuroid", [*said]), "roi": ("neuroid", ["FFA"] * len(said)),
         "hemisphere": ("neuroid", ["left"] * len(said))},
        {"subject": subject},
    )  # fmt: skip
    return write(ds, path, "captions")


def test_what_judges_is_told_what_guided(called):
    sets = json.dumps({"generated": "images", "pixel ascent": "ascent"})
    words = ["judge", "--generated", sets, "--natural", "stimuli", "--guide", "guide",
             "--encoded", "judge", "--out", "FFA.nc", "--roi", "FFA", "--against", "OFA",
             "--top", "5", "--labels", '{"face": ["a face"]}',
             "--labeller", '{"name": "timm:x", "seed": 3}']  # fmt: skip
    assert main(words) == 0
    given = called["judge"].call_args.kwargs
    assert (given["guiding"], given["encoder"]) == ([Path("guide")], [Path("judge")])
    assert given["top"] == [5] and given["labels"] == {"face": ["a face"]}
    assert called["load_model"].call_args.kwargs["seed"] == 3
    assert given["labeller"] is called["load_model"].return_value
    panel = {"judged": "FFA.nc", "generated": {"generated": "images"}, "expected": "face"}
    words = ["dive-section", "--natural", "stimuli", "--out", "section", "--panels"]
    assert main([*words, json.dumps({"s1, FFA": panel})]) == 0
    assert called["section_from_folders"].call_args.kwargs["expected"] == {"s1, FFA": "face"}


def test_captions_and_their_section_get_their_options(called):
    words = ["caption", "--encoded", "encoded", "--library", "library.json", "--out", "s1.zarr"]
    words += ["--captioner", "clipcap:w.pt", "--clip", "open_clip:a/b", "--layer", "vision_model"]
    words += ["--check-with", "other", "--prompt", "<image> it is"]
    assert main([*words, "--draws", "3", "--rois", "FFA", "OFA", "--q", "0.1"]) == 0
    given = called["caption_result"].call_args.kwargs
    assert (given["n_draws"], given["rois"], given["q"]) == (3, ["FFA", "OFA"], 0.1)
    assert (given["captioner"], given["clip"]) == ("clipcap:w.pt", "open_clip:a/b")
    assert (given["layer"], given["prompt"]) == ("vision_model", "<image> it is")
    assert str(given["check_with"]) == "other"
    words = ["caption-section", "s1.zarr", "--encoded", "encoded", "--out", "section"]
    maps = {"animals": ["dog", "cat"]}
    assert (
        main([*words, "--clusters", "4", "--layout", "umap", "--word-maps", json.dumps(maps)]) == 0
    )
    given = called["section_from_captions"].call_args.kwargs
    assert (given["n_clusters"], given["layout"], given["word_maps"]) == (4, "umap", maps)
