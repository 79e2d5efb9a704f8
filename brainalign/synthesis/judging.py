"""Generated images against natural ones, by an encoder and a classifier that did not guide."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from brainalign.data.stimuli import StimulusSet, read_stimuli
from brainalign.data.store import provenance, read, write
from brainalign.encoding.model import sources_of
from brainalign.errors import ConfigError, SchemaError
from brainalign.features.extraction import extract
from brainalign.features.models import Model, load_model
from brainalign.features.zeroshot import zero_shot
from brainalign.synthesis.objective import (
    Encoder,
    Target,
    listed,
    load_source,
    parts_of,
    read_encoder,
    same_neuroids,
)
from brainalign.synthesis.sampling import predict_target, read_kept

__all__ = [
    "ALL_NATURAL",
    "compare_with_natural",
    "judge",
    "label",
    "label_images",
    "mean_cosine_distance",
    "mean_pixel_distance",
    "preferred_label",
    "rise_over_neuroids",
]

#: The set of all natural images, and the quantile of its activations that is to be exceeded.
ALL_NATURAL = "all natural"
TOP_SHARE = 0.01
#: Level of `rise_over_neuroids`: strict, as neuroids of one region share noise.
NEUROID_LEVEL = 0.001
_SMALL = 32


def label_images(
    labeller: Model | str,
    stimuli: StimulusSet,
    labels: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    batch_size: int = 32,
    device: str | torch.device = "auto",
) -> NDArray[np.str_]:
    """Label every image: by the nearest text, or by the largest output of a classifier.

    Parameters
    ----------
    labeller : Model or str
        With a text tower (see `brainalign.features.zero_shot`), or a classifier whose outputs are
        the labels in order.
    stimuli : StimulusSet
        The images.
    labels : sequence of str, or mapping of str to sequence of str
        The labels; a mapping gives the prompts of each, for a model with a text tower, and is
        refused for a classifier, whose outputs have an order.
    batch_size, device
        As in `brainalign.features.extract`.

    Returns
    -------
    ndarray of str, shape (n_stimuli,)

    Raises
    ------
    ConfigError
        If a classifier has another number of outputs than there are labels, or gets a mapping.
    """
    model = load_model(labeller, device=device) if isinstance(labeller, str) else labeller
    if model.text is not None:
        found = zero_shot(model, stimuli, labels, batch_size=batch_size)
        return found["predicted"].values.astype(str)
    if isinstance(labels, Mapping):
        raise ConfigError(
            f"The labels of the classifier {model.name} are a mapping, which has no order.",
            "Give a list: the names of its outputs, in their order.",
        )
    names = list(labels)
    n = model.traced["output"].shape
    if n != (len(names),):
        raise ConfigError(
            f"The classifier {model.name} has outputs of shape {n}; there are {len(names)} labels.",
            "Give one label an output, in their order.",
        )
    out = extract(
        model, stimuli, "output", pooling="flatten", batch_size=batch_size, device=device
    )["output"]
    return np.array(names)[out["features"].values.argmax(axis=1)]


def label(
    stimuli: str | Path,
    labeller: str | Path | Model,
    labels: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    out: str | Path,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    overwrite: bool = False,
) -> xr.Dataset:
    """Label a folder of stimuli once, for all calls of `judge` that compare with them.

    Parameters
    ----------
    stimuli : path
        The folder.
    labeller, labels, batch_size, device
        See `label_images`.
    out : path
        A ``.nc`` file.
    overwrite : bool
        Whether to replace `out`.

    Returns
    -------
    Dataset
        ``predicted`` (stimulus) with the coord ``stimulus_id``; the labeller and its labels in the
        attrs.
    """
    model = labeller if isinstance(labeller, Model) else load_model(str(labeller), device=device)
    found = read_stimuli(stimuli)
    ds = xr.Dataset(
        {
            "predicted": (
                "stimulus",
                label_images(model, found, labels, batch_size=batch_size, device=device),
            )
        },
        coords={"stimulus_id": ("stimulus", list(found.ids))},
        attrs=_labelling(model, labels),
    )
    record = provenance(config=_labelling(model, labels), inputs=[Path(stimuli)])
    write(ds, Path(out), None, provenance=record, overwrite=overwrite)
    return ds


def _labelling(
    labeller: Model, labels: Sequence[str] | Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return what labels depend on besides the images."""
    asked = {k: list(v) for k, v in labels.items()} if isinstance(labels, Mapping) else list(labels)
    return {"labeller": labeller.name, "labels": json.dumps(asked)}


def _read_labels(path: str | Path, stimuli: StimulusSet, asked: dict[str, str]) -> NDArray[np.str_]:
    """Return what `label` wrote, if it is of these images, this labeller and these labels."""
    ds = read(path)
    for key, value in asked.items():
        if ds.attrs.get(key) != value:
            raise SchemaError(f"{path} was made with the {key} {ds.attrs.get(key)}, not {value}.")
    if ds["stimulus_id"].values.tolist() != list(stimuli.ids):
        raise SchemaError(f"{path} labels other images than those of {stimuli.folder}.")
    return ds["predicted"].values.astype(str)


def mean_cosine_distance(features: NDArray[np.floating]) -> float:
    r"""Return the mean of 1 - cos over all pairs of rows; NaN for fewer than 2.

    .. math:: 1 - \frac{\lVert \sum_i \hat x_i \rVert^2 - n}{n (n - 1)}
    """
    n = len(features)
    if n < 2:
        return float("nan")
    x = features.astype(np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(1 - ((unit.sum(axis=0) ** 2).sum() - (unit**2).sum()) / (n * (n - 1)))


def mean_pixel_distance(stimuli: StimulusSet) -> float:
    r"""Return the root mean square difference of pixels over all pairs of images of 32 x 32.

    .. math:: \sqrt{\frac{2}{n (n - 1)} \sum_{i<j} \overline{(I_i - I_j)^2}}, \qquad
              I \in [0, 1]

    NaN for fewer than 2 images.
    """
    from PIL import Image

    n = len(stimuli)
    if n < 2:
        return float("nan")
    total, square = np.zeros((_SMALL, _SMALL, 3)), 0.0
    for i in range(n):
        small = stimuli.open(i).resize((_SMALL, _SMALL), Image.Resampling.BOX)
        x = np.asarray(small, dtype=np.float64) / 255
        total += x
        square += float((x**2).mean())
    # The sum of squared differences over pairs is n times that of deviations from the mean.
    mean_square = 2 * (n * square - float((total**2).mean())) / (n * (n - 1))
    return float(np.sqrt(max(mean_square, 0.0)))


def preferred_label(
    labels: NDArray[np.str_], natural: NDArray[np.str_], *, level: float = 0.05
) -> tuple[str, float]:
    """Return the label that images have more often than natural ones do, and its p-value.

    Each label's count is tested against its share of the natural images (binomial, one-sided,
    Holm's correction over labels); ``""`` if none is more frequent at the level.

    Parameters
    ----------
    labels : ndarray of str, shape (n_images,)
    natural : ndarray of str, shape (n_natural,)
    level : float
        Of the corrected p-value.
    """
    names = sorted(set(labels.tolist()) | set(natural.tolist()))
    # One image more of each label: a label that no natural image has is not impossible.
    shares = [(float((natural == n).sum()) + 1) / (len(natural) + len(names)) for n in names]
    p = np.array(
        [
            stats.binomtest(int((labels == n).sum()), len(labels), q, alternative="greater").pvalue
            for n, q in zip(names, shares, strict=True)
        ]
    )
    best = int(p.argmin())
    corrected = min(1.0, float(p[best]) * len(names))
    return (names[best] if corrected < level else ""), corrected


def rise_over_neuroids(contributions: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    r"""Return the p-value of a rise of a target, neuroids being what is sampled.

    One-sided Welch test of

    .. math:: \sum_v w_v \Delta_v > 0,

    with :math:`\Delta_v` the rise of a neuroid's mean prediction; neuroids of positive weight are
    one sample, those of negative weight (a contrast) the other. Images that look unlike natural
    ones move the prediction of every encoder, that of noise as well: of one encoder the direction
    is luck, over neuroids of independent noise it averages out.

    Parameters
    ----------
    contributions : ndarray, shape (n_neuroids,)
        :math:`w_v \Delta_v`.
    weights : ndarray, shape (n_neuroids,)
        :math:`w_v`, none 0.

    Returns
    -------
    float
        NaN where a sample has fewer than 3 neuroids, or no neuroid differs from another.
    """
    samples = [contributions[side] for side in (weights > 0, weights < 0) if side.any()]
    if min(len(x) for x in samples) < 3:
        return float("nan")
    parts = np.array([len(x) * x.var(ddof=1) for x in samples])
    if parts.sum() == 0:
        return float("nan")
    freedom = parts.sum() ** 2 / sum(
        v**2 / (len(x) - 1) for v, x in zip(parts, samples, strict=True)
    )
    return float(stats.t.sf(contributions.sum() / np.sqrt(parts.sum()), freedom))


def compare_with_natural(
    activation: Mapping[str, NDArray[np.float64]],
    labels: Mapping[str, NDArray[np.str_]],
    *,
    rises: Mapping[str, float] | None = None,
    top: Sequence[int] = (100, 200),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    r"""Compare sets of images by predicted activation and by label.

    Parameters
    ----------
    activation : mapping of str to ndarray, shape (n_images,)
        By set; `ALL_NATURAL` must be there. Of it the best ones are sets of their own, chosen by
        this very activation, which makes them hard to exceed.
    labels : mapping of str to ndarray of str, shape (n_images,)
        By the same sets.
    rises : mapping of str to float, optional
        `rise_over_neuroids` of sets; NaN and sets that are not here are not held against a label.
    top : sequence of int
        How many best natural images.
    n_bootstrap : int
        Samples of images, for percentile intervals of 95 %.
    seed : int
        Of the bootstrap.

    Returns
    -------
    Dataset
        ``activation`` (set) with ``_low`` and ``_high``; ``above`` (set), the share of images above
        the 99th percentile of natural ones, with bounds; ``share`` (set, label), with bounds;
        ``n`` (set); ``preferred`` and ``preferred_p`` (set), see `preferred_label`, where it is
        also asked that the lower bound of the mean activation exceeds the natural mean and that
        ``rise_p`` (set), from `rises`, is below `NEUROID_LEVEL`.

    Raises
    ------
    SchemaError
        If the sets differ, or a value is not finite.
    """
    if ALL_NATURAL not in activation or set(activation) != set(labels):
        raise SchemaError(
            f"Activations are of the sets {sorted(activation)}, labels of {sorted(labels)}; "
            f"expected the same ones, with {ALL_NATURAL!r}."
        )
    natural = np.asarray(activation[ALL_NATURAL], dtype=np.float64)
    for name, values in activation.items():
        if len(values) != len(labels[name]) or not np.isfinite(values).all():
            raise SchemaError(f"The set {name!r} needs one finite activation and label an image.")
    order = np.argsort(-natural, kind="stable")
    sets: dict[str, tuple[NDArray[np.float64], NDArray[np.str_]]] = {
        ALL_NATURAL: (natural, labels[ALL_NATURAL])
    }
    for n in sorted({min(int(n), len(natural)) for n in top}, reverse=True):
        sets[f"top {n} natural"] = natural[order[:n]], labels[ALL_NATURAL][order[:n]]
    sets |= {k: (np.asarray(activation[k]), labels[k]) for k in activation if k != ALL_NATURAL}
    names = sorted({str(x) for _, found in sets.values() for x in found.tolist()})
    threshold = float(np.quantile(natural, 1 - TOP_SHARE))
    rows: dict[str, list[Any]] = {}
    preferred: list[tuple[str, float, float]] = []
    for i, (name, (values, found)) in enumerate(sets.items()):
        rng = np.random.default_rng([seed, i])
        table = np.column_stack(
            [values, values > threshold, *[(found == label).astype(float) for label in names]]
        )
        drawn = np.empty((n_bootstrap, table.shape[1]))
        for k in range(n_bootstrap):
            # How often each image is drawn.
            counts = np.bincount(rng.integers(len(table), size=len(table)), minlength=len(table))
            drawn[k] = counts @ table / len(table)
        low, high = (
            np.quantile(drawn, [0.025, 0.975], axis=0)
            if n_bootstrap
            else np.full((2, table.shape[1]), np.nan)
        )
        for kind, row in (("", table.mean(axis=0)), ("_low", low), ("_high", high)):
            rows.setdefault(f"activation{kind}", []).append(row[0])
            rows.setdefault(f"above{kind}", []).append(row[1])
            rows.setdefault(f"share{kind}", []).append(row[2:])
        label, p = preferred_label(found, labels[ALL_NATURAL])
        rise = float((rises or {}).get(name, np.nan))
        confirmed = n_bootstrap > 0 and low[0] > natural.mean() and not rise >= NEUROID_LEVEL
        preferred.append((label if confirmed else "", p, rise))
    dims = {"share": ("set", "label")}
    return xr.Dataset(
        {
            **{k: (dims.get(k.split("_")[0], ("set",)), np.array(v)) for k, v in rows.items()},
            "n": ("set", [len(v) for v, _ in sets.values()]),
            "preferred": ("set", [label for label, _, _ in preferred]),
            "preferred_p": ("set", [p for _, p, _ in preferred]),
            "rise_p": ("set", [rise for _, _, rise in preferred]),
        },
        coords={"set": list(sets), "label": names},
        attrs={"top_1_percent": threshold, "n_bootstrap": n_bootstrap, "seed": seed},
    )


def judge(
    generated: Mapping[str, str | Path],
    natural: str | Path,
    *,
    encoder: str | Path | Sequence[str | Path],
    labeller: str | Path | Model,
    labels: Sequence[str] | Mapping[str, Sequence[str]],
    out: str | Path,
    roi: str | None = None,
    against: str | None = None,
    cluster: int | None = None,
    n_clusters: int | None = None,
    neuroids: Sequence[str] = (),
    guiding: str | Path | Sequence[str | Path] | None = None,
    top: Sequence[int] = (100, 200),
    n_bootstrap: int = 1000,
    seed: int = 0,
    natural_labels: str | Path | None = None,
    store: str | Path | None = None,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    models: Mapping[str, Model] | None = None,
    overwrite: bool = False,
) -> xr.Dataset:
    """Judge the images of `dive` (the ones kept) by an encoder and a labeller that did not guide.

    Parameters
    ----------
    generated : mapping of str to path
        Folders of `dive` and `ascend_pixels` by the name of their set, such as ``generated`` and
        ``pixel ascent``.
    natural : path
        Folder of natural stimuli.
    encoder : path or sequence of path
        The judging encoder, or several (subjects, models) whose predictions of the target are
        averaged: of another model or seed and fitted on other stimuli than the guiding ones.
    labeller : str, path or Model
        See `label_images`.
    labels : sequence or mapping
        See `label_images`.
    out : path
        A ``.nc`` file.
    roi, against, cluster, n_clusters, neuroids
        The target, see `Target`.
    guiding : path or sequence of path, optional
        The encoders that guided. A cluster is found in their weights and judged on the same
        neuroids.
    top, n_bootstrap, seed
        See `compare_with_natural`.
    natural_labels : path, optional
        What `label` wrote of `natural`; without it they are labelled here.
    store : path, optional
        Where features of the natural images are kept, as in `brainalign.features.extract`.
    batch_size, device
        As in `brainalign.features.extract`.
    models : mapping of str to Model, optional
        Models that are loaded already.
    overwrite : bool
        Whether to replace `out`.

    Returns
    -------
    Dataset
        Of `compare_with_natural`, with ``diversity`` (mean pairwise cosine distance of the
        features, of a judging encoder, that weigh most in the target) and ``pixel_diversity``
        (set), and the images themselves: ``natural_id`` and ``natural_activation`` (natural),
        ``image_set``, ``image_id``, ``image_activation`` and ``image_label`` (image);
        ``neuroid_id`` and ``subject`` (neuroid) of the neuroids whose mean is to be high.
    """
    target = Target(roi, against, cluster, n_clusters, tuple(neuroids))
    paths = listed(encoder)
    judging = [read_encoder(p) for p in paths]
    parts = [part for encoders in judging for part in encoders]
    if cluster is None:
        weights = target.weights(judging)
    elif guiding is None:
        raise ConfigError("A cluster is one of the guiding encoder's weights.", "Name it: guiding.")
    else:
        first = [read_encoder(p) for p in listed(guiding)]
        weights = same_neuroids(target.weights(first), first, judging)
    own, places = _neuroids_used(parts, weights)
    used = _summed(np.concatenate([w[w != 0] for w in weights]), places)
    found = {ALL_NATURAL: read_stimuli(natural), **{k: read_kept(v) for k, v in generated.items()}}
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "models": models}
    predicted = {
        k: predict_target(parts, weights, s, store=store if k == ALL_NATURAL else None, **options)
        for k, s in found.items()
    }
    activation = {k: values for k, (values, _) in predicted.items()}
    rises = {
        k: rise_over_neuroids(_summed(each - predicted[ALL_NATURAL][1], places), used)
        for k, (_, each) in predicted.items()
        if k != ALL_NATURAL
    }
    model = labeller if isinstance(labeller, Model) else load_model(str(labeller), device=device)
    named = {
        k: _read_labels(natural_labels, s, _labelling(model, labels))
        if k == ALL_NATURAL and natural_labels is not None
        else label_images(model, s, labels, batch_size=batch_size, device=device)
        for k, s in found.items()
    }
    ds = compare_with_natural(
        activation, named, rises=rises, top=top, n_bootstrap=n_bootstrap, seed=seed
    )
    order = np.argsort(-activation[ALL_NATURAL], kind="stable")
    spread, pixels = [], []
    for name, n in zip(ds["set"].values.tolist(), ds["n"].values.tolist(), strict=True):
        base = found[ALL_NATURAL]
        s = found.get(name) or base.select([base.ids[i] for i in order[:n].tolist()])
        spread.append(mean_cosine_distance(_features(parts, weights, s, **options)))
        pixels.append(mean_pixel_distance(s))
    rest = [k for k in found if k != ALL_NATURAL]
    ds = ds.assign(
        diversity=("set", spread),
        pixel_diversity=("set", pixels),
        natural_activation=("natural", activation[ALL_NATURAL]),
        image_activation=("image", np.concatenate([activation[k] for k in rest])),
        image_label=("image", np.concatenate([named[k] for k in rest])),
    ).assign_coords(
        natural_id=("natural", found[ALL_NATURAL].ids),
        image_id=("image", [i for k in rest for i in found[k].ids]),
        image_set=("image", [k for k in rest for _ in found[k].ids]),
        subject=("neuroid", [who for (who, _), w in zip(own, used, strict=True) if w > 0]),
        neuroid_id=("neuroid", [n for (_, n), w in zip(own, used, strict=True) if w > 0]),
    )
    ds.attrs |= {
        "target": target.name,
        "units": str(parts[0].attrs.get("units", "")),
        "judging_model": ", ".join(dict.fromkeys(str(e["model"].values) for e in parts)),
        "labeller": model.name,
    }
    guides = [] if cluster is None or guiding is None else listed(guiding)
    inputs = dict.fromkeys([*paths, *guides, *map(Path, generated.values())])
    config = {"target": target.name, "top": list(top), "labels": list(labels)}
    record = provenance(config=config, inputs=inputs, seed=seed)
    write(ds, Path(out), None, provenance=record, overwrite=overwrite)
    return ds


def _neuroids_used(
    parts: Sequence[xr.Dataset], weights: Sequence[NDArray[np.float64]]
) -> tuple[list[tuple[str, str]], NDArray[np.intp]]:
    """Return (subject, id) of the neuroids of a target, and which one each weight that counts is.

    A neuroid that several encoders predict is there once.
    """
    named = [
        (str(part.attrs.get("subject", "")), str(n))
        for part, w in zip(parts, weights, strict=True)
        for n in part["neuroid_id"].values[w != 0]
    ]
    place = {one: i for i, one in enumerate(dict.fromkeys(named))}
    return list(place), np.array([place[one] for one in named], dtype=np.intp)


def _summed(values: NDArray[np.float64], places: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.bincount(places, values).astype(np.float64)


def _features(
    encoder: Encoder,
    weights: Sequence[NDArray[np.float64]],
    stimuli: StimulusSet,
    *,
    models: Mapping[str, Model] | None,
    batch_size: int,
    device: str | torch.device,
) -> NDArray[np.float32]:
    """Return the features that a target depends on most, of the first layer of its encoder."""
    used = zip(parts_of(encoder), weights, strict=True)
    part = max(used, key=lambda pair: float(np.abs(pair[1]).sum()))[0]
    source = sources_of(part)[0]
    model = load_source(source, models=models, device=device)
    pooling = source.get("pooling", "mean")
    ds = extract(model, stimuli, source["layer"], pooling=pooling, batch_size=batch_size)
    return ds[source["layer"]]["features"].values
