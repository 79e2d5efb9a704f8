# What several rules need: options for commands, resources, and which sources could be had.

import json
import os
import shlex

from brainalign.config import UNFETCHED, sweep_models, synthesis_targets

STUDIES = config["studies"]
SWEEP = sweep_models(config)
MODELS = {**config["models"], **SWEEP}
JOINT = config["encoding"]["joint"]
CLUSTERS = config["encoding"].get("clusters")
SYNTHESIS = config.get("synthesis", {})
TARGETS = synthesis_targets(config)
CAPTIONING = config.get("captioning", {})
PSYCHOPHYSICS = config.get("psychophysics", {})

# mem_mb, runtime (minutes) and disk_mb (what a job leaves) are sized for one NSD subject, and for all images where a rule has
# those; docs/nsd.md derives them. `resources` of the configuration overrides them by rule.
DEFAULT_RESOURCES = {
    "fetch": {"mem_mb": 1000, "runtime": 720, "threads": 1, "disk_mb": 1000},
    "model": {"mem_mb": 4000, "runtime": 60, "threads": 1, "disk_mb": 1000},
    "scenes": {"mem_mb": 1000, "runtime": 30, "threads": 1, "disk_mb": 100},
    "responses": {"mem_mb": 16000, "runtime": 120, "threads": 1, "disk_mb": 8000},
    "simulate": {"mem_mb": 8000, "runtime": 60, "threads": 1, "disk_mb": 2000},
    "features": {"mem_mb": 16000, "runtime": 480, "threads": 4, "disk_mb": 2000},
    "encode": {"mem_mb": 32000, "runtime": 480, "threads": 4, "disk_mb": 2000},
    "probe": {"mem_mb": 16000, "runtime": 1440, "threads": 4, "gpu": 1, "disk_mb": 500},
    "gather": {"mem_mb": 16000, "runtime": 60, "threads": 1, "disk_mb": 2000},
    "evaluate": {"mem_mb": 8000, "runtime": 120, "threads": 1, "disk_mb": 500},
    "report": {"mem_mb": 4000, "runtime": 30, "threads": 1, "disk_mb": 1000},
    "dive": {"mem_mb": 16000, "runtime": 960, "threads": 4, "gpu": 1, "disk_mb": 1000},
    "ascend": {"mem_mb": 8000, "runtime": 60, "threads": 4, "gpu": 1, "disk_mb": 100},
    "judge": {"mem_mb": 12000, "runtime": 60, "threads": 4, "gpu": 1, "disk_mb": 500},
    "library": {"mem_mb": 16000, "runtime": 2880, "threads": 8, "gpu": 1, "disk_mb": 25000},
    "caption": {"mem_mb": 16000, "runtime": 1440, "threads": 4, "gpu": 1, "disk_mb": 1000},
    "listening": {"mem_mb": 8000, "runtime": 120, "threads": 1, "disk_mb": 500},
    "attend": {"mem_mb": 8000, "runtime": 240, "threads": 2, "disk_mb": 10},
    "channel_trials": {"mem_mb": 8000, "runtime": 480, "threads": 4, "gpu": 1, "disk_mb": 100},
    "channel_areas": {"mem_mb": 8000, "runtime": 480, "threads": 4, "gpu": 1, "disk_mb": 100},
    "small_models": {"mem_mb": 4000, "runtime": 240, "threads": 2, "disk_mb": 500},
    "attention_train": {"mem_mb": 3000, "runtime": 240, "threads": 1, "disk_mb": 100},
    "attention_profile": {"mem_mb": 4000, "runtime": 60, "threads": 2, "disk_mb": 10},
}


wildcard_constraints:
    study="|".join(STUDIES) or "none",
    model="|".join([*MODELS, *JOINT]) or "none",
    subject="[A-Za-z0-9]+",
    part="[0-9]+",
    half="[12]",
    target="|".join(TARGETS) or "none",
    analysis="encoding|rsa|classification|parametric",


def resource(rule_name, key):
    return {**DEFAULT_RESOURCES[rule_name], **config["resources"].get(rule_name, {})}.get(key, 0)


def needs(rule_name):
    """What a rule asks of the scheduler, besides threads."""
    return {key: resource(rule_name, key) for key in ("mem_mb", "runtime", "gpu", "disk_mb")}


def options(**settings):
    """Command-line options: lists are repeated words, mappings JSON, None and False are left out."""
    words = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            words.extend(map(str, value))
        elif isinstance(value, dict):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def model_options(model):
    keys = ("weights", "sha256", "options", "mean", "std", "image_size", "trained_attention")
    chosen = {k: MODELS[model][k] for k in keys if MODELS[model].get(k)}
    seed = MODELS[model].get("seed", config["seed"])
    return shlex.quote(MODELS[model]["name"]) + " " + options(seed=seed, **chosen)


def model_settings(model):
    """A model as an option of a command: what `load_model` takes."""
    keys = ("name", "weights", "sha256", "options", "mean", "std", "image_size")
    return {k: MODELS[model][k] for k in keys if MODELS[model].get(k)}


def study_available(study):
    """Whether an optional study could be had; asks the checkpoint, so the graph waits for it."""
    if not STUDIES[study]["optional"]:
        return True
    with checkpoints.fetch.get(study=study).output.status.open() as status:
        return json.load(status)["available"]


def model_available(model):
    if not MODELS[model]["optional"]:
        return True
    with checkpoints.model.get(model=model).output.card.open() as card:
        return json.load(card)["available"]


def models_of(study):
    return [m for m in STUDIES[study]["models"] if model_available(m)]


def encoded_models_of(study):
    """Models that are fitted to a study: its own, and the joint ones that it has all models of."""
    own = models_of(study)
    return own + [name for name, joint in JOINT.items() if set(joint_models(joint)) <= set(own)]


def stimuli_source(study):
    """The artefact that holds a study's images, and the folder inside it."""
    if STUDIES[study]["loader"] == "simulated":
        return f"{OUT}/studies/{study}/stimuli"
    return f"{OUT}/studies/{study}/data"


def stimuli_folder(study):
    source = stimuli_source(study)
    return source if STUDIES[study]["loader"] == "simulated" else f"{source}/stimuli"


def clustered(study):
    """Whether the folds of a study are made of clusters: time series are split by runs."""
    return CLUSTERS is not None and "delays" not in STUDIES[study]


def encode_inputs():
    """What a model of one subject is made from."""
    return {
        "data": OUT + "/studies/{study}/data",
        "stimuli": lambda w: stimuli_source(w.study),
        "features": lambda w: [
            f"{OUT}/features/{w.study}/{model}.json"
            for model in (joint_models(JOINT[w.model]) if w.model in JOINT else [w.model])
        ],
        "embedding": lambda w: (
            [f"{OUT}/features/{w.study}/{CLUSTERS['model']}.json"] if clustered(w.study) else []
        ),
    }
