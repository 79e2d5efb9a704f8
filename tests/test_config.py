"""Configurations: typos are named with the nearest key, defaults are filled in."""

from __future__ import annotations

import copy

import pytest
import yaml

from brainalign.config import (
    read_config,
    synthesis_targets,
    validate_config,
    workflow_root,
)
from brainalign.errors import ConfigError

CONFIG = {
    "title": "t",
    "question": "q?",
    "output": "out",
    "studies": {"sim": {"loader": "simulated", "analyses": ["encoding"]}},
    "models": {"v1": {"name": "v1", "layers": ["*"]}},
}


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    return config


def test_defaults_are_filled_in_and_the_input_is_untouched():
    before = copy.deepcopy(CONFIG)
    config = validate_config(CONFIG)
    assert before == CONFIG
    assert config["seed"] == 0
    assert config["encoding"]["folds"] == 5
    assert config["studies"]["sim"]["models"] == ["v1"]
    assert config["studies"]["sim"]["optional"] is False
    assert config["models"]["v1"]["pooling"] == "mean"
    assert validate_config(config) == config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encodings",), {}, "unknown key 'encodings' at the top level. Did you mean 'encoding'"),
        (("encoding", "alpha"), [1], "unknown key 'alpha' at encoding. Did you mean 'alphas'"),
        (("encoding", "folds"), 1, "at encoding.folds"),
        (("encoding", "inner"), "lo", "Did you mean 'loo'"),
        (("studies", "sim", "loader"), "kay2071", "Did you mean 'kay2017'"),
        (("studies", "sim", "models"), ["v2"], "Did you mean 'v1'"),
        (("studies", "sim", "optional"), True, "fetches nothing"),
        (("models", "v1", "layer"), ["*"], "'layer' at models.v1. Did you mean 'layers'"),
        (("encoding", "joint", "j"), {"spaces": {"a": ["v1"], "b": ["v2/x"]}}, "Did you mean 'v1'"),
        (("encoding", "joint", "v1"), {"spaces": {"a": ["v1"], "b": ["v1"]}}, "a joint model"),
        (("encoding", "joint", "j"), {"spaces": {"a": ["v1"]}}, "at encoding.joint.j.spaces"),
        (("encoding", "clusters"), {"n": 9, "model": "v2", "layer": "x"}, "Did you mean 'v1'"),
        (("encoding", "clusters"), {"n": 3, "model": "v1", "layer": "x"}, "fewer than the 5 folds"),
        (("studies", "sim", "direction"), "backward", "has a direction, but no delays"),
        (("studies", "sim", "delays"), [3, 1], "must be first and last"),
        (("models", "v1", "attention"), "k=7", "at models.v1.attention"),
        (("models", "v1", "atention"), "flow", "Did you mean 'attention'"),
        (("studies", "a b"), {"loader": "simulated", "analyses": ["rsa"]}, "a b"),
    ],
)
def test_a_fault_is_named_with_the_nearest_known_name(path, value, message):
    with pytest.raises(ConfigError) as caught:
        validate_config(changed(path, value))
    assert message in str(caught.value)


def test_only_photographs_shown_to_models_need_no_study():
    config = {
        "title": "t", "question": "q", "output": "o", "studies": {},
        "models": {"m": {"name": "small-clip", "layers": ["output"]}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="names no study"):
        validate_config(config)
    block = {"stimuli": {"folder": "f"}, "observers": {"o": {"model": "m"}}}
    assert validate_config(config | {"psychophysics": block})["studies"] == {}
    block["stimuli"] = {"study": "f"}
    with pytest.raises(ConfigError, match="stimuli.study is 'f'"):
        validate_config(config | {"psychophysics": block})


def test_attention_of_a_model_has_no_default():
    assert "attention" not in validate_config(CONFIG)["models"]["v1"]
    config = validate_config(changed(("models", "v1", "attention"), "neighborhood:k=7,d=2"))
    assert config["models"]["v1"]["attention"] == "neighborhood:k=7,d=2"


ENCODED = {
    **CONFIG,
    "studies": {
        "nsd": {"loader": "allen2022", "analyses": ["encoding"], "subjects": ["subj01", "subj02"],
                "models": ["clip", "other"]},
        "rsa": {"loader": "kriegeskorte2008", "analyses": ["rsa"]},
        "things": {"loader": "bids", "analyses": ["encoding"], "subjects": ["subj02"]},
    },
    "models": {
        "clip": {"name": "open_clip:ViT-B-16/x", "layers": ["output"], "pooling": "unit"},
        "other": {"name": "open_clip:ViT-B-32/x", "layers": ["output", "visual"]},
        "labels": {"name": "open_clip:convnext/x", "layers": ["output"]},
    },
    "synthesis": {
        "study": "nsd", "model": "clip", "judge": "other", "classifier": "labels",
        "generator": {"name": "models/sd"}, "words": {},
        "targets": {"FFA": {"roi": "FFA", "prefers": "face"}, "OPA": {"roi": "OPA", "clusters": 2},
                    "faces": {"roi": "OFA", "against": "FFA"}, "mine": {"neuroids": "ids.txt"}},
    },
    "captioning": {
        "study": "nsd", "model": "clip", "library": {"folder": "images"},
        "captioner": {"name": "models/clipcap"}, "subjects": ["subj02"],
    },
}  # fmt: skip


def test_methods_on_encoders_have_subjects_judges_and_targets():
    config = validate_config(ENCODED)
    assert config["synthesis"]["subjects"] == ["subj01", "subj02"]
    assert config["captioning"]["subjects"] == ["subj02"]
    assert config["captioning"]["temperature"] == pytest.approx(1 / 150)
    named = copy.deepcopy(ENCODED)
    named["captioning"]["captioner"] = {"name": "clipcap:w.pt", "clip": "open_clip:ViT-B-16/x"}
    validate_config(named)
    assert config["synthesis"]["generator"]["scheduler"] == "dpmsolver++"
    assert config["synthesis"]["guidance"]["scale"] == 130
    assert "ascent" not in config["synthesis"]
    assert set(config["synthesis"]["labels"]) == {"face", "place", "body", "word", "food"}
    assert synthesis_targets(config) == {
        "FFA": {"roi": "FFA", "prefers": "face"},
        "OPA_1": {"roi": "OPA", "cluster": 0, "n_clusters": 2},
        "OPA_2": {"roi": "OPA", "cluster": 1, "n_clusters": 2},
        "faces": {"roi": "OFA", "against": "FFA"},
        "mine": {"neuroids": "ids.txt"},
    }
    assert validate_config(config) == config
    assert synthesis_targets(validate_config(CONFIG)) == {}
    ordered = copy.deepcopy(ENCODED)
    ordered["synthesis"]["labels"] = ["face", "body", "place"]
    assert validate_config(ordered)["synthesis"]["labels"] == ["face", "body", "place"]
    assert config["synthesis"]["ranker"] == ["clip"]
    alone = copy.deepcopy(ENCODED)
    del alone["synthesis"]["judge"]
    with pytest.raises(ConfigError, match="'judge' is missing at synthesis"):
        validate_config(alone)
    probed = copy.deepcopy(ENCODED)
    probed["synthesis"]["probe"] = {"n_epochs": 20}
    with pytest.raises(ConfigError, match="a probe is fitted to one layer"):
        validate_config(copy.deepcopy(probed))
    probed["models"]["other"]["layers"] = ["output"]
    probe = {"n_epochs": 20, "learning_rate": 3e-4, "weight_decay": 0.02, "batch_size": 64}
    assert validate_config(probed)["synthesis"]["probe"] == probe
    assert "probe" not in config["synthesis"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("synthesis", "classifer"), "labels", "Did you mean 'classifier'"),
        (("synthesis", "study"), "nds", "synthesis.study is 'nds', which is not under studies."),
        (("synthesis", "study"), "rsa", "has no encoding models of images"),
        (("synthesis", "model"), "clp", "Did you mean 'clip'"),
        (("synthesis", "judge"), "labels", "not among the models of the study 'nsd'"),
        (("synthesis", "judge"), "clip", "which guides: the activation of images"),
        (("synthesis", "ranker"), "other", "which ranks: the activation"),
        (
            ("synthesis", "judge"),
            ["other", "clip"],
            "judge is 'clip', which guides: the activation",
        ),
        (("synthesis", "classifier"), "clip", "which guides: the labels of images"),
        (("synthesis", "classifier"), "other", "which judges: the labels of images"),
        (("synthesis", "words"), {"text_scale": 1}, "at synthesis.words.text_scale"),
        (("captioning", "study"), "things", "synthesis.words makes images from captions"),
        (("synthesis", "classifier"), "label", "Did you mean 'labels'"),
        (("synthesis", "subjects"), ["subj03"], "A subject of synthesis is 'subj03'"),
        (("synthesis", "targets", "FFA"), {}, "needs roi or neuroids"),
        (("synthesis", "targets", "FFA"), {"roi": "A", "neuroids": "f"}, "one of the two"),
        (("synthesis", "targets", "FFA"), {"neuroids": "f", "clusters": 2}, "which are of a roi"),
        (("synthesis", "targets", "FFA"), {"roi": "A", "against": "B", "clusters": 2}, "has both"),
        (("synthesis", "targets", "FFA"), {"roi": "A", "prefers": "fac"}, "Did you mean 'face'"),
        (("synthesis", "targets", "OPA_1"), {"roi": "A"}, "have one name"),
        (("synthesis", "targets", "a b"), {"roi": "A"}, "a b"),
        (("synthesis", "generator", "scheduler"), "dpmsolver", "Did you mean 'dpmsolver++'"),
        (("synthesis", "ascent"), {}, "'size' is missing at synthesis.ascent"),
        (("synthesis", "probe"), {}, "synthesis.judge is 'other', whose layers are output, visual"),
        (("synthesis", "batch_size"), 0, "at synthesis.batch_size"),
        (("synthesis", "guidance"), {"sag": 1}, "unknown key 'sag' at synthesis.guidance"),
        (("captioning", "model"), "other", "whose layers are ['output', 'visual']"),
        (("captioning", "captioner"), {"name": "clipcap:w.pt"}, "captioning.captioner.clip"),
        (
            ("captioning", "captioner", "clip"),
            "open_clip:ViT-B-32/x",
            "captioning.model is 'clip', which is 'open_clip:ViT-B-16/x'",
        ),
        (("captioning", "library"), {}, "at captioning.library"),
        (("captioning", "library"), {"study": "nds"}, "Did you mean 'nsd'"),
        (("captioning", "library"), {"study": "nsd", "folder": "x"}, "at captioning.library"),
        (("captioning", "word_maps"), {"animals": []}, "at captioning.word_maps.animals"),
        (("captioning", "word_maps"), {"wild animals": ["lion"]}, "wild animals"),
        (("captioning", "baseline"), {"flag": "test"}, "a folder, or a study"),
        (("captioning", "baseline"), {"folder": "x", "flag": "test"}, "a folder, or a study"),
        (("captioning", "baseline"), {"study": "nds"}, "Did you mean 'nsd'"),
        (("encoding", "clusters"), {"n": 9, "model": "clip", "layer": "output"}, "both say which"),
    ],
)
def test_faults_of_methods_on_encoders_are_named(path, value, message):
    config = copy.deepcopy(ENCODED)
    config["encoding"] = {"test": "seen_by_all"}
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        validate_config(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "differs", [{"layers": ["visual"]}, {"pooling": "mean", "title": "C"}, {"image_size": 336}]
)
def test_a_network_that_chose_the_images_is_told_by_more_than_its_key(differs):
    config = copy.deepcopy(ENCODED)
    config["models"]["again"] = config["models"]["clip"] | differs
    config["studies"]["nsd"]["models"] = ["clip", "other", "again"]
    config["synthesis"] |= {"model": ["again", "clip"], "ranker": "clip"}
    validate_config(copy.deepcopy(config))
    for roles, message in (
        ({"model": "clip", "judge": ["other", "again"]},
         "synthesis.judge is 'again', the network of 'clip', which guides: the activation"),
        ({"model": "other", "ranker": "clip", "judge": "again"},
         "synthesis.judge is 'again', the network of 'clip', which ranks: the activation"),
        ({"model": "clip", "classifier": "again"},
         "synthesis.classifier is 'again', the network of 'clip', which guides: the labels"),
        ({"model": "other", "ranker": ["other", "clip"], "judge": "labels", "classifier": "again"},
         "synthesis.classifier is 'again', the network of 'clip', which ranks: the labels"),
        ({"model": "other", "ranker": "other", "judge": "clip", "classifier": "again"},
         "synthesis.classifier is 'again', the network of 'clip', which judges: the labels"),
    ):  # fmt: skip
        wrong = copy.deepcopy(config)
        wrong["studies"]["nsd"]["models"].append("labels")
        wrong["synthesis"] |= roles
        with pytest.raises(ConfigError) as caught:
            validate_config(wrong)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "differs",
    [
        {"name": "random:open_clip:ViT-B-16/x"},
        {"weights": "other.safetensors"},
        {"options": {"num_classes": 9}},
    ],
)
def test_other_weights_or_options_make_another_network(differs):
    config = copy.deepcopy(ENCODED)
    config["models"]["again"] = config["models"]["clip"] | differs
    config["studies"]["nsd"]["models"] = ["clip", "again"]
    config["synthesis"]["judge"] = "again"
    assert validate_config(config)["synthesis"]["judge"] == ["again"]


def test_a_vision_language_captioner_reads_one_layer_and_another_model_checks_its_words():
    config = copy.deepcopy(ENCODED)
    config["captioning"]["captioner"] = {"name": "transformers:git"}
    config["captioning"] |= {"model": "other", "check_with": "clip"}
    config["models"]["other"]["layers"] = ["vision_model"]
    assert validate_config(config)["captioning"]["check_with"] == "clip"
    for layers in (["vision_model.*"], ["output", "visual"], ["re:vision"]):
        config["models"]["other"]["layers"] = layers
        with pytest.raises(ConfigError, match="in the space of one layer"):
            validate_config(config)
    config["models"]["other"]["layers"] = ["vision_model"]
    config["captioning"] |= {"model": "clip", "check_with": "other"}
    with pytest.raises(ConfigError, match="captioning.check_with is 'other', whose layers"):
        validate_config(config)
    config["captioning"]["check_with"] = "labels"
    with pytest.raises(ConfigError, match="not among the models of the study"):
        validate_config(config)


def test_methods_on_encoders_need_subjects_by_name():
    config = copy.deepcopy(ENCODED)
    del config["studies"]["nsd"]["subjects"]
    with pytest.raises(ConfigError, match="needs the subjects of the study 'nsd' by name"):
        validate_config(config)
    config = copy.deepcopy(ENCODED)
    config["studies"]["nsd"]["optional"] = True
    with pytest.raises(ConfigError, match="which is optional"):
        validate_config(config)


def test_a_missing_key_is_named():
    config = copy.deepcopy(CONFIG)
    del config["question"]
    with pytest.raises(ConfigError, match="'question' is missing"):
        validate_config(config)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'demo\.yaml'"):
        read_config(tmp_path / "dmo.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_config(bad)
    bad.write_text("- a")
    with pytest.raises(ConfigError, match="no mapping"):
        read_config(bad)


@pytest.mark.parametrize(
    "path",
    [p for p in (workflow_root() / "configs").glob("*.yaml") if p.name != "schema.yaml"],
    ids=lambda p: p.name,
)
def test_shipped_configurations_are_valid(path):
    assert read_config(path)["title"]
    assert yaml.safe_load(path.read_text())["output"].startswith("results/")
