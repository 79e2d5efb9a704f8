"""The command line: one thin command per step of the workflow."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainalign import __version__
from brainalign.errors import (
    BrainalignError,
    ConfigError,
    MissingDependencyError,
    UnavailableError,
    near,
)

if TYPE_CHECKING:
    import xarray as xr

    from brainalign.data.stimuli import StimulusSet

__all__ = ["main"]


def _write_json(record: Any, path: Path) -> None:
    from brainalign.data.store import atomic_file

    with atomic_file(path) as made:
        made.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")


def _model(args: argparse.Namespace) -> Any:
    from brainalign.features import load_model

    return load_model(
        args.model,
        weights=args.weights,
        sha256=args.sha256,
        options=args.options,
        mean=args.mean,
        std=args.std,
        image_size=args.image_size,
        seed=args.seed,
        trained_attention=args.trained_attention,
    )


def _fetch(args: argparse.Namespace) -> int:
    from brainalign.data import studies

    module = studies.get(args.study)
    record = {
        "study": args.study,
        "title": module.TITLE,
        "licence": module.LICENCE,
        "citation": module.CITATION,
        "bibtex": module.BIBTEX,
    }
    try:
        _use_data_home(args.data)
        folder = module.fetch(mirror=args.mirror, accept_terms=args.accept_terms)
    except UnavailableError as error:
        if not args.optional:
            raise
        record |= {"available": False, "reason": str(error)}
        logging.getLogger(__name__).warning("%s is left out: %s", args.study, error)
    else:
        record |= {"available": True, "reason": ""}
        print(folder)
    if args.status:
        _write_json(record, args.status)
    return 0


def _use_data_home(folder: Path | None) -> None:
    if folder is not None:
        os.environ["BRAINALIGN_DATA"] = str(folder)


def _responses(args: argparse.Namespace) -> int:
    from brainalign.data import studies
    from brainalign.data.bundle import write_bundle
    from brainalign.data.store import provenance
    from brainalign.data.studies import local

    _use_data_home(args.data)
    subjects = args.subjects
    if args.study == "bids":
        _check_parameters(local.load, args.parameters, {"subjects"})
        study = local.load(subjects=subjects, **args.parameters)
        subjects = None
    else:
        module = studies.get(args.study)
        takes = inspect.signature(module.load).parameters
        _check_parameters(module.load, args.parameters, {"subjects"} & set(takes))
        given = {"subjects": subjects} if "subjects" in takes else {}
        study = module.load(**given, **args.parameters)
    settings = {"study": args.study, "parameters": args.parameters}
    write_bundle(study, args.out, subjects=subjects, provenance=provenance(config=settings))
    return 0


def _check_parameters(
    load: Callable[..., Any], given: Mapping[str, Any], ours: Set[str] = frozenset()
) -> None:
    """Refuse parameters that the loader of a study does not take, and name those it lacks."""
    known = {n: p for n, p in inspect.signature(load).parameters.items() if n not in ours}
    wrong = [n for n in given if n not in known]
    if wrong:
        raise ConfigError(
            f"The loader takes no parameter {wrong[0]!r}.{near(wrong[0], known)}",
            f"It takes {', '.join(known)}.",
        )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise ConfigError(f"The loader needs the parameter {missing[0]!r}.")


def _scenes(args: argparse.Namespace) -> int:
    from brainalign.small_models.scenes import write_scenes

    write_scenes(args.out, args.n, seed=args.seed, size=args.size)
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from brainalign.data.bundle import write_bundle
    from brainalign.data.stimuli import read_stimuli
    from brainalign.data.store import provenance
    from brainalign.data.studies import simulated
    from brainalign.features import read_manifest

    study = simulated.load(
        read_manifest(args.features),
        read_stimuli(args.stimuli),
        subjects=args.subjects,
        seed=args.seed,
        **args.parameters,
    )
    made_by = provenance(config=args.parameters, inputs=[args.features], seed=args.seed)
    write_bundle(study, args.out, provenance=made_by)
    return 0


def _layers(args: argparse.Namespace) -> int:
    from brainalign.features import model_card

    try:
        card = model_card(_model(args), args.select)
    except UnavailableError as error:
        if not args.optional:
            raise
        card = {"model": args.model, "available": False, "reason": str(error)}
        logging.getLogger(__name__).warning("%s is left out: %s", args.model, error)
    if args.out:
        _write_json(card, args.out)
    elif card["available"]:
        for layer, shape in card["layers"].items():
            print(f"{layer}\t{' x '.join(map(str, shape))}")
    return 0


def _features(args: argparse.Namespace) -> int:
    from brainalign.data.stimuli import index_images, read_stimuli
    from brainalign.features import extract, write_manifest

    indexed = (args.stimuli / "index.nc").is_file()
    stimuli = read_stimuli(args.stimuli) if indexed else index_images(args.stimuli)
    model = _model(args)
    layers = extract(
        model,
        stimuli,
        args.layers,
        pooling=args.pooling,
        store=args.store,
        batch_size=args.batch_size,
        device=args.device,
        workers=args.workers,
        autocast=args.autocast,
        attention=args.attention,
    )
    write_manifest(layers, args.out)
    return 0


def _profile(args: argparse.Namespace) -> int:
    import torch

    from brainalign.data.stimuli import read_stimuli
    from brainalign.features import load_model, profile_attention
    from brainalign.small_models.clip import PROMPTS

    torch.set_num_threads(1)
    stimuli = read_stimuli(args.stimuli)
    truth = stimuli.index["category"].values.astype(str).tolist()
    prompts = {label: [f"a picture of {words}"] for label, words in PROMPTS.items()}
    profiles = {}
    for name, settings in args.models.items():
        swapped = settings.pop("attention", None)
        model = load_model(settings.pop("name"), device="cpu", **settings)
        profiles[name] = profile_attention(
            model, stimuli, attention=swapped, prompts=prompts, truth=truth
        )
    _write_json(profiles, args.out)
    return 0


def _attention_sweep(args: argparse.Namespace) -> int:
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance
    from brainalign.encoding.attention_sweep import sweep_section_from_folders

    section = sweep_section_from_folders(
        args.models,
        mechanisms=args.mechanisms,
        reference=args.reference,
        profiles=args.profiles,
        layer=args.layer,
        rsa=args.rsa,
        features=args.features,
        encoded=args.encoded,
        budget=args.budget,
        titles=args.titles,
        generator=args.generator,
        bootstraps=args.bootstraps,
        seed=args.seed,
    )
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    write_section(section, args.out, provenance=provenance(config=settings, seed=args.seed))
    return 0


def _encode(args: argparse.Namespace) -> int:
    from brainalign.data.splits import by_flag
    from brainalign.data.stimuli import read_stimuli
    from brainalign.data.store import provenance, read
    from brainalign.encoding import encode, joint_features, write_result
    from brainalign.encoding.timeseries import backward
    from brainalign.features import read_manifest

    models = {path.stem: read_manifest(path) for path in args.features}
    features, spaces = next(iter(models.values())), None
    if args.regression != "ridge":
        features, spaces = joint_features(models, args.spaces)
    elif len(models) > 1 or args.spaces:
        raise ConfigError(
            "Ridge takes the layers of one model.",
            "Use --regression banded or stacking for several models and their feature spaces.",
        )
    responses = read(args.responses, "responses")
    if args.direction == "backward":
        features, responses = backward(features, responses)
    stimuli = None if args.stimuli is None else read_stimuli(args.stimuli)
    sha256 = None if stimuli is None else dict(zip(stimuli.ids, stimuli.sha256, strict=True))
    if args.delays is not None and (args.half, args.test) != (None, None):
        raise ConfigError("--half and --test divide images; time series are split by runs.")
    if args.half is not None:
        if sha256 is None:
            raise ConfigError("Halves are of images by their content.", "Give --stimuli.")
        responses = _half(responses, sha256, args.half, args.seed)
    splits: Any = args.folds
    if args.test is not None:
        flags = _flags(stimuli, args.test)
        splits = by_flag(responses["stimulus_id"].values, flags, name=args.test)
    embedding = None
    if args.embedding is not None:
        manifest, layer = args.embedding
        layers = read_manifest(Path(manifest))
        if layer not in layers:
            raise ConfigError(f"{manifest} holds no layer {layer!r}.{near(layer, layers)}")
        embedding = layers[layer]
    result = encode(
        features,
        responses,
        splits=splits,
        stimuli="seen",
        clusters=args.clusters,
        embedding=embedding,
        regression=args.regression,
        spaces=spaces,
        partition=args.partition,
        n_iter=args.candidates,
        delays=None if args.delays is None else tuple(args.delays),
        direction=args.direction,
        alphas=args.alphas,
        inner_cv=args.inner,
        choose=args.choose,
        bad_neuroids=args.invalid,
        stimulus_sha256=sha256,
        ceiling_threshold=args.minimum_ceiling,
        permutation="auto" if args.permutations else "none",
        n_permutations=args.permutations,
        n_bootstrap=args.bootstraps,
        keep_predictions=args.predictions,
        seed=args.seed,
        device=args.device,
        memory_gib=None if args.memory_mb is None else args.memory_mb / 1024,
        part=args.part,
        checkpoint=args.out.with_name(args.out.name + ".parts"),
    )
    settings = {k: v for k, v in vars(args).items() if k in _ENCODE_SETTINGS}
    # The responses of a part are named by `gather`, so that they are hashed once.
    inputs = args.features if args.part else [*args.features, args.responses]
    made_by = provenance(config=settings, inputs=inputs, seed=args.seed)
    write_result(result, args.out, provenance=made_by, overwrite=True)
    return 0


def _half(responses: xr.Dataset, sha256: Mapping[str, str], half: int, seed: int) -> xr.Dataset:
    """Return the presentations of one half of the images, by their content."""
    from brainalign.data.splits import halves
    from brainalign.encoding.align import content_keys

    keys = content_keys(responses["stimulus_id"].values.astype(str), sha256)
    return responses.isel(presentation=halves(keys, seed) == half)


def _probe(args: argparse.Namespace) -> int:
    from brainalign.data.stimuli import read_stimuli
    from brainalign.data.store import provenance, read, write
    from brainalign.encoding import fit_probe

    stimuli = read_stimuli(args.stimuli)
    responses = read(args.responses, "responses")
    if args.half is not None:
        sha256 = dict(zip(stimuli.ids, stimuli.sha256, strict=True))
        responses = _half(responses, sha256, args.half, args.seed)
    training = {
        name: getattr(args, name)
        for name in ("n_epochs", "learning_rate", "weight_decay", "batch_size", "seed")
    }
    encoder = fit_probe(
        _model(args),
        stimuli,
        responses,
        layer=args.layer,
        pooling=args.pooling,
        device=args.device,
        bad_neuroids=args.invalid,
        **training,
    )
    settings = training | {k: getattr(args, k) for k in ("model", "layer", "pooling", "half")}
    inputs = [args.responses, args.stimuli / "index.nc"]
    made_by = provenance(config=settings, inputs=inputs, seed=args.seed)
    write(encoder, args.out, "encoder", provenance=made_by, overwrite=True)
    return 0


def _flags(stimuli: StimulusSet | None, column: str) -> dict[str, Any]:
    """Return a column of the stimuli's index by stimulus."""
    if stimuli is None or column not in stimuli.index:
        raise ConfigError(
            f"The index of stimuli has no column {column!r}."
            + near(column, [] if stimuli is None else map(str, stimuli.index)),
            "Give stimuli with such a column, or leave it out.",
        )
    return dict(zip(stimuli.ids, stimuli.index[column].values.tolist(), strict=True))


_ENCODE_SETTINGS = (
    "alphas", "folds", "inner", "choose", "invalid", "permutations", "bootstraps", "regression",
    "spaces", "partition", "candidates", "delays", "direction", "clusters", "test", "half",
)  # fmt: skip


def _dive(args: argparse.Namespace) -> int:
    from brainalign.synthesis import dive

    dive(
        args.encoded,
        args.pipeline,
        out=args.out,
        steps=args.steps,
        size=args.size,
        scheduler=args.scheduler,
        precision=args.precision,
        prompt=args.prompts if args.captions is None else _noun_prompts(args),
        text_scale=args.text_scale,
        **args.guidance,
        **_target(args),
        **_making(args),
    )
    return 0


def _noun_prompts(args: argparse.Namespace) -> list[str]:
    """Return prompts of what captions of the neuroids that are to be high name most."""
    from brainalign.captioning import region_prompts
    from brainalign.synthesis import Target, read_encoder, wanted_neuroids

    encoders = [read_encoder(path) for path in args.encoded]
    weights = Target(**_target(args)).weights(encoders)
    flat = [part for parts in encoders for part in parts]
    whose = [str(part.attrs.get("subject", "")) for part in flat]
    subject = _captioned_subject(args.captions, whose)
    own = [i for i, who in enumerate(whose) if who == subject]
    wanted = wanted_neuroids([flat[i] for i in own], [weights[i] for i in own])
    found = region_prompts(args.captions, wanted, top=args.top_nouns)
    if not found:
        logging.getLogger(__name__).warning(
            "No neuroid of the target has a caption that names a noun: the prompt is empty."
        )
    return found or [""]


def _captioned_subject(captions: str | Path, subjects: Sequence[str]) -> str:
    """Return whose captions they are, one of the subjects: ids of neuroids recur among subjects."""
    from brainalign.data.store import read

    subject = str(read(captions, "captions").attrs.get("subject", ""))
    if subject not in subjects:
        raise ConfigError(
            f"{captions} holds captions of subject {subject!r}; the neuroids are of "
            f"{', '.join(map(repr, dict.fromkeys(subjects)))}.",
            "Give the captions of one of them.",
        )
    return subject


def _nouns(captions: str | Path, judged: str | Path) -> dict[str, float]:
    """Return what captions name most of the judged neuroids that are of their subject."""
    from brainalign.captioning import region_nouns
    from brainalign.data.store import read

    ds = read(judged)
    whose = ds["subject"].values.astype(str)
    own = whose == _captioned_subject(captions, whose.tolist())
    return region_nouns(captions, ds["neuroid_id"].values[own].tolist())


def _ascend(args: argparse.Namespace) -> int:
    from brainalign.synthesis import ascend_pixels

    ascend_pixels(
        args.encoded,
        out=args.out,
        size=args.size,
        steps=args.steps,
        rate=args.rate,
        jitter=args.jitter,
        **_target(args),
        **_making(args),
    )
    return 0


def _label(args: argparse.Namespace) -> int:
    from brainalign.synthesis import label

    label(
        args.stimuli,
        next(iter(_loaded({"labeller": args.labeller}, args.device).values())),
        args.labels,
        out=args.out,
        batch_size=args.batch_size,
        device=args.device,
        overwrite=True,
    )
    return 0


def _judge(args: argparse.Namespace) -> int:
    from brainalign.synthesis import judge

    labeller = _loaded({"labeller": args.labeller}, args.device)
    judge(
        args.generated,
        args.natural,
        encoder=args.encoded,
        labeller=next(iter(labeller.values())),
        labels=args.labels,
        out=args.out,
        **_target(args),
        guiding=args.guide,
        top=args.top,
        n_bootstrap=args.bootstraps,
        seed=args.seed,
        natural_labels=args.natural_labels,
        store=args.store,
        batch_size=args.batch_size,
        device=args.device,
        models=_loaded(args.models, args.device),
        overwrite=True,
    )
    return 0


def _dive_section(args: argparse.Namespace) -> int:
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance
    from brainalign.synthesis.sections import section_from_folders

    section = section_from_folders(
        {name: panel["judged"] for name, panel in args.panels.items()},
        {name: panel["generated"] for name, panel in args.panels.items()},
        natural=args.natural,
        cluster_of={n: p["cluster_of"] for n, p in args.panels.items() if "cluster_of" in p},
        expected={n: p["expected"] for n, p in args.panels.items() if "expected" in p},
        words={
            n: _nouns(p["captions"], p["judged"]) for n, p in args.panels.items() if "captions" in p
        },
    )
    write_section(section, args.out, provenance=provenance(config=args.panels))
    return 0


def _caption(args: argparse.Namespace) -> int:
    from brainalign.captioning import caption_result
    from brainalign.data.stimuli import read_stimuli

    flagged = None
    if args.held_out_flag is not None:
        stimuli = None if args.held_out_stimuli is None else read_stimuli(args.held_out_stimuli)
        flagged = [i for i, yes in _flags(stimuli, args.held_out_flag).items() if yes]
    caption_result(
        args.encoded,
        args.library,
        args.out,
        captioner=args.captioner,
        tokenizer=args.tokenizer,
        clip=args.clip,
        prompt=args.prompt,
        layer=args.layer,
        check_with=args.check_with,
        q=args.q,
        rois=args.rois,
        held_out=args.held_out,
        held_out_ids=flagged,
        temperature=args.temperature,
        n_draws=args.draws,
        seed=args.seed,
        beams=args.beams,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        device=args.device,
        overwrite=True,
    )
    return 0


def _caption_section(args: argparse.Namespace) -> int:
    from brainalign.captioning import section_from_captions
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance

    section = section_from_captions(
        args.captions, args.encoded, data=args.data, rois=args.rois, word_maps=args.word_maps,
        n_clusters=args.clusters, layout=args.layout, seed=args.seed,
    )  # fmt: skip
    settings = {k: getattr(args, k) for k in ("rois", "word_maps", "clusters", "layout")}
    write_section(section, args.out, provenance=provenance(config=settings, seed=args.seed))
    return 0


def _target(args: argparse.Namespace) -> dict[str, Any]:
    """Return the neuroids that the options name, as `brainalign.synthesis.Target` takes them."""
    ids: tuple[str, ...] = ()
    if args.neuroids is not None:
        ids = tuple(args.neuroids.read_text(encoding="utf-8").split())
    names = ("roi", "against", "cluster", "n_clusters")
    return {**{name: getattr(args, name) for name in names}, "neuroids": ids}


def _making(args: argparse.Namespace) -> dict[str, Any]:
    names = ("rerank", "n_images", "seed", "keep", "interpolation", "batch_size", "device")
    made = {name: getattr(args, name) for name in names}
    return {**made, "models": _loaded(args.models, args.device), "overwrite": True}


def _loaded(models: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
    """Load models by their settings; they are known by their names afterwards."""
    from brainalign.features import load_model

    loaded = [load_model(device=device, **settings) for settings in models.values()]
    return {model.name: model for model in loaded}


def _gather(args: argparse.Namespace) -> int:
    from brainalign.data.store import provenance
    from brainalign.encoding import gather_folders

    made_by = provenance(inputs=args.inputs)
    gather_folders(args.parts, args.out, provenance=made_by, overwrite=True)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance

    section = _ANALYSES[args.analysis](args)
    section.id = args.id or section.id
    section.title = args.title or section.title
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    write_section(section, args.out, provenance=provenance(config=settings, seed=args.seed))
    return 0


def _channel(args: argparse.Namespace) -> int:
    from brainalign.psychophysics import analysis

    if args.thresholds is not None:
        found = analysis.fit_index_channel(
            args.thresholds, n_levels=args.levels, lowest=args.lowest
        )
        record = analysis.as_record(found)
    else:
        from brainalign.data.trials import read_trials

        record = analysis.trials_record(
            read_trials(args.trials),
            guess=args.guess,
            level=args.level,
            n_bootstrap=args.bootstraps,
            seed=args.seed,
        )
    print(json.dumps(record, indent=1))
    return 0


def _aad_accuracy(args: argparse.Namespace) -> int:
    from brainalign.auditory.results import METRICS, accuracy_records

    records = accuracy_records(
        args.files, level=args.level, n_bootstrap=args.bootstraps, seed=args.seed
    )
    print(json.dumps({"unit": "percent", "metrics": METRICS, "results": records}, indent=1))
    return 0


def _trf(args: argparse.Namespace) -> int:
    from brainalign.auditory.trf import ALPHAS, read_recordings, trf_models, with_channels
    from brainalign.auditory.trials import listening_trials
    from brainalign.data.store import provenance, read, write

    settings: dict[str, Any] = {
        "split": args.split,
        "n_folds": args.folds,
        "tmin": args.delays[0],
        "tmax": args.delays[1],
        "alphas": args.alphas or ALPHAS,
        "n_shifts": args.shifts,
        "allow_leak": args.allow_leak,
    }
    prepared = [f for f in args.files if f.is_dir()]
    if prepared and len(args.files) > 1:
        raise ConfigError(
            f"{prepared[0]} is the recording of a listener; it stands alone.",
            "Several listeners are several calls.",
        )
    if args.out is not None and not prepared:
        raise ConfigError(
            "--out needs a recording from `brainalign aad-prepare`, which knows its channels.",
            "Prepare the recording, or leave --out away.",
        )
    if prepared:
        responses = read(prepared[0] / "responses.zarr", "responses")
        trials = listening_trials(responses, read(prepared[0] / "features.zarr", "features"))
        if "bad" in responses.coords:
            run, bad = responses["run"].values, responses["bad"].values.astype(bool)
            settings["bad"] = [bad[run == r] for r in dict.fromkeys(run.tolist())]
    else:
        trials = read_recordings(
            args.files, args.target, recording=args.recording, sampling_rate=args.rate
        )
    record, models = trf_models(trials, args.target, **settings)
    if args.out is not None:
        about = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
        write(
            with_channels(models, responses, record), args.out, None,
            provenance=provenance(config=about, seed=args.seed),
        )  # fmt: skip
    print(json.dumps(record, indent=1))
    return 0


def _trf_section(args: argparse.Namespace) -> int:
    from brainalign.auditory.sections import section_from_responses
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance

    section = section_from_responses(args.fitted)
    section.id = args.id or section.id
    section.title = args.title or section.title
    record = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    write_section(section, args.out, provenance=provenance(config=record, seed=args.seed))
    return 0


def _categorised(folder: Path) -> Any:
    """Return stimuli with categories: with an index, or in a folder for each category."""
    from brainalign.data.stimuli import index_categories, read_stimuli

    return read_stimuli(folder) if (folder / "index.nc").is_file() else index_categories(folder)


def _channel_experiment(args: argparse.Namespace) -> int:
    from brainalign.psychophysics import write_experiment

    given = {} if args.consent is None else {"consent": _paragraphs(args.consent)}
    names = ("classes", "noise_sds", "bands", "contrast", "block", "duration", "fixation")
    page = write_experiment(
        args.out,
        _categorised(args.stimuli),
        size=(args.size, args.size),
        mean=args.mean_intensity,
        n_practice=args.practice,
        side=args.side,
        title=args.title,
        seed=args.seed,
        overwrite=True,
        **{name: getattr(args, name) for name in names},
        **given,
    )
    print(page)
    return 0


def _paragraphs(file: Path) -> list[str]:
    parts = file.read_text(encoding="utf-8").split("\n\n")
    return [" ".join(part.split()) for part in parts if part.strip()]


def _shown(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Return tested stimuli, the others, the design of all conditions, and grey images of both."""
    from brainalign.psychophysics import masking_design
    from brainalign.psychophysics.observers import grey_images
    from brainalign.psychophysics.stimuli import divide_images

    stimuli = _categorised(args.stimuli)
    if "category" not in stimuli.index:
        raise ConfigError(f"The stimuli of {args.stimuli} have no category.")
    category = stimuli.index["category"].values.astype(str).tolist()
    n = len(stimuli) if args.images is None else args.images
    rows = divide_images(category, n, args.seed)
    tested, others = (stimuli.select([stimuli.ids[i] for i in part]) for part in rows)
    size = (args.size, args.size)
    design = masking_design(
        tested.ids, tested.index["category"].values.astype(str), size=size,
        noise_sds=args.noise_sds, bands=args.bands, seed=args.seed,
    )  # fmt: skip
    return tested, others, design, lambda chosen: grey_images(chosen, size)


def _channel_trials(args: argparse.Namespace) -> int:
    from brainalign import psychophysics
    from brainalign.data.store import provenance, write

    model = _model(args).to(args.device)
    tested, others, design, grey = _shown(args)
    look = {"contrast": args.contrast, "mean": args.mean_intensity}
    name = args.title or args.model
    observer: Any
    if args.by == "outputs":
        observer = psychophysics.Classifier(model, args.classes, name=name)
    elif args.by == "text":
        observer = psychophysics.ZeroShotClassifier(model, args.classes, name=name)
    else:
        if not len(others):
            raise ConfigError("A readout needs images to learn from.", "Test fewer: --images.")
        learnt = others.index["category"].values.astype(str).tolist()
        observer = psychophysics.LinearReadout(model, grey(others), learnt, name=name, **look)
    trials = psychophysics.observe(
        observer, design, grey(tested), tested.ids, batch_size=args.batch_size,
        device=model.device, **look,
    )  # fmt: skip
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug", "out")}
    made_by = provenance(config=settings, seed=args.seed)
    write(trials, args.out, "trials", provenance=made_by, overwrite=True)
    return 0


def _channel_areas(args: argparse.Namespace) -> int:
    from brainalign.data.store import provenance, write
    from brainalign.encoding import read_result
    from brainalign.psychophysics import move_areas
    from brainalign.psychophysics.areas import area_responses, network_responses

    model = _model(args).to(args.device)
    areas = area_responses(read_result(args.encoded).encoders, model, args.rois)
    areas[f"{args.title or args.model}: its output"] = network_responses(model)
    tested, _, design, grey = _shown(args)
    moved = move_areas(
        areas, design, grey(tested), tested.ids, contrast=args.contrast, mean=args.mean_intensity,
        batch_size=args.batch_size, device=model.device,
    )  # fmt: skip
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug", "out")}
    made_by = provenance(config=settings, seed=args.seed)
    write(moved, args.out, None, provenance=made_by, overwrite=True)
    return 0


def _channel_section(args: argparse.Namespace) -> int:
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance, read
    from brainalign.data.studies import geirhos2021
    from brainalign.data.trials import read_trials
    from brainalign.psychophysics import channels_section
    from brainalign.psychophysics.observers import grey_images
    from brainalign.psychophysics.sections import example_pictures

    observers = {}
    for file in args.trials:
        trials = read_trials(file)
        observers[str(trials["subject"].values.flat[0])] = trials
    people = {"people": read_trials(args.people)} if args.people else {}
    published, missing = {}, []
    if args.published_people:
        try:
            published = geirhos2021.load(geirhos2021.fetch()).extras
        except UnavailableError as error:
            missing.append(f"People of Geirhos et al. 2021 are left out: {error}")
    stimuli = _categorised(args.stimuli)
    first = next(iter(observers.values()))
    image = grey_images(stimuli.select(stimuli.ids[:1]), (args.size, args.size))[0].numpy()
    levels = sorted({float(s) for s in first["noise_sd"].values})
    section = channels_section(
        people | observers,
        people=list(people),
        areas=None if args.areas is None else read(args.areas).load(),
        examples=example_pictures(image, levels, contrast=args.contrast, mean=args.mean_intensity),
        published=published,
        missing=missing,
        guess=args.guess,
        n_bootstrap=args.bootstraps,
        seed=args.seed,
    )
    settings = {"bootstraps": args.bootstraps, "people": [str(p) for p in args.people]}
    write_section(section, args.out, provenance=provenance(config=settings, seed=args.seed))
    return 0


def _thresholds(words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        said = f"{words!r} is no list of numbers parted by commas, such as 0,0,0,0,2,2,0"
        raise argparse.ArgumentTypeError(said) from None


def _report(args: argparse.Namespace) -> int:
    from brainalign.report.from_run import report_of_run

    print(report_of_run(args.config, args.sections, args.studies, args.models, args.out))
    return 0


def _run(args: argparse.Namespace) -> int:
    import subprocess

    from brainalign.config import read_config, workflow_root

    config = read_config(args.config)
    try:
        import snakemake  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "The workflow needs snakemake.", 'pip install "brainalign[workflow,report,features]"'
        ) from error
    root = workflow_root()
    command = [
        *(sys.executable, "-m", "snakemake"),
        *("--snakefile", str(root / "Snakefile"), "--configfile", str(args.config)),
        *("--rerun-triggers", "mtime", "params", "input", "code", "--rerun-incomplete"),
        *("--cores", str(args.cores), "--show-failed-logs", "--keep-going"),
        *args.snakemake,
    ]
    # The rules call `brainalign`: the one that runs now, whatever else is on the path.
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    finished = subprocess.run(command, env={**os.environ, "PATH": os.pathsep.join(paths)})
    report = Path(config["output"]) / "report" / "index.html"
    if finished.returncode == 0 and report.is_file():
        print(f"The report is {report.resolve()}")
    return finished.returncode


def _demo(args: argparse.Namespace) -> int:
    from brainalign.config import workflow_root

    # A profile of this user's cluster is for real runs.
    os.environ.pop("SNAKEMAKE_PROFILE", None)
    args.config = workflow_root() / "configs" / "demo.yaml"
    return _run(args)


def _doctor(args: argparse.Namespace) -> int:
    from brainalign.doctor import examine

    findings = examine()
    width = max(len(f.name) for f in findings)
    for f in findings:
        print(f"{'!' if f.remedy else ' '} {f.name:{width}}  {f.value}")
        if f.remedy:
            print(f"  {'':{width}}  -> {f.remedy}")
    return int(any(f.needed and f.remedy for f in findings))


def _evaluate_encoding(args: argparse.Namespace) -> Any:
    from brainalign.data.stimuli import read_stimuli
    from brainalign.encoding.sections import section_from_folders

    return section_from_folders(
        args.encoded,
        data=args.data,
        stimuli=read_stimuli(args.stimuli),
        titles=args.models,
        baselines=args.baselines,
        fdr=args.fdr,
    )


def _evaluate_rsa(args: argparse.Namespace) -> Any:
    from brainalign.data.stimuli import read_stimuli
    from brainalign.evaluation.sections import rsa_section_from_folders

    return rsa_section_from_folders(
        args.features,
        data=args.data,
        stimuli=read_stimuli(args.stimuli),
        titles=args.models,
        baselines=args.baselines,
        bootstraps=args.bootstraps,
        seed=args.seed,
    )


def _evaluate_classification(args: argparse.Namespace) -> Any:
    from brainalign.decoding import classification

    return classification.section_from_folder(args.data, seed=args.seed)


def _evaluate_parametric(args: argparse.Namespace) -> Any:
    from brainalign.encoding import parametric

    return parametric.section_from_folder(args.data, seed=args.seed)


def _aad_prepare(args: argparse.Namespace) -> int:
    from brainalign.auditory import experiment
    from brainalign.data import studies
    from brainalign.data.store import atomic_dir, provenance, write
    from brainalign.data.studies import local_listening

    _use_data_home(args.data)
    parameters = dict(args.parameters)
    if args.study == "listener":
        sounds = parameters.pop("sounds", None)
        if sounds is None:
            raise ConfigError("The listener needs the parameter 'sounds': the name of a study.")
        ours = {"sounds", "subject", "spaces", "rate", "seed", "listener"}
        settings = parameters.pop("listener", {})
        _check_parameters(experiment.simulate_listening, parameters, ours)
        responses, features = experiment.simulate_listening(
            studies.get(sounds).load().extras["sounds"],
            subject=args.subject, spaces=args.spaces, rate=args.rate, seed=args.seed,
            **parameters, **settings,
        )  # fmt: skip
    else:
        ready = {k: parameters.pop(k, None) for k in ("preprocessing", "sound_rate")}
        own = args.study == "bids_listening"
        load = local_listening.load if own else studies.get(args.study).load
        _check_parameters(load, parameters, {"subjects"})
        responses, features = experiment.prepare(
            load(subjects=[args.subject], **parameters),
            args.subject,
            spaces=args.spaces,
            rate=args.rate,
            **ready,
        )
    record = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    about = provenance(config=record, seed=args.seed)
    with atomic_dir(args.out, overwrite=True) as made:
        write(responses, made / "responses.zarr", "responses", provenance=about)
        write(features, made / "features.zarr", "features", provenance=about)
    return 0


def _aad_decode(args: argparse.Namespace) -> int:
    from brainalign.auditory.experiment import decode
    from brainalign.data.store import provenance, read, write

    recordings = [
        (read(f / "responses.zarr", "responses"), read(f / "features.zarr", "features"))
        for f in (args.recording, *args.others)
    ]
    found = decode(
        *recordings[0],
        args.decoder,
        args.settings,
        responsive=args.responsive,
        others=recordings[1:],
        lengths=args.lengths,
        split=args.split,
        n_folds=args.folds,
        repeated=args.repeated,
        seed=args.seed,
    )
    record = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    write(found, args.out, None, provenance=provenance(config=record, seed=args.seed))
    return 0


def _aad_section(args: argparse.Namespace) -> int:
    from brainalign.auditory.sections import section_from_decoded
    from brainalign.data.section import write_section
    from brainalign.data.store import provenance

    section = section_from_decoded(
        args.decoded, study=args.study, titles=args.decoders, seed=args.seed
    )
    section.id = args.id or section.id
    section.title = args.title or section.title
    record = {k: str(v) for k, v in vars(args).items() if k not in ("run", "debug")}
    write_section(section, args.out, provenance=provenance(config=record, seed=args.seed))
    return 0


_ANALYSES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "encoding": _evaluate_encoding,
    "rsa": _evaluate_rsa,
    "classification": _evaluate_classification,
    "parametric": _evaluate_parametric,
}


def _batch(word: str) -> int | str:
    return word if word == "auto" else int(word)


def _inner(word: str) -> int | str:
    return int(word) if word.isdigit() else word


def _part(word: str) -> tuple[int, int]:
    k, _, m = word.partition("/")
    return int(k), int(m)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="e.g. open_clip:ViT-B-16/laion2b_s34b_b88k, timm:resnet50, v1"
    )
    parser.add_argument("--weights", help="file of weights")
    parser.add_argument("--sha256", help="what the weights must hash to")
    parser.add_argument("--options", type=json.loads, help="arguments of the model, as JSON")
    parser.add_argument("--mean", type=float, nargs=3, help="pixel mean of the preprocessing")
    parser.add_argument("--std", type=float, nargs=3, help="pixel deviation of the preprocessing")
    parser.add_argument("--image-size", type=int, help="side of the input in pixels")
    parser.add_argument(
        "--trained-attention", help="what the weights must have been trained with; see --attention"
    )


def _add_target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--roi", help="whose mean is to be high")
    parser.add_argument("--against", metavar="ROI", help="whose mean is to be low")
    parser.add_argument("--cluster", type=int, help="of the ROI, from 0")
    parser.add_argument("--n-clusters", type=int, help="that the ROI is divided into")
    parser.add_argument("--neuroids", type=Path, help="file of neuroid ids, instead of a ROI")


def _add_making_arguments(parser: argparse.ArgumentParser, n_images: int) -> None:
    parser.add_argument(
        "--encoded", type=Path, nargs="+", required=True,
        help="outputs of `encode` or `probe` that guide: several are averaged",
    )  # fmt: skip
    parser.add_argument(
        "--rerank", type=Path, nargs="+", help="outputs of the other half, of the same subjects"
    )
    parser.add_argument("--out", type=Path, required=True)
    _add_target_arguments(parser)
    parser.add_argument("--n-images", type=int, default=n_images, help="seeds, from --seed on")
    parser.add_argument("--keep", type=float, default=0.2, help="share kept after the ranking")
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"))
    parser.add_argument("--batch-size", type=_batch, default=1, help="a number, or auto")
    parser.add_argument(
        "--models", type=json.loads, default={},
        help="settings of models that need more than their name, as JSON",
    )  # fmt: skip
    parser.add_argument("--device", default="auto")


def _add_tested_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stimuli", type=Path, required=True,
        help="images with categories: an index.nc, or a folder for each category",
    )  # fmt: skip
    parser.add_argument("--images", type=int, help="that are tested; default: all")
    _add_masking_arguments(parser)
    parser.add_argument("--title", default="", help="name in the report")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="a .nc file")


def _add_masking_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument(
        "--noise-sds", type=float, nargs="+", default=[0.0, 0.02, 0.04, 0.08, 0.16],
        help="levels of noise",
    )  # fmt: skip
    parser.add_argument("--bands", type=int, nargs="+", help="of noise, from 0; default: all")
    parser.add_argument("--contrast", type=float, default=0.2, help="of the pictures")
    parser.add_argument(
        "--mean-intensity", type=float, default=0.449, help="of the pictures, in 0..1"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="brainalign",
        description="How well a model's inner features explain a brain, and what a piece of brain "
        "stands for.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--seed", type=int, default=0, help="seed of every random step")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    p = command("fetch", _fetch, "download a study, checked by its sha256")
    p.add_argument("study")
    p.add_argument("--data", type=Path, help="folder for studies; default: the cache folder")
    p.add_argument("--mirror", help="folder or URL asked first; default: BRAINALIGN_MIRROR")
    p.add_argument("--accept-terms", action="store_true", help="you accept the study's terms")
    p.add_argument("--optional", action="store_true", help="succeed if it cannot be had")
    p.add_argument("--status", type=Path, help="write here whether it could be had, as JSON")

    p = command("responses", _responses, "turn a study into responses and stimuli artefacts")
    p.add_argument("study", help="name of a study, or bids")
    p.add_argument("--data", type=Path, help="folder for studies; default: the cache folder")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--subjects", nargs="+")
    p.add_argument("--parameters", type=json.loads, default={}, help="of the loader, as JSON")

    p = command("aad-prepare", _aad_prepare, "recording and talkers of a listener, for decoders")
    p.add_argument(
        "study", help="a study of listening, bids_listening for one's own, listener to simulate one"
    )
    p.add_argument("--subject", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--data", type=Path, help="folder for studies; default: the cache folder")
    p.add_argument("--parameters", type=json.loads, default={}, help="of the loader, as JSON")
    p.add_argument("--spaces", nargs="+", default=["envelope"], help="features of each talker")
    p.add_argument("--rate", type=float, default=64.0, help="Hz of recording and features")

    p = command("aad-decode", _aad_decode, "decode who is attended, in trials that are left out")
    p.add_argument("recording", type=Path, help="output of `aad-prepare`")
    p.add_argument("--out", type=Path, required=True, help="NetCDF file")
    p.add_argument("--decoder", default="reconstruction", help="kind of decoder")
    p.add_argument("--settings", type=json.loads, default={}, help="of the decoder, as JSON")
    p.add_argument(
        "--lengths", type=float, nargs="+", default=[1, 2, 5, 10, 20, 40], help="of windows, s"
    )
    p.add_argument(
        "--responsive", type=json.loads,
        help="choose responsive channels in the training trials: settings, as JSON",
    )  # fmt: skip
    p.add_argument(
        "--split",
        choices=("trial", "stimulus", "subject"),
        default="trial",
        help="what is left out",
    )
    p.add_argument(
        "--others",
        type=Path,
        nargs="+",
        default=[],
        help="recordings to fit to, to leave out a subject",
    )
    p.add_argument("--folds", type=int, help="in place of single trials or stimuli")
    p.add_argument("--repeated", action="store_true", help="training and test may share sound")

    p = command("aad-section", _aad_section, "describe decoded attention for the report")
    p.add_argument("decoded", type=Path, nargs="+", help="outputs of `aad-decode`")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--id")
    p.add_argument("--title")
    p.add_argument("--study", default="", help="for what is published of it")
    p.add_argument("--decoders", type=json.loads, help="their titles, as JSON")

    p = command("scenes", _scenes, "render scenes of people, bodies, places, words, food, objects")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--n", type=int, default=600)
    p.add_argument("--size", type=int, default=64, help="side in pixels")

    p = command("simulate", _simulate, "simulate subjects whose responses follow given features")
    p.add_argument("--features", type=Path, required=True)
    p.add_argument("--stimuli", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--subjects", nargs="+", default=["sim1"])
    p.add_argument("--parameters", type=json.loads, default={}, help="of the simulation, as JSON")

    p = command("layers", _layers, "list the layers of a model, with their shapes")
    _add_model_arguments(p)
    p.add_argument("--select", nargs="+", help="names or patterns that must match")
    p.add_argument("--optional", action="store_true", help="succeed if it cannot be had")
    p.add_argument("--out", type=Path, help="write a model card here, as JSON")

    p = command("features", _features, "extract features of images from layers of a model")
    _add_model_arguments(p)
    p.add_argument("--stimuli", type=Path, required=True, help="a folder of images")
    p.add_argument("--layers", nargs="+", help="names or patterns; default: all")
    p.add_argument(
        "--pooling", choices=("mean", "class", "none", "flatten", "unit"), default="mean"
    )
    p.add_argument("--store", type=Path, required=True, help="folder of the feature store")
    p.add_argument("--out", type=Path, required=True, help="list of the stores, as JSON")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=2, help="threads that read images")
    p.add_argument("--device", default="auto")
    p.add_argument("--autocast", choices=("bf16", "fp16"))
    p.add_argument(
        "--attention",
        help="swapped into the trained weights, such as neighborhood:k=7: measures damage",
    )

    p = command("encode", _encode, "fit and cross-validate encoding models of one subject")
    p.add_argument("--features", type=Path, nargs="+", required=True, help="of one or more models")
    p.add_argument("--stimuli", type=Path, help="images, whose hashes tell one under two names")
    p.add_argument("--responses", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--alphas", type=float, nargs="+", default=[10.0**k for k in range(7)])
    p.add_argument("--folds", type=int, default=5)
    p.add_argument("--clusters", type=int, help="make the folds of whole clusters of images")
    p.add_argument(
        "--embedding", nargs=2, metavar=("FEATURES", "LAYER"), help="in which images are clustered"
    )
    p.add_argument("--test", metavar="COLUMN", help="test the images that this column flags")
    p.add_argument(
        "--half", type=int, choices=(1, 2), help="only images of this half, by their content"
    )
    p.add_argument("--inner", type=_inner, default="loo", help="loo, gcv or a number of folds")
    p.add_argument("--choose", choices=("neuroid", "roi", "all"), default="neuroid")
    p.add_argument(
        "--regression", choices=("ridge", "banded", "stacking"), default="ridge",
        help="ridge on each layer, or all feature spaces together",
    )  # fmt: skip
    p.add_argument(
        "--spaces", type=json.loads, metavar="JSON",
        help='layers of each feature space, as {"low": ["v1"], "high": ["clip/visual.*"]}; '
        "default: a space a model",
    )  # fmt: skip
    p.add_argument(
        "--partition", choices=("none", "product", "leave_one_out", "subsets"), default="none",
        help="divide the explained variance among the spaces",
    )  # fmt: skip
    p.add_argument("--candidates", type=int, default=50, help="weights of spaces tried by banded")
    p.add_argument(
        "--delays", type=float, nargs=2, metavar=("FIRST", "LAST"),
        help="first and last delay in seconds, for time series",
    )  # fmt: skip
    p.add_argument(
        "--direction", choices=("forward", "backward"), default="forward",
        help="backward: decode the features from the recording; needs --delays",
    )  # fmt: skip
    p.add_argument("--permutations", type=int, default=1000)
    p.add_argument("--invalid", choices=("raise", "exclude"), default="raise")
    p.add_argument(
        "--device", default="auto", help="several, such as cuda:0,cuda:1, share the neuroids"
    )
    p.add_argument("--minimum-ceiling", type=float, default=0.05)
    p.add_argument("--bootstraps", type=int, default=1000, help="samples for intervals; 0: none")
    p.add_argument("--predictions", action="store_true", help="write predicted responses too")
    p.add_argument("--memory-mb", type=int, help="most memory to hold; default: half of the free")
    p.add_argument("--part", type=_part, metavar="K/M", help="only the K-th of M parts of neuroids")

    p = command("probe", _probe, "fit an encoder of one layer by AdamW on augmented images")
    _add_model_arguments(p)
    p.add_argument("--layer", default="output")
    p.add_argument("--pooling", choices=("mean", "class", "flatten", "unit"), default="unit")
    p.add_argument("--stimuli", type=Path, required=True, help="images of one size")
    p.add_argument("--responses", type=Path, required=True)
    p.add_argument(
        "--half", type=int, choices=(1, 2), help="only images of this half, by their content"
    )
    p.add_argument("--n-epochs", type=int, default=100)
    p.add_argument("--learning-rate", type=float, default=3e-4, help="halved by the last epoch")
    p.add_argument("--weight-decay", type=float, default=2e-2)
    p.add_argument("--batch-size", type=int, default=64, help="images a step")
    p.add_argument("--invalid", choices=("raise", "exclude"), default="raise")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, required=True, help="a .zarr folder")

    p = command("gather", _gather, "join the parts of one encoding model, from encode --part")
    p.add_argument("parts", type=Path, nargs="+", help="outputs of `encode --part`")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--inputs", type=Path, nargs="+", default=[], help="files whose hash is kept")

    p = command("dive", _dive, "make images that an encoder predicts a region prefers (BrainDiVE)")
    p.add_argument(
        "--pipeline", required=True, help="folder or hub id of Stable Diffusion 1.x, 2.x"
    )
    _add_making_arguments(p, n_images=100)
    p.add_argument(
        "--guidance", type=json.loads, default={}, help="scale, sag_scale, jitter ...: JSON"
    )
    said = p.add_mutually_exclusive_group()
    said.add_argument("--prompts", nargs="+", default=[""], help="images have them in turn")
    said.add_argument(
        "--captions", type=Path, help="output of `caption`: prompts are the target's top nouns"
    )
    p.add_argument("--top-nouns", type=int, default=5, help="with --captions: how many")
    p.add_argument(
        "--text-scale", type=float, default=1.0, help="classifier-free guidance; 1: none"
    )
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--size", type=int, help="side in pixels; default: the pipeline's own")
    p.add_argument("--scheduler", choices=("dpmsolver++", "ddim", "pndm", "unipc", "euler"))
    p.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")

    p = command("ascend", _ascend, "make images by gradient ascent on pixels, to compare with")
    _add_making_arguments(p, n_images=20)
    p.add_argument("--size", type=int, required=True, help="side in pixels")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--rate", type=float, default=0.02, help="learning rate")
    p.add_argument("--jitter", type=json.loads, help="of the copies that are climbed on: JSON")

    p = command("label", _label, "label images by a classifier or by the nearest text")
    p.add_argument("--stimuli", type=Path, required=True, help="folder of images")
    p.add_argument("--labeller", type=json.loads, required=True, help="model that labels: JSON")
    p.add_argument(
        "--labels",
        type=json.loads,
        required=True,
        help="labels, or prompts by label: JSON",
    )
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, required=True)

    p = command("judge", _judge, "compare made images with natural ones by an encoder of its own")
    p.add_argument("--generated", type=json.loads, required=True, help="folders by set, as JSON")
    p.add_argument("--natural", type=Path, required=True, help="natural stimuli")
    p.add_argument(
        "--guide", type=Path, nargs="+", help="outputs of `encode` that guided: find clusters"
    )
    p.add_argument(
        "--encoded", type=Path, nargs="+", required=True, help="outputs of `encode` that judge"
    )
    p.add_argument("--labeller", type=json.loads, required=True, help="model that labels: JSON")
    p.add_argument(
        "--labels",
        type=json.loads,
        required=True,
        help="labels, or prompts by label: JSON",
    )
    _add_target_arguments(p)
    p.add_argument("--natural-labels", type=Path, help="output of `label` of the natural stimuli")
    p.add_argument("--top", type=int, nargs="+", default=[100, 200], help="best natural images")
    p.add_argument("--bootstraps", type=int, default=1000)
    p.add_argument("--store", type=Path, help="folder of the feature store")
    p.add_argument("--models", type=json.loads, default={}, help="settings of models, as JSON")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=Path, required=True)

    p = command("dive-section", _dive_section, "turn judged images into a section of the report")
    p.add_argument(
        "--panels", type=json.loads, required=True,
        help="judged, generated, cluster_of, expected and captions of each, as JSON",
    )  # fmt: skip
    p.add_argument("--natural", type=Path, required=True, help="natural stimuli")
    p.add_argument("--out", type=Path, required=True)

    p = command("caption", _caption, "caption the voxels of an encoding model (BrainSCUBA)")
    p.add_argument(
        "--encoded", type=Path, required=True, help="output of `encode`: what is captioned"
    )
    p.add_argument("--library", type=Path, required=True, help="embeddings of natural images")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--captioner", default="small-captioner", help="a folder or name")
    p.add_argument("--tokenizer", default="gpt2", help="of a clipcap: checkpoint")
    p.add_argument("--prompt", help="of a vision-language model: text with <image> in it")
    p.add_argument("--layer", default="output", help="that the weights are on")
    p.add_argument(
        "--check-with", type=Path, help="output of `encode`, of a CLIP model that checks the words"
    )
    p.add_argument("--clip", help="the model whose embeddings a clipcap: checkpoint reads")
    p.add_argument("--q", type=float, default=0.05, help="false-discovery rate of the voxels")
    p.add_argument("--rois", nargs="+", help="only voxels of these")
    p.add_argument("--held-out", type=Path, help="embeddings of images for the baseline")
    p.add_argument("--held-out-stimuli", type=Path, help="these images")
    p.add_argument("--held-out-flag", help="only those that this column of their index flags")
    p.add_argument("--draws", type=int, default=5, help="parts of the library, captions a voxel")
    p.add_argument("--temperature", type=float, default=1 / 150)
    p.add_argument("--beams", type=int, default=5)
    p.add_argument("--max-tokens", type=int, default=67)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--device", default="auto")

    p = command("caption-section", _caption_section, "turn captions into a section of the report")
    p.add_argument("captions", type=Path, nargs="+", help="outputs of `caption`")
    p.add_argument("--encoded", type=Path, nargs="*", default=[], help="what was captioned")
    p.add_argument("--data", type=Path, help="output of `responses`: truth, and voxels of vertices")
    p.add_argument("--rois", nargs="+")
    p.add_argument(
        "--word-maps", type=json.loads, default={},
        help="nouns by what they stand for, besides person, as JSON",
    )  # fmt: skip
    p.add_argument("--clusters", type=int, default=2, help="that each region is split into")
    p.add_argument(
        "--layout", choices=("pca", "tsne", "umap"), default="pca", help="of the map of weights"
    )
    p.add_argument("--out", type=Path, required=True)

    p = command("evaluate", _evaluate, "turn results into a section of the report")
    p.add_argument("analysis", choices=list(_ANALYSES))
    p.add_argument("--data", type=Path, required=True, help="output of `responses`")
    p.add_argument("--stimuli", type=Path)
    p.add_argument("--encoded", type=Path, nargs="+", help="outputs of `encode`")
    p.add_argument("--features", type=Path, nargs="+", help="outputs of `features`")
    p.add_argument("--models", type=json.loads, default={}, help="titles of models, as JSON")
    p.add_argument("--baselines", nargs="+", default=[], help="models to compare with")
    p.add_argument("--fdr", type=float, default=0.05)
    p.add_argument("--bootstraps", type=int, default=1000, help="of rsa; encode draws its own")
    p.add_argument("--id")
    p.add_argument("--title")
    p.add_argument("--out", type=Path, required=True)

    p = command("profile", _profile, "measure cost, reach and accuracy of models' attention")
    p.add_argument("--models", type=json.loads, required=True, help="by name, as JSON")
    p.add_argument("--stimuli", type=Path, required=True, help="rendered scenes")
    p.add_argument("--out", type=Path, required=True)

    p = command(
        "attention-sweep", _attention_sweep, "turn a sweep of attention mechanisms into a section"
    )
    p.add_argument("--models", type=json.loads, required=True, help="kind, mechanism, seed: JSON")
    p.add_argument("--mechanisms", type=json.loads, required=True, help="specifications, as JSON")
    p.add_argument("--reference", required=True, help="the mechanism to compare with")
    p.add_argument("--profiles", type=Path, required=True, help="output of `profile`")
    p.add_argument("--layer", default="", help="whose RDM is scored")
    p.add_argument("--rsa", type=Path, help="output of `responses` with RDMs")
    p.add_argument("--features", type=Path, nargs="+", default=[], help="outputs of `features`")
    p.add_argument("--encoded", type=Path, nargs="+", default=[], help="outputs of `encode`")
    p.add_argument("--budget", type=json.loads, help="of each training, as JSON")
    p.add_argument("--titles", type=json.loads, help="of the studies, as JSON")
    p.add_argument("--generator", default="", help="what the responses were simulated from")
    p.add_argument("--bootstraps", type=int, default=1000)
    p.add_argument("--out", type=Path, required=True)

    p = command("channel", _channel, "measure an observer's channel of spatial frequencies")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--thresholds", type=_thresholds, metavar="J,J,...",
        help="threshold index of each band, from the lowest: the published rule",
    )  # fmt: skip
    source.add_argument(
        "--trials", type=Path, nargs="+", metavar="FILE",
        help="CSV files with response, category, noise_sd and frequency: maximum likelihood",
    )  # fmt: skip
    p.add_argument("--levels", type=int, default=5, help="of noise, for --thresholds")
    p.add_argument("--lowest", type=float, default=1.75, help="lowest band, cycles/image")
    p.add_argument("--guess", type=float, help="share right by chance; default 1 / categories")
    p.add_argument("--level", type=float, default=0.95, help="coverage of the intervals")
    p.add_argument("--bootstraps", type=int, default=400, help="for the intervals of thresholds")

    p = command("aad-accuracy", _aad_accuracy, "attention decoding's accuracy from result files")
    p.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help=".mat with correlations, .csv"
    )
    p.add_argument("--level", type=float, default=0.95, help="coverage of the intervals")
    p.add_argument("--bootstraps", type=int, default=1000, help="draws of trials; 0: no intervals")

    p = command("trf", _trf, "fit and score temporal response functions and stimulus decoders")
    p.add_argument(
        "files", type=Path, nargs="+", metavar="FILE",
        help=".npz, a trial each; or one output of `aad-prepare`",
    )  # fmt: skip
    p.add_argument("--out", type=Path, help="NetCDF file for the models of a prepared recording")
    p.add_argument("--target", default="envelope", help="array of the feature that was heard")
    p.add_argument("--recording", help="array of the recording; default: the only other one")
    p.add_argument("--rate", type=float, default=64.0, help="Hz, where a file does not say")
    p.add_argument("--split", choices=("time", "trial"), default="time", help="what is held out")
    p.add_argument("--folds", type=int, default=5)
    p.add_argument(
        "--delays", type=float, nargs=2, metavar=("FIRST", "LAST"), default=[0.0, 0.4],
        help="of the recording after the sound, seconds",
    )  # fmt: skip
    p.add_argument(
        "--alphas", type=float, nargs="+", help="penalties; default: 0.01 to 1e6 in half decades"
    )
    p.add_argument("--shifts", type=int, default=9, help="shifted stimuli that tell chance")
    p.add_argument(
        "--allow-leak", action="store_true", help="hold out trials that share their stimulus"
    )

    p = command("trf-section", _trf_section, "describe response functions for the report")
    p.add_argument("fitted", type=Path, nargs="+", help="outputs of `trf --out`")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--id")
    p.add_argument("--title")

    p = command(
        "channel-experiment", _channel_experiment, "write a masking experiment for people to open"
    )
    p.add_argument("out", type=Path, help="the folder to write; open its index.html in a browser")
    p.add_argument(
        "--stimuli", type=Path, required=True,
        help="images with categories: an index.nc, or a folder for each category",
    )  # fmt: skip
    p.add_argument("--title", default="What does the picture show?")
    p.add_argument("--consent", type=Path, help="text of the first page; blank lines part it")
    p.add_argument("--classes", nargs="+", help="to choose from; default: the categories")
    _add_masking_arguments(p)
    p.add_argument("--practice", type=int, default=10, help="pictures to practise on")
    p.add_argument("--block", type=int, default=50, help="pictures between two rests")
    p.add_argument("--duration", type=float, help="seconds; default: until the answer")
    p.add_argument("--fixation", type=float, default=0.5, help="seconds of the cross before")
    p.add_argument("--side", type=int, help="of the pictures on the screen; default: --size")

    p = command("channel-trials", _channel_trials, "let a model name pictures in octave noise")
    _add_model_arguments(p)
    p.add_argument(
        "--by", choices=("outputs", "text", "readout"), default="outputs",
        help="its outputs, the texts of a CLIP, or a linear readout learnt from other images",
    )  # fmt: skip
    p.add_argument(
        "--classes", type=json.loads, metavar="JSON",
        help="outputs (labels or numbers), or texts, of each class; default: the 16 classes",
    )  # fmt: skip
    _add_tested_arguments(p)

    p = command("channel-areas", _channel_areas, "measure which noise moves predicted responses")
    _add_model_arguments(p)
    p.add_argument("--encoded", type=Path, required=True, help="output of `encode`, of this model")
    p.add_argument("--rois", nargs="+", help="default: all")
    _add_tested_arguments(p)

    p = command("channel-section", _channel_section, "turn channels into a section of the report")
    p.add_argument("trials", type=Path, nargs="+", help="outputs of `channel-trials`")
    p.add_argument("--people", type=Path, nargs="+", default=[], help="files of their trials")
    p.add_argument("--areas", type=Path, help="output of `channel-areas`")
    p.add_argument("--stimuli", type=Path, required=True, help="for examples")
    p.add_argument(
        "--published-people", action="store_true", help="the people of geirhos2021, if to be had"
    )
    p.add_argument("--guess", type=float, help="share right by chance; default 1 / categories")
    p.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    p.add_argument("--contrast", type=float, default=0.2, help="of the pictures")
    p.add_argument("--mean-intensity", type=float, default=0.449, help="of the pictures, in 0..1")
    p.add_argument("--bootstraps", type=int, default=200)
    p.add_argument("--out", type=Path, required=True)

    p = command("report", _report, "write the HTML report from sections")
    p.add_argument("sections", type=Path, nargs="*")
    p.add_argument("--config", type=Path, required=True)
    p.add_argument("--studies", type=Path, nargs="*", default=[], help="status files of `fetch`")
    p.add_argument("--models", type=Path, nargs="*", default=[], help="cards of `layers`")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")

    for name, run, text in (
        ("run", _run, "run the workflow of a configuration"),
        ("demo", _demo, "run the demonstration: a few minutes, no network"),
    ):
        p = command(name, run, text)
        if name == "run":
            p.add_argument("config", type=Path)
        p.add_argument("--cores", default="all")
        p.add_argument("snakemake", nargs="*", help="after --: more options for snakemake")

    command("doctor", _doctor, "examine the machine and say how to mend what is missing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status (2 for an error that the user can mend).

    Parameters
    ----------
    argv : sequence of str, optional
        The words after ``brainalign``; default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows -- is snakemake's; argparse would take it only right after the file.
    ours = len(words)
    if words and words[0] in ("run", "demo") and "--" in words:
        ours = words.index("--")
    args = _parser().parse_args(words[:ours])
    if ours < len(words):
        args.snakemake += words[ours + 1 :]
    # On a shared machine, OpenMP threads that spin while they wait cost more than the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("brainalign").setLevel(logging.INFO)
    try:
        return args.run(args)
    except (BrainalignError, OSError) as error:
        if args.debug:
            raise
        print(f"brainalign {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"brainalign {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
