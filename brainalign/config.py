"""Configurations: read, validated against ``configs/schema.yaml``, and completed with defaults."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from brainalign.errors import ConfigError, near

__all__ = [
    "LISTENING",
    "UNFETCHED",
    "joint_models",
    "read_config",
    "sweep_models",
    "synthesis_targets",
    "validate_config",
    "workflow_root",
]


#: Loaders that fetch nothing, and those of people who listen, with the analyses that they allow.
UNFETCHED = ("simulated", "bids", "bids_listening")
LISTENING = {
    "listener": ("attention", "trf"),
    "biesmans2016": ("attention", "trf"),
    "fuglsang2017": ("attention", "trf"),
    "zada2025": ("trf",),
    "bids_listening": ("attention", "trf"),
}


def workflow_root() -> Path:
    """Return the folder with the Snakefile, ``workflows`` and ``configs``.

    In a wheel it lies inside the package, in a checkout beside it.
    """
    package = Path(__file__).resolve().parent
    inside = package / "_workflow"
    return inside if inside.is_dir() else package.parent


@cache
def _schema() -> dict[str, Any]:
    import yaml

    text = (workflow_root() / "configs" / "schema.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _where(path: Any) -> str:
    return ".".join(str(p) for p in path) or "the top level"


def _message(error: Any) -> str:
    """Return what is wrong and where, with the nearest known key or value for a typo."""
    where = _where(error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        unknown = [k for k in error.instance if k not in known]
        return f"unknown key {unknown[0]!r} at {where}.{near(unknown[0], known)}"
    if error.validator == "required":
        missing = [k for k in error.validator_value if k not in error.instance]
        return f"key {missing[0]!r} is missing at {where}.{near(missing[0], error.instance)}"
    if error.validator == "enum":
        known = [str(v) for v in error.validator_value]
        return (
            f"{error.instance!r} at {where} is not one of {', '.join(known)}."
            f"{near(str(error.instance), known)}"
        )
    return f"{error.message} at {where}."


def _fill(instance: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> None:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    if not isinstance(instance, dict):
        return
    for key, sub in schema.get("properties", {}).items():
        if key not in instance and "default" in sub:
            instance[key] = copy.deepcopy(sub["default"])
        if key in instance:
            _fill(instance[key], sub, root)
    others = schema.get("additionalProperties")
    if isinstance(others, Mapping):
        for key in instance:
            if key not in schema.get("properties", {}):
                _fill(instance[key], others, root)


def validate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with defaults filled in.

    Parameters
    ----------
    config : mapping
        As read from YAML.

    Returns
    -------
    dict
        A completed copy.

    Raises
    ------
    ConfigError
        Naming every key or value at fault, with the nearest known name.
    """
    import jsonschema

    completed = copy.deepcopy(dict(config))
    schema = _schema()
    validator = jsonschema.Draft202012Validator(schema)
    messages = [_message(e) for e in sorted(validator.iter_errors(completed), key=str)]
    if messages:
        raise ConfigError(
            "The configuration cannot be used: " + " ".join(messages),
            "configs/schema.yaml describes every key.",
        )
    _fill(completed, schema, schema)
    if not completed["studies"] and "psychophysics" not in completed:
        raise ConfigError("The configuration names no study.", "Name one under studies.")
    for name, study in completed["studies"].items():
        study.setdefault("title", name)
        if study["optional"] and study["loader"] in UNFETCHED:
            raise ConfigError(
                f"The study {name!r} is optional, but loader {study['loader']!r} fetches nothing.",
                "Remove optional: true.",
            )
        study.setdefault("models", list(completed["models"]))
        unknown = [m for m in study["models"] if m not in completed["models"]]
        if unknown:
            raise ConfigError(
                f"The study {name!r} names the model {unknown[0]!r}, which is not under models."
                f"{near(unknown[0], completed['models'])}"
            )
    for name, model in completed["models"].items():
        model.setdefault("title", name)
    for name, joint in completed["encoding"]["joint"].items():
        joint.setdefault("title", name)
        if name in completed["models"]:
            raise ConfigError(f"{name!r} names a model and a joint model.", "Rename one.")
        for model in joint_models(joint):
            if model not in completed["models"]:
                raise ConfigError(
                    f"encoding.joint.{name} names the model {model!r}, which is not under models."
                    f"{near(model, completed['models'])}"
                )
    clusters = completed["encoding"].get("clusters")
    if clusters is not None and clusters["model"] not in completed["models"]:
        raise ConfigError(
            f"encoding.clusters names the model {clusters['model']!r}, which is not under models."
            f"{near(clusters['model'], completed['models'])}"
        )
    if clusters is not None and clusters["n"] < completed["encoding"]["folds"]:
        raise ConfigError(
            f"encoding.clusters.n is {clusters['n']}, fewer than the "
            f"{completed['encoding']['folds']} folds that are made of them."
        )
    if clusters is not None and "test" in completed["encoding"]:
        raise ConfigError(
            "encoding.test and encoding.clusters both say which images are tested.", "Keep one."
        )
    for name, study in completed["studies"].items():
        if "direction" in study and "delays" not in study:
            raise ConfigError(f"The study {name!r} has a direction, but no delays.")
        if "delays" in study and "test" in completed["encoding"]:
            raise ConfigError(
                f"encoding.test names tested images, but the study {name!r} is a time series."
            )
        if "delays" in study and not study["delays"][0] <= study["delays"][1]:
            raise ConfigError(f"The delays of {name!r} must be first and last, in seconds.")
    _check_listening(completed)
    if "attention_sweep" in completed:
        _check_sweep(completed)
    for method in ("synthesis", "captioning"):
        if method in completed:
            _check_encoded(completed, method)
    if "synthesis" in completed:
        _check_synthesis(completed)
    if "captioning" in completed:
        _check_captioning(completed)
    if "psychophysics" in completed:
        _check_psychophysics(completed)
    return completed


def _check_listening(config: dict[str, Any]) -> None:
    """Refuse studies of listening that cannot be analysed; fill in the titles of decoders."""
    ours = {a for allowed in LISTENING.values() for a in allowed}
    for name, study in config["studies"].items():
        allowed = LISTENING.get(study["loader"], ())
        wrong = [
            a
            for a in study["analyses"]
            if a not in allowed and (a in ours or study["loader"] in LISTENING)
        ]
        if wrong or (allowed and not study["analyses"]):
            by = [loader for loader, a in LISTENING.items() if wrong and wrong[0] in a]
            raise ConfigError(
                f"The study {name!r} has the loader {study['loader']!r} and the analyses "
                f"{', '.join(study['analyses']) or 'none'}.",
                f"The analysis {wrong[0]} is for the loaders {', '.join(by)}."
                if by
                else f"Analyses of this loader: {', '.join(allowed)}.",
            )
        if not allowed:
            continue
        if "listening" not in config:
            raise ConfigError(
                f"The study {name!r} is of listening, but there is no key listening.",
                "Name the decoders there, or the features of response functions.",
            )
        if "attention" in study["analyses"] and not config["listening"]["decoders"]:
            raise ConfigError(
                f"The study {name!r} has the analysis attention, but listening has no decoders.",
                "Name them under listening.decoders.",
            )
        lacking = [
            target
            for target in config["listening"]["trf"]["targets"]
            if "trf" in study["analyses"] and target not in config["listening"]["spaces"]
        ]
        if lacking:
            raise ConfigError(
                f"listening.trf.targets has {lacking[0]!r}, which is not among listening.spaces."
            )
        if "subjects" not in study:
            raise ConfigError(f"The study {name!r} needs its subjects by name.")
        if study["loader"] == "listener" and "sounds" not in study["parameters"]:
            raise ConfigError(
                f"The study {name!r} needs parameters.sounds: a study with a clip of each talker, "
                "such as panayotov2015."
            )
    listening = config.get("listening", {"decoders": {}})
    for key, decoder in listening["decoders"].items():
        decoder.setdefault("title", key)
        decoder.setdefault("split", listening["split"])
        decoder.setdefault("repeated", listening["repeated"])
        alone = [
            name
            for name, study in config["studies"].items()
            if "attention" in study["analyses"] and len(study["subjects"]) < 2
        ]
        if decoder["split"] == "subject" and alone:
            raise ConfigError(
                f"The decoder {key!r} leaves out a subject; {alone[0]!r} has no other.",
                "Name more subjects, or split by trial or stimulus.",
            )


def _known(name: str | None, known: Mapping[str, Any], where: str, group: str) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{where} is {name!r}, which is not under {group}.{near(name, known)}")


def _check_encoded(config: dict[str, Any], method: str) -> None:
    """Refuse a method on encoders that the configuration does not make; fill in its subjects."""
    block, studies = config[method], config["studies"]
    _known(block["study"], studies, f"{method}.study", "studies")
    study = studies[block["study"]]
    if "encoding" not in study["analyses"] or "delays" in study:
        raise ConfigError(
            f"{method}.study is {block['study']!r}, which has no encoding models of images.",
            "Name a study with the analysis encoding and without delays.",
        )
    if study["optional"]:
        raise ConfigError(
            f"{method}.study is {block['study']!r}, which is optional.", "Remove optional: true."
        )
    for role in ("model", "ranker", "judge", "check_with"):
        for name in _listed(block.get(role, [])):
            _known(name, config["models"], f"{method}.{role}", "models")
            if name not in study["models"]:
                raise ConfigError(
                    f"{method}.{role} is {name!r}, which is not among the models of the study "
                    f"{block['study']!r}.{near(name, study['models'])}"
                )
    if "subjects" not in study:
        raise ConfigError(f"{method} needs the subjects of the study {block['study']!r} by name.")
    block.setdefault("subjects", list(study["subjects"]))
    for subject in block["subjects"]:
        _known(subject, dict.fromkeys(study["subjects"]), f"A subject of {method}",
               f"studies.{block['study']}.subjects")  # fmt: skip


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _network(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a network from others, whatever its layers and its preprocessing are."""
    return {key: model.get(key) for key in ("name", "weights", "options")}


def _check_apart(
    config: Mapping[str, Any], role: str, name: str, others: Mapping[str, str], why: str
) -> None:
    """Refuse a model of `synthesis` that is the network of another role, in any of its layers."""
    models = config["models"]
    for other, does in others.items():
        for used in config["synthesis"][other]:
            if _network(models[used]) == _network(models[name]):
                which = "" if used == name else f"the network of {used!r}, "
                raise ConfigError(
                    f"synthesis.{role} is {name!r}, {which}which {does}: {why}",
                    "Name a model of another architecture.",
                )


def _check_synthesis(config: dict[str, Any]) -> None:
    block = config["synthesis"]
    block.setdefault("ranker", block["model"])
    roles = ("model", "ranker", "judge")
    block |= {role: _listed(block[role]) for role in roles}
    chosen = {"model": "guides", "ranker": "ranks"}
    for name in block["judge"]:
        _check_apart(
            config, "judge", name, chosen,
            "the activation of images would be measured by what chose them.",
        )  # fmt: skip
    _known(block["classifier"], config["models"], "synthesis.classifier", "models")
    _check_apart(
        config, "classifier", block["classifier"], {**chosen, "judge": "judges"},
        "the labels of images would come from what chose or judges them.",
    )  # fmt: skip
    probed = [(role, name) for role in roles for name in block[role]] if "probe" in block else []
    for role, name in probed:
        layers = config["models"][name]["layers"]
        if len(layers) > 1 or "*" in layers[0]:
            raise ConfigError(
                f"synthesis.{role} is {name!r}, whose layers are {', '.join(layers)}: a "
                "probe is fitted to one layer.",
                "Name one layer of that model, or leave synthesis.probe out.",
            )
    for name, target in block["targets"].items():
        where = f"synthesis.targets.{name}"
        if ("roi" in target) == ("neuroids" in target):
            raise ConfigError(f"{where} needs roi or neuroids, one of the two.")
        if "roi" not in target and {"against", "clusters"} & set(target):
            raise ConfigError(f"{where} has a contrast or clusters, which are of a roi.")
        if {"against", "clusters"} <= set(target):
            raise ConfigError(f"{where} has both against and clusters.", "Make two targets.")
        if "prefers" in target:
            _known(target["prefers"], block["labels"], f"{where}.prefers", "synthesis.labels")
    if "words" in block and config.get("captioning", {}).get("study") != block["study"]:
        raise ConfigError(
            "synthesis.words makes images from captions, but captioning is not of the study "
            f"{block['study']!r}.",
            "Add captioning of that study, or remove synthesis.words.",
        )
    expected = sum(t.get("clusters", 1) for t in block["targets"].values())
    if len(synthesis_targets(config)) != expected:
        raise ConfigError("Two targets of synthesis.targets have one name: a cluster is NAME_1.")


def _check_captioning(config: dict[str, Any]) -> None:
    block = config["captioning"]
    for part in ("library", "baseline"):
        study = block.get(part, {}).get("study")
        _known(study, config["studies"], f"captioning.{part}.study", "studies")
    baseline = block.get("baseline", {"study": ""})
    if ("study" in baseline) == ("folder" in baseline) or {"folder", "flag"} <= set(baseline):
        raise ConfigError(
            "captioning.baseline is a folder, or a study with or without a flag; it has "
            f"{', '.join(baseline)}."
        )
    clip, named = block["captioner"].get("clip"), config["models"][block["model"]]["name"]
    if clip is None and block["captioner"]["name"].startswith("clipcap:"):
        raise ConfigError(
            f"captioning.captioner is {block['captioner']['name']!r}, a checkpoint that does not "
            "say which model's embeddings it reads.",
            "Name that model with captioning.captioner.clip.",
        )
    if clip not in (None, named):
        raise ConfigError(
            f"captioning.captioner reads embeddings of {clip!r}; captioning.model is "
            f"{block['model']!r}, which is {named!r}.",
            f"Name a model that is {clip!r}, or another captioner.",
        )
    states = block["captioner"]["name"].startswith("transformers:")
    for role in ("model", "check_with"):
        layers = config["models"][block[role]]["layers"] if role in block else ["output"]
        if role == "model" and states:
            if len(layers) != 1 or layers[0].startswith("re:") or set("*?[") & set(layers[0]):
                raise ConfigError(
                    f"captioning.model is {block[role]!r}, whose layers are {layers}: weights are "
                    "projected in the space of one layer.",
                    "Add a model with the one layer that the captioner reads, by its full name.",
                )
        elif layers != ["output"]:
            raise ConfigError(
                f"captioning.{role} is {block[role]!r}, whose layers are {layers}: weights are "
                "projected, and texts lie, in the space of the model's output.",
                "Add a model with layers: [output].",
            )


def _check_psychophysics(config: dict[str, Any]) -> None:
    block = config["psychophysics"]
    _known(block["stimuli"].get("study"), config["studies"], "psychophysics.stimuli.study",
           "studies")  # fmt: skip
    for name, observer in block["observers"].items():
        where = f"psychophysics.observers.{name}"
        _known(observer["model"], config["models"], f"{where}.model", "models")
        observer.setdefault("title", name)
        if config["models"][observer["model"]]["optional"]:
            raise ConfigError(f"{where}.model is optional.", "Remove optional: true.")
        if observer["by"] == "readout" and "images" not in block:
            raise ConfigError(
                f"{where} is a readout, which learns from images that are not tested.",
                "Say with psychophysics.images how many are tested.",
            )
    if "areas" in block:
        areas = block["areas"]
        _check_encoded({**config, "areas": areas}, "areas")
        areas.setdefault("subject", areas.pop("subjects")[0])
        _known(areas["subject"], dict.fromkeys(config["studies"][areas["study"]]["subjects"]),
               "psychophysics.areas.subject", f"studies.{areas['study']}.subjects")  # fmt: skip


def synthesis_targets(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what images are made for, by name, with each cluster of a region as a target.

    Parameters
    ----------
    config : mapping
        Of `validate_config`.

    Returns
    -------
    dict of str to dict
        ``roi``, ``against``, ``neuroids``, ``prefers``, and for a cluster ``n_clusters`` and
        ``cluster`` (from 0; its name ends in _1 ...), as far as they are given. Empty without
        synthesis.
    """
    targets: dict[str, dict[str, Any]] = {}
    for name, given in config.get("synthesis", {}).get("targets", {}).items():
        target = {k: v for k, v in given.items() if k != "clusters"}
        n = given.get("clusters")
        if n is None:
            targets[name] = target
            continue
        for k in range(n):
            targets[f"{name}_{k + 1}"] = {**target, "cluster": k, "n_clusters": n}
    return targets


def _check_sweep(config: dict[str, Any]) -> None:
    """Refuse a sweep whose parts are not there, and fill in what follows from others."""
    sweep, studies = config["attention_sweep"], config["studies"]
    if sweep["reference"] not in sweep["mechanisms"]:
        raise ConfigError(
            f"attention_sweep.reference is {sweep['reference']!r}, which is not among its "
            f"mechanisms.{near(sweep['reference'], sweep['mechanisms'])}"
        )
    if sweep["swapped"] and sweep["mechanisms"][sweep["reference"]] != "softmax":
        raise ConfigError(
            "attention_sweep.swapped puts mechanisms into weights trained with softmax, but the "
            f"reference is {sweep['mechanisms'][sweep['reference']]!r}.",
            "Set swapped: false, or make softmax the reference.",
        )
    if "rsa" not in sweep and "encoding" not in sweep:
        raise ConfigError("attention_sweep names no study: give rsa, encoding, or both.")
    sweep.setdefault("measured_on", sweep.get("encoding"))
    for role in ("rsa", "encoding", "measured_on"):
        name = sweep.get(role)
        if name is not None and name not in studies:
            raise ConfigError(
                f"attention_sweep.{role} is {name!r}, which is not under studies."
                f"{near(name, studies)}"
            )
    name = sweep["measured_on"]
    if name is None or studies[name]["loader"] != "simulated":
        raise ConfigError(
            f"attention_sweep.measured_on must be a simulated study, whose scenes have captions; "
            f"it is {name!r}.",
        )
    if config["seed"] in sweep["seeds"]:
        raise ConfigError(
            f"Seed {config['seed']} renders the scenes of the simulated study and is one of "
            "attention_sweep.seeds, which render the scenes of training.",
            "Choose another seed, such as 10000: no training may use it.",
        )
    clash = [m for m in sweep_models(config) if m in config["models"]]
    if clash:
        raise ConfigError(f"The model key {clash[0]!r} is needed by attention_sweep: rename it.")


def sweep_models(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the models of the attention sweep: what ``models`` would hold, had it named them.

    Parameters
    ----------
    config : mapping
        Of `validate_config`.

    Returns
    -------
    dict of str to dict
        By key ``KIND-MECHANISM-SEED``; KIND is ``trained``, ``untrained`` (the same network before
        its first step) or ``swapped`` (the mechanism in weights trained with the reference). Each
        has what a model of the configuration has, and ``kind``, ``mechanism``, ``seed``, and
        ``folder``, the trained model it is made from. Empty without a sweep.
    """
    sweep = config.get("attention_sweep")
    if sweep is None:
        return {}
    models: dict[str, dict[str, Any]] = {}
    kinds = ["trained", *(k for k in ("untrained", "swapped") if sweep[k])]
    for kind in kinds:
        for mechanism, attention in sweep["mechanisms"].items():
            if kind == "swapped" and mechanism == sweep["reference"]:
                continue
            source = sweep["reference"] if kind == "swapped" else mechanism
            for seed in sweep["seeds"]:
                folder = f"{config['output']}/attention/models/{source}-{seed}"
                name = f"open_clip:local-dir:{folder}"
                models[f"{kind}-{mechanism}-{seed}"] = {
                    "name": f"random:{name}" if kind == "untrained" else name,
                    "title": f"{mechanism}, {kind}, seed {seed}",
                    "kind": kind, "mechanism": mechanism, "seed": seed, "folder": folder,
                    "trained_attention": sweep["mechanisms"][source],
                    "attention": attention if kind == "swapped" else None,
                    "layers": sweep["layers"], "pooling": "mean",
                    "baseline": False, "optional": False, "options": {},
                }  # fmt: skip
    return models


def joint_models(joint: Mapping[str, Any]) -> list[str]:
    """Return the models that a joint model takes features from."""
    entries = [entry for space in joint["spaces"].values() for entry in space]
    return list(dict.fromkeys(entry.partition("/")[0] for entry in entries))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read and validate a YAML configuration.

    Raises
    ------
    ConfigError
        If the file is missing, is not YAML, or does not follow the schema.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        folder = workflow_root() / "configs"
        known = sorted(p.name for p in folder.glob("*.yaml") if p.name != "schema.yaml")
        raise ConfigError(
            f"There is no configuration {path}.{near(path.name, known)}",
            f"Shipped in {folder}: {', '.join(known)}.",
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no mapping of keys to values.")
    return validate_config(config)
