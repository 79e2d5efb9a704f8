"""The workflow on a very small simulated subject: plan, run, rerun, change, kill nothing."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from plans import plan

from brainalign.config import read_config, workflow_root

pytest.importorskip("snakemake")

CONFIG = {
    "title": "A small run",
    "question": "Does it run?",
    "output": "results/small",
    "seed": 1,
    "studies": {
        "simulated": {
            "loader": "simulated",
            "subjects": ["sim1"],
            "analyses": ["encoding"],
            "parameters": {
                "model": "v1",
                "scenes": {"n": 48, "size": 32},
                "simulation": {"neuroids": 60, "null": 0.3},
            },
        },
        "haxby": {"loader": "haxby2001", "optional": True, "analyses": ["classification"]},
    },
    "models": {
        "v1": {"name": "v1", "layers": ["*"]},
        "pixels": {"name": "pixels", "layers": ["*"], "baseline": True},
        "absent": {
            "name": "timm:mobilenetv2_100",
            "weights": "nowhere.safetensors",
            "layers": ["blocks.*"],
            "optional": True,
        },
    },
    "encoding": {
        "folds": 3,
        "permutations": 50,
        "alphas": [1, 100, 10000],
        "joint": {
            "both": {
                "title": "both spaces",
                "spaces": {"energy": ["v1/amplitude"], "light": ["pixels/luminance"]},
                "inner": 2,
                "candidates": 2,
            },
            # Left out, as one of its models is.
            "never": {"spaces": {"a": ["v1"], "b": ["absent"]}},
        },
    },
    "evaluation": {"bootstraps": 100},
}


class Run:
    """A folder with a configuration that the workflow runs in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(CONFIG)

    def write(self, config: dict) -> None:
        (self.folder / "small.yaml").write_text(yaml.safe_dump(config))

    def __call__(self, *words: str, code: int = 0) -> str:
        # A mirror without studies: what is optional is refused at once, without the network.
        mirror = self.folder / "mirror"
        mirror.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "BRAINALIGN_MIRROR": str(mirror),
            "BRAINALIGN_DATA": str(self.folder / "data"),
            "https_proxy": "http://127.0.0.1:9",
        }
        environment.pop("SNAKEMAKE_PROFILE", None)
        finished = subprocess.run(
            [sys.executable, "-m", "brainalign.cli", "run", "small.yaml", "--", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        text = finished.stdout + finished.stderr
        assert finished.returncode == code, text[-6000:]
        return text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("workflow"))
    plan = run("-n")
    assert "This was a dry-run" in plan and not (run.folder / "results").exists()
    run()
    return run


def jobs(text: str) -> dict[str, int]:
    """Return the number of jobs by rule from snakemake's table."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.split() == ["job", "count"]:
            break
    else:
        return {}
    next(lines)
    counts = {}
    for line in lines:
        words = line.split()
        if len(words) != 2 or not words[1].isdigit():
            break
        counts[words[0]] = int(words[1])
    return counts


def test_the_report_is_there_and_says_what_was_left_out(run):
    page = (run.folder / "results/small/report/index.html").read_text()
    assert "A small run" in page
    assert "nowhere.safetensors" in page
    assert "What each feature space of both spaces explains" in page
    fetched = json.loads((run.folder / "results/small/studies/haxby/fetched.json").read_text())
    assert fetched["available"] is False
    assert not (run.folder / "results/small/sections/haxby-classification").exists()


def test_every_artefact_follows_its_schema(run):
    from brainalign.data.store import read

    out = run.folder / "results/small"
    read(out / "studies/simulated/data/responses/sim1.zarr", "responses")
    for store in (out / "features/store").glob("*/*.zarr"):
        read(store, "features")
    for model in ("v1", "pixels", "both"):
        encoded = out / "encoding/simulated/sim1" / model
        scores = read(encoded / "best.zarr", "scores")
        assert scores.attrs["seed"] == "1"
        assert "responses" in scores.attrs["inputs"] or "sim1.zarr" in scores.attrs["inputs"]
        for store in (encoded / "encoders").glob("*.zarr"):
            read(store, "encoder")


def test_every_rule_left_a_log_and_a_benchmark(run):
    out = run.folder / "results/small"
    for rule in ("fetch", "model", "scenes", "simulate", "features", "encode", "evaluate"):
        assert list((out / "logs" / rule).glob("*.log")), rule
        assert list((out / "benchmarks" / rule).glob("*.tsv")), rule


def test_a_rerun_does_nothing(run):
    assert "Nothing to be done" in run()


def test_a_changed_setting_reruns_only_what_depends_on_it(run):
    config = json.loads(json.dumps(CONFIG))
    config["evaluation"]["bootstraps"] = 120
    run.write(config)
    try:
        planned = jobs(run("-n"))
        assert planned == {"all": 1, "evaluate": 1, "report": 1, "total": 3}
        config["encoding"]["folds"] = 4
        run.write(config)
        planned = jobs(run("-n"))
        assert planned == {"all": 1, "encode": 3, "evaluate": 1, "report": 1, "total": 6}
        config["features"] = {"batch_size": 7}
        run.write(config)
        assert jobs(run("-n")) == planned
    finally:
        run.write(CONFIG)
        os.utime(run.folder / "small.yaml", (1, 1))


def test_snakemakes_own_report_takes_the_captions(run):
    root = workflow_root()
    words = ["--snakefile", str(root / "Snakefile"), "--configfile", "small.yaml"]
    finished = subprocess.run(
        [sys.executable, "-m", "snakemake", *words, "--report", "snakemake.zip"],
        cwd=run.folder,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (run.folder / "snakemake.zip").stat().st_size > 0


def test_a_typo_in_the_configuration_stops_before_any_work(run):
    config = json.loads(json.dumps(CONFIG))
    config["encodng"] = {}
    run.write(config)
    try:
        text = run(code=2)
        assert "Did you mean 'encoding'" in text and "Traceback" not in text
    finally:
        run.write(CONFIG)
        os.utime(run.folder / "small.yaml", (1, 1))


def test_parts_of_the_neuroids_give_what_one_job_gives(run, tmp_path):
    from brainalign.encoding import read_result

    name = "results/small/encoding/simulated/sim1/v1"
    shutil.copytree(run.folder / name, tmp_path / "one")
    config = json.loads(json.dumps(CONFIG))
    config["encoding"] |= {"parts": 2}
    run.write(config)
    planned = jobs(run("-n"))
    steps = {"encode_part": 6, "gather": 3, "evaluate": 1, "report": 1}
    assert planned == {"all": 1, **steps, "total": 12}
    run(name)
    one, two = (read_result(f) for f in (tmp_path / "one", run.folder / name))
    assert not list((run.folder / "results/small/encoding-parts").rglob("*.zarr"))
    for a, b in ((one.best, two.best), (one.scores, two.scores)):
        np.testing.assert_allclose(a["r"].values, b["r"].values, atol=1e-5)
        np.testing.assert_array_equal(a["alpha"].values, b["alpha"].values)
        np.testing.assert_allclose(a["p"].values, b["p"].values, atol=0.05)
    assert (one.best["best_layer"].values == two.best["best_layer"].values).all()
    assert one.best.attrs["inputs"] == two.best.attrs["inputs"]


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_profiles_plan_clean(tmp_path, profile):
    shutil.copytree(workflow_root() / "workflows" / "profiles" / profile, tmp_path / profile)
    run = Run(tmp_path)
    text = run("-n", "--profile", str(tmp_path / profile))
    assert "This was a dry-run" in text


def test_delays_and_joint_models_reach_the_command(tmp_path):
    run = Run(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    # Without what may be missing the whole graph is planned.
    del config["studies"]["haxby"], config["models"]["absent"], config["encoding"]["joint"]["never"]
    config["encoding"] |= {
        "clusters": {"n": 6, "model": "pixels", "layer": "luminance"},
        "device": "cpu,cpu",
    }
    run.write(config)
    text = run("-n", "-p")
    calls = [line for line in text.splitlines() if "brainalign encode" in line]
    embedding = "--clusters 6 --embedding results/small/features/simulated/pixels.json luminance"
    assert len(calls) >= 2 and all(embedding in c and "--device cpu,cpu" in c for c in calls)
    config["studies"]["simulated"] |= {"delays": [-0.5, 12], "direction": "forward"}
    run.write(config)
    text = run("-n", "-p")
    calls = [line for line in text.splitlines() if "brainalign encode" in line]
    assert not any("--clusters" in c for c in calls)
    assert len(calls) >= 2 and all("--delays -0.5 12 --direction forward" in c for c in calls)
    # Leave-one-out leaves out single samples: time series are validated in folds.
    assert all("--inner 5" in c or "--inner 2" in c for c in calls)


def with_synthesis(layers, **synthesis):
    """Return the configuration with small models of these layers and images for one region."""
    config = json.loads(json.dumps(CONFIG))
    del config["studies"]["haxby"], config["models"]["absent"], config["encoding"]["joint"]
    config["models"] = {
        **layers,
        "judge": {"name": "small-judge", "layers": ["output"], "pooling": "unit"},
        "labels": {"name": "small-classifier", "layers": ["output"]},
    }
    config["studies"]["simulated"] |= {"models": [*layers, "judge"]}
    config["studies"]["simulated"]["parameters"]["model"] = "clip"
    config["synthesis"] = {
        "study": "simulated", "model": "clip", "judge": "judge", "classifier": "labels",
        "generator": {"name": "small-diffusion"}, "targets": {"FFA": {"roi": "FFA"}}, **synthesis,
    }  # fmt: skip
    return config


EMBEDDING = {"name": "small-clip", "layers": ["output"], "pooling": "unit"}


def test_a_probe_of_augmented_images_guides_if_it_is_asked_for(tmp_path):
    from brainalign.cli import _parser

    run = Run(tmp_path)
    run.write(with_synthesis({"clip": EMBEDDING}, probe={"n_epochs": 7}))
    text = run("-n", "-p")
    commands = [x.partition("brainalign ")[2].partition(" 2> ")[0] for x in text.splitlines()]
    folder = "results/small/encoding-halves/simulated/sim1"
    args = {
        words[0]: _parser().parse_args(words)
        for words in map(shlex.split, commands)
        if words and words[0] in ("dive", "judge")
    }
    halves = {
        str(a.out): a
        for a in (_parser().parse_args(shlex.split(c)) for c in commands if c.startswith("probe "))
    }
    assert set(halves) == {
        f"{folder}/clip/1.zarr", f"{folder}/clip/2.zarr", f"{folder}/judge/2.zarr",
    }  # fmt: skip
    guide = halves[f"{folder}/clip/1.zarr"]
    assert (guide.model, guide.layer, guide.pooling, guide.half) == (
        "small-clip", "output", "unit", 1,
    )  # fmt: skip
    assert (guide.n_epochs, guide.batch_size, guide.weight_decay, guide.seed) == (7, 64, 0.02, 1)
    assert guide.invalid == "exclude"
    assert str(args["dive"].encoded[0]) in halves and str(args["judge"].encoded[0]) in halves
    assert "encode_half" not in jobs(text) and jobs(text)["encode"] == 2


def test_several_models_guide_rank_and_judge_together(tmp_path):
    run = Run(tmp_path)
    spatial = {"name": "small-clip", "layers": ["visual.layer4"]}
    run.write(
        with_synthesis(
            {"clip": EMBEDDING, "spatial": spatial}, model=["clip", "spatial"], ranker="spatial",
            judge=["judge"],
        )
    )  # fmt: skip
    text = run("-n", "-p")
    folder = "results/small/encoding-halves/simulated/sim1"
    guides = f"{folder}/clip/1 {folder}/spatial/1"
    assert f"brainalign dive --encoded {guides} --rerank {folder}/spatial/2 " in text
    assert f"brainalign judge --guide {guides} --encoded {folder}/judge/2 " in text
    assert jobs(text)["encode_half"] == 4


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> str:
    """The plan of the Natural Scenes Dataset."""
    return plan("nsd", tmp_path_factory.mktemp("nsd"))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory) -> str:
    """The plan of pictures and words for a simulated cortex."""
    return plan("pictures_and_words", tmp_path_factory.mktemp("pictures"))


def commands(text: str, name: str) -> list[list[str]]:
    """Return the words of every planned call of a command."""
    start = f"Shell command: brainalign {name} "
    return [
        shlex.split(line.removeprefix("Shell command: ").partition(" 2> ")[0])
        for line in text.splitlines()
        if line.startswith(start)
    ]


def panels(text: str) -> dict[str, dict]:
    [words] = commands(text, "dive-section")
    return json.loads(words[words.index("--panels") + 1])


def test_the_real_study_is_planned_whole(planned):
    counts = jobs(planned)
    # Eight subjects; twelve targets, of which two are clusters of one region.
    assert counts["dive"] == counts["ascend"] == counts["judge"] == 8 * 12
    assert counts["dive_words"] == 8 * 12
    # Of one model a half guides and the other ranks, of another a half judges; a third is put into
    # words.
    assert counts["encode"] == 8 * 3 and counts["encode_half"] == 8 * 3
    assert counts["caption"] == 8
    assert counts["synthesis_section"] == counts["captioning_section"] == counts["report"] == 1


def test_every_job_of_the_real_study_states_what_it_needs(planned):
    rule, stated = "", {}
    for line in planned.splitlines():
        if line.startswith(("rule ", "checkpoint ", "localrule ")):
            rule = line.split()[1].rstrip(":")
        elif line.strip().startswith("resources:"):
            stated[rule] = dict(x.strip().split("=") for x in line.split(":", 1)[1].split(","))
    del stated["all"]
    assert len(stated) == len(jobs(planned)) - 2  # all, total
    for rule, resources in stated.items():
        for name in ("mem_mb", "runtime", "disk_mb"):
            assert int(resources[name]) > 0, f"{rule}: {name}"
        wants_gpu = rule in ("features", "dive", "dive_words", "ascend", "label", "judge",
                             "library", "caption")  # fmt: skip
        assert int(resources["gpu"]) == wants_gpu, rule


def test_what_guides_ranks_and_judges_are_three_encoders(planned):
    folder = "results/nsd/encoding-halves/nsd/subj03"
    guide, rank, judge = (f"{folder}/{k}" for k in ("clip_b16/1", "clip_b16/2", "clip_b32/2"))
    commands = [line for line in planned.splitlines() if line.startswith("Shell command: ")]
    [dive] = [c for c in commands if "brainalign dive" in c and "images/subj03/FFA " in c]
    assert f"--encoded {guide} --rerank {rank} " in dive
    [judged] = [c for c in commands if "brainalign judge" in c and "judged/subj03/FFA.nc " in c]
    assert f"--guide {guide} --encoded {judge} " in judged
    for encoder in (rank, judge):
        [half] = [c for c in commands if f"--out {encoder} " in c]
        assert "--half 2" in half and "--test seen_by_all" in half


def test_the_captioner_of_the_real_study_reads_what_it_was_trained_on(planned):
    """ClipCap's published weights read embeddings of OpenAI's ViT-B/32, and of no other."""
    import open_clip

    config = read_config(workflow_root() / "configs" / "nsd.yaml")
    captioning = config["captioning"]
    model = config["models"][captioning["model"]]["name"]
    assert model == captioning["captioner"]["clip"] == "open_clip:ViT-B-32-quickgelu/openai"
    assert ("ViT-B-32-quickgelu", "openai") in open_clip.list_pretrained()
    captions = [line for line in planned.splitlines() if "brainalign caption " in line]
    assert captions and all(f"--clip {model} " in c for c in captions)
    assert all(f"/{captioning['model']} " in c for c in captions)


def test_every_predicted_voxel_is_captioned_and_the_report_keeps_to_the_regions(planned):
    captions = commands(planned, "caption")
    assert len(captions) == 8 and not any("--rois" in words for words in captions)
    [section] = commands(planned, "caption-section")
    assert section[section.index("--rois") + 1 :][:3] == ["OFA", "FFA", "EBA"]


def test_regions_are_shown_with_what_captions_say_of_them(planned, pictured):
    # The model that is put into words need not be the one that guides.
    shown = panels(planned)
    assert len(shown) == 8 * 12
    assert all(
        p["captions"] == f"results/nsd/captioning/captions/{name.split(', ')[0]}.zarr"
        for name, p in shown.items()
    )
    clusters = [n for n in shown if n.startswith("subj01, ") and "cluster" in n]
    assert clusters == [f"subj01, OPA, cluster {k} of 2" for k in (1, 2)]
    assert {shown[n]["cluster_of"] for n in clusters} == {"subj01, OPA"}
    assert {p["captions"] for p in panels(pictured).values()} == {
        "results/pictures_and_words/captioning/captions/sim1.zarr"
    }


def test_images_from_captions_are_judged_beside_the_guided_ones(pictured):
    folder = "results/pictures_and_words"
    [words] = [c for c in commands(pictured, "dive") if f"{folder}/synthesis/words/sim1/FFA" in c]
    given = dict(itertools.pairwise(words))
    assert given["--captions"] == f"{folder}/captioning/captions/sim1.zarr"
    guidance = json.loads(given["--guidance"])
    assert (guidance["scale"], guidance["sag_scale"]) == (0, 0)
    assert (given["--top-nouns"], given["--text-scale"], given["--roi"]) == ("5", "7.5", "FFA")
    sets = {
        "generated": f"{folder}/synthesis/images/sim1/FFA",
        "from captions": f"{folder}/synthesis/words/sim1/FFA",
        "pixel ascent": f"{folder}/synthesis/ascent/sim1/FFA",
    }
    assert panels(pictured)["sim1, FFA"]["generated"] == sets
    # Sets and targets are shown in this order, not in that of the alphabet.
    assert list(panels(pictured)["sim1, FFA"]["generated"]) == list(sets)
    targets = [name.split(", ")[1] for name in panels(pictured)]
    assert targets[:6] == ["FFA", "EBA", "PPA", "VWFA", "food", "RSC"]
    [judged] = [
        c for c in commands(pictured, "judge") if f"{folder}/synthesis/judged/sim1/FFA.nc" in c
    ]
    assert json.loads(judged[judged.index("--generated") + 1]) == sets


def test_every_command_of_the_real_study_is_understood(planned, pictured):
    from brainalign.cli import _parser

    parser, seen = _parser(), set()
    for line in (planned + pictured).splitlines():
        if line.startswith("Shell command: brainalign "):
            words = shlex.split(line.removeprefix("Shell command: ").partition(" 2> ")[0])
            seen.add(parser.parse_args(words[1:]).command)
    assert seen >= {"fetch", "responses", "features", "encode", "dive", "ascend", "judge",
                    "dive-section", "caption", "caption-section", "report"}  # fmt: skip


def test_every_small_model_is_trained_by_a_command_that_its_trainer_understands(
    tmp_path, monkeypatch
):
    run = Run(tmp_path)
    run.write(CONFIG)
    text = run("-n", "-p", "small_models")
    calls = {}
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    for line in text.splitlines():
        if "python -m brainalign.small_models." in line:
            words = shlex.split(line.partition("python -m ")[2].partition(" 2> ")[0])
            module, name = words[0], Path(words[words.index("--out") + 1]).name
            trainer = importlib.import_module(module)
            monkeypatch.setattr(
                trainer,
                "train_" + module.rpartition(".")[2],
                lambda out, name=name, **options: calls.setdefault(name, options),
            )
            assert trainer.main(words[1:]) == 0
    assert calls.keys() == {
        "small_clip", "small_judge", "small_classifier", "small_captioner", "small_diffusion"
    }  # fmt: skip
    # Those that judge share no scenes with those that guide.
    assert len({calls[n]["seed"] for n in ("small_clip", "small_judge", "small_classifier")}) == 3
    for name in ("small_captioner", "small_diffusion"):
        assert calls[name]["clip"].name == "small_clip"
    assert calls["small_diffusion"]["judge"].name == "small_classifier"
