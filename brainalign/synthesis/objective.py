"""Encoders as functions of an image that have a gradient, and what of them is to be high."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from brainalign.data.schema import validate
from brainalign.data.store import read, sha256_of
from brainalign.device import resolve_device
from brainalign.encoding.clusters import spherical_kmeans
from brainalign.encoding.model import feature_weights, sources_of
from brainalign.encoding.result import read_result
from brainalign.encoding.rois import roi_members
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.features.differentiable import ImageFeatures
from brainalign.features.layers import pooled_shape
from brainalign.features.models import Model, load_model

__all__ = [
    "Encoder",
    "ImageEncoder",
    "Target",
    "listed",
    "load_source",
    "parts_of",
    "read_encoder",
    "same_neuroids",
    "wanted_neuroids",
]

#: An encoder, or its parts with neuroids of their own (one a layer).
Encoder = xr.Dataset | Sequence[xr.Dataset]


@dataclass(frozen=True)
class Target:
    """A set of neuroids, or the difference of two, as weights over an encoder's neuroids.

    Parameters
    ----------
    roi : str, optional
        Mean over this ROI, as `brainalign.encoding.roi_members` knows it (``"all"`` for every
        neuroid).
    against : str, optional
        Minus the mean over this ROI: a contrast.
    cluster : int, optional
        Of the ROI, only this cluster, from 0 for the largest.
    n_clusters : int, optional
        How many clusters the ROI's unit-norm weights are divided into
        (`brainalign.encoding.spherical_kmeans`).
    neuroids : tuple of str, optional
        Mean over the neuroids with these ids, instead of `roi`.
    name : str, optional
        By default made of the rest.

    Raises
    ------
    ConfigError
        If the fields do not go together.
    """

    roi: str | None = None
    against: str | None = None
    cluster: int | None = None
    n_clusters: int | None = None
    neuroids: tuple[str, ...] = ()
    name: str = field(default="")

    def __post_init__(self) -> None:
        if (self.roi is None) == (not self.neuroids):
            raise ConfigError("A target is a ROI or a list of neuroids, one of the two.")
        if (self.cluster is None) != (self.n_clusters is None):
            raise ConfigError("cluster and n_clusters go together.")
        if self.cluster is not None and self.n_clusters is not None:
            if self.roi is None or self.against is not None:
                raise ConfigError("A cluster is of one ROI, without a contrast.")
            if not 0 <= self.cluster < self.n_clusters:
                raise ConfigError(
                    f"cluster is {self.cluster}; of {self.n_clusters} clusters the first is 0."
                )
        if self.against is not None and self.roi is None:
            raise ConfigError("A contrast is of two ROIs.")
        if not self.name:
            name = self.roi or f"{len(self.neuroids)} neuroids"
            if self.against is not None:
                name += f" against {self.against}"
            if self.cluster is not None:
                name += f", cluster {self.cluster + 1} of {self.n_clusters}"
            object.__setattr__(self, "name", name)

    def weights(self, encoders: Sequence[Encoder]) -> list[NDArray[np.float64]]:
        """Return the weight of every neuroid, which sum over encoders to the mean of the target.

        In a ROI of n neuroids a neuroid has 1/n, in `against` -1/n, over the number of encoders.
        Clusters are found in the weights of all encoders together.

        Parameters
        ----------
        encoders : sequence of Dataset or sequence of Dataset
            ``encoder`` schema; an encoder may be a list of parts with neuroids of their own, such
            as one a layer.

        Returns
        -------
        list of ndarray, shape (n_neuroids,)
            One a Dataset, in order.

        Raises
        ------
        UnknownNameError
            For a ROI or a neuroid that an encoder does not have.
        SchemaError
            If weights that are clustered together are of different features, or one of several
            encoders that are clustered does not say whose it is.
        """
        groups = [parts_of(e) for e in encoders]
        if self.n_clusters is not None:
            labels = iter(self.clusters(encoders))
            chosen = [[next(labels) == self.cluster for _ in parts] for parts in groups]
            for parts, masks in zip(groups, chosen, strict=True):
                if not any(m.any() for m in masks):
                    raise UnknownNameError(
                        f"{self.name} has no neuroid of subject "
                        f"{parts[0].attrs.get('subject', '')!r}."
                    )
            found = [_mean(masks) for masks in chosen]
        elif self.neuroids:
            found = [_mean(_named(parts, self.neuroids)) for parts in groups]
        else:
            found = [_mean(_inside(parts, str(self.roi))) for parts in groups]
            if self.against is not None:
                minus = [_mean(_inside(parts, self.against)) for parts in groups]
                found = [
                    [a - b for a, b in zip(f, m, strict=True)]
                    for f, m in zip(found, minus, strict=True)
                ]
        return [w / len(groups) for parts in found for w in parts]

    def clusters(self, encoders: Sequence[Encoder]) -> list[NDArray[np.intp]]:
        r"""Return the cluster of every neuroid of each Dataset, -1 outside the ROI.

        What is clustered are the directions of :math:`W / \sigma`
        (`brainalign.encoding.feature_weights`). A neuroid that several encoders predict has theirs
        one after the other, each of unit norm, and one cluster in all of them. No seed is asked
        for: whoever makes images for a cluster and whoever judges them must find the same one.
        """
        if self.roi is None or self.n_clusters is None:
            raise ConfigError("There are clusters only of a ROI, with n_clusters.")
        subjects = _subjects_of(encoders)
        inside = [_inside(parts_of(e), self.roi) for e in encoders]
        directions: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
        features: dict[tuple[str, str], list[str]] = {}
        for encoder, subject, masks in zip(encoders, subjects, inside, strict=True):
            for part, mask in zip(parts_of(encoder), masks, strict=True):
                if not mask.any():
                    continue
                some = part.isel(neuroid=np.flatnonzero(mask))
                w = feature_weights(some).reshape(some.sizes["neuroid"], -1)
                norm = np.linalg.norm(w, axis=1, keepdims=True)
                unit = np.divide(w, norm, out=np.zeros_like(w), where=norm > 0)
                for n, x in zip(_ids(some), unit, strict=True):
                    directions.setdefault((subject, n), []).append(x)
                    features.setdefault((subject, n), []).append(json.dumps(sources_of(part)))
        if len({tuple(f) for f in features.values()}) > 1:
            raise SchemaError(
                f"The weights of neuroids of {self.roi} are of different layers or models; their "
                "directions cannot be compared.",
                "Fit each encoder to one layer, the same for all neuroids and subjects.",
            )
        # A neuroid that nothing predicts has no direction.
        stacked = {k: np.concatenate(x) for k, x in directions.items() if any(map(np.any, x))}
        labels, _ = spherical_kmeans(np.stack(list(stacked.values())), self.n_clusters)
        label = dict(zip(stacked, labels.tolist(), strict=True))
        return [
            np.array(
                [label.get((subject, n), -1) if i else -1
                 for n, i in zip(_ids(part), mask.tolist(), strict=True)],
                dtype=np.intp,
            )
            for encoder, subject, masks in zip(encoders, subjects, inside, strict=True)
            for part, mask in zip(parts_of(encoder), masks, strict=True)
        ]  # fmt: skip


def parts_of(encoder: Encoder) -> list[xr.Dataset]:
    """Return the Datasets that an encoder consists of."""
    return [encoder] if isinstance(encoder, xr.Dataset) else list(encoder)


def listed(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths of one or several encoders."""
    return [Path(given)] if isinstance(given, str | Path) else [Path(p) for p in given]


def read_encoder(path: str | Path) -> list[xr.Dataset]:
    """Read an encoder: an ``encoder`` artefact, or the folder of an encoding result.

    Returns
    -------
    list of Dataset
        Of a result, one a layer that was chosen for some neuroid.

    Raises
    ------
    UnavailableError
        If there is neither.
    """
    path = Path(path)
    if (path / "result.json").is_file():
        return list(read_result(path).encoders.values())
    return [read(path, "encoder")]


def _inside(parts: Sequence[xr.Dataset], roi: str) -> list[NDArray[np.bool_]]:
    out, missing = [], None
    for e in parts:
        inside = np.zeros(e.sizes["neuroid"], dtype=bool)
        try:
            inside[roi_members(e, [roi])[roi]] = True
        except UnknownNameError as error:
            missing = error
        out.append(inside)
    if missing is not None and not any(m.any() for m in out):
        raise missing
    return out


def _named(parts: Sequence[xr.Dataset], ids: Sequence[str]) -> list[NDArray[np.bool_]]:
    names = [_ids(e) for e in parts]
    known = {n for part in names for n in part}
    unknown = [i for i in ids if i not in known]
    if unknown:
        raise UnknownNameError(
            f"The encoder has no neuroid {unknown[0]!r} ({len(unknown)} of {len(ids)} are "
            f"missing).{near(unknown[0], known)}"
        )
    return [np.isin(part, list(ids)) for part in names]


def _mean(masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.float64]]:
    return [m / sum(int(k.sum()) for k in masks) for m in masks]


def wanted_neuroids(encoder: Encoder, weights: Sequence[NDArray[np.float64]]) -> list[str]:
    """Return the ids of the neuroids whose responses are to be high: those of positive weight.

    Parameters
    ----------
    encoder : Dataset or sequence of Dataset
        One encoder, its parts, or those of several encoders of one subject.
    weights : sequence of ndarray, shape (n_neuroids,)
        Of each part, see `Target.weights`.
    """
    found = [
        n
        for e, over in zip(parts_of(encoder), weights, strict=True)
        for n, w in zip(_ids(e), over.tolist(), strict=True)
        if w > 0
    ]
    return list(dict.fromkeys(found))


def same_neuroids(
    weights: Sequence[NDArray[np.float64]], encoders: Sequence[Encoder], others: Sequence[Encoder]
) -> list[NDArray[np.float64]]:
    """Return weights over the neuroids of encoders as weights over those of other encoders.

    Neuroids are told by subject and ``neuroid_id``. What the encoders of a subject weigh together
    its other encoders share evenly. Neuroids that one lacks are left out, and what is left of the
    positive and of the negative weights is scaled to the same sums.

    Parameters
    ----------
    weights : sequence of ndarray, shape (n_neuroids,)
        One a Dataset of `encoders`, see `Target.weights`.
    encoders, others : sequence of Dataset or sequence of Dataset
        ``encoder`` schema, each whole or in its parts; of the same subjects, in any number.

    Returns
    -------
    list of ndarray, shape (n_neuroids,)
        One a Dataset of `others`, in order.

    Raises
    ------
    SchemaError
        If a subject has encoders on one side only, or its encoders have no neuroid of the target
        in common.
    """
    # Encoders of one person need not say whose they are.
    ours, theirs = _subjects_of(encoders), _subjects_of(others)
    parts = [(who, part) for who, e in zip(ours, encoders, strict=True) for part in parts_of(e)]
    wanted: dict[str, dict[str, float]] = {}
    for (who, part), over in zip(parts, weights, strict=True):
        mine = wanted.setdefault(who, {})
        for n, w in zip(_ids(part), over.tolist(), strict=True):
            if w:
                mine[n] = mine.get(n, 0.0) + w
    shared = Counter(theirs)
    if set(shared) != set(wanted):
        alone = min(set(shared) ^ set(wanted))
        raise SchemaError(
            f"The encoders are of subjects {', '.join(map(repr, sorted(wanted)))}, the others of "
            f"{', '.join(map(repr, sorted(shared)))}; {alone!r} is not in both."
        )
    return [
        w / shared[who]
        for who, other in zip(theirs, others, strict=True)
        for w in _over_parts(wanted[who], other)
    ]


def _subjects_of(encoders: Sequence[Encoder]) -> list[str]:
    """Return whose each encoder is; of several each has to say it."""
    found = [str(parts_of(e)[0].attrs.get("subject", "")) for e in encoders]
    if len(found) > 1 and not all(found):
        raise SchemaError(
            "Of several encoders each must name its subject; without it their neuroids cannot be "
            "told apart.",
            "Set attrs['subject'].",
        )
    return found


def _ids(part: xr.Dataset) -> list[str]:
    ids: list[str] = part["neuroid_id"].values.astype(str).tolist()
    return ids


def _over_parts(wanted: Mapping[str, float], encoder: Encoder) -> list[NDArray[np.float64]]:
    """Return weights by neuroid as weights over an encoder's parts, with the same sums."""
    out = [np.array([wanted.get(n, 0.0) for n in _ids(e)]) for e in parts_of(encoder)]
    for sign in (1, -1):
        whole = sum(w for w in wanted.values() if sign * w > 0)
        here = sum(float(w[sign * w > 0].sum()) for w in out)
        if whole and not here:
            raise SchemaError(
                "The encoders have no neuroid of the target in common; the first is missing: "
                f"{next(n for n, w in wanted.items() if sign * w > 0)!r}."
            )
        if whole:
            out = [np.where(sign * w > 0, w * (whole / here), w) for w in out]
    return out


def load_source(
    source: Mapping[str, Any],
    *,
    models: Mapping[str, Model] | None = None,
    device: str | torch.device = "auto",
) -> Model:
    """Load the model that a source of an encoder names, and make sure that it is the same.

    Parameters
    ----------
    source : mapping
        As `brainalign.encoding.sources_of` lists them.
    models : mapping of str to Model, optional
        Models by name that are loaded already, such as those with weights from a file.
    device : str or torch.device
        Where to.

    Raises
    ------
    SchemaError
        If its weights or its preprocessing are not those that the encoder was fitted with.
    """
    name = str(source["model"])
    recorded = json.loads(source["preprocessing"]) if "preprocessing" in source else {}
    if models and name in models:
        model = models[name].to(device)
    else:
        options = dict(recorded.get("options", {}))
        seed = int(options.pop("seed", 0))
        model = load_model(name, options=options, seed=seed, device=device)
        if recorded and _canonical(model.preprocessing) != _canonical(recorded):
            model = load_model(
                name, options=options, seed=seed, device=device, mean=recorded.get("mean"),
                std=recorded.get("std"), image_size=recorded["image_size"][0],
            )  # fmt: skip
    if recorded and _canonical(model.preprocessing) != _canonical(recorded):
        raise SchemaError(
            f"The encoder was fitted with the preprocessing {recorded} of {name}; it has "
            f"{model.preprocessing}."
        )
    expected = source.get("weights_sha256")
    if expected and model.weights_sha256 != expected:
        raise SchemaError(
            f"The encoder was fitted to {name} with weights {expected[:12]}...; these are "
            f"{model.weights_sha256[:12]}....",
            "Load the model with those weights and pass it in models.",
        )
    return model


def _canonical(preprocessing: Mapping[str, Any]) -> str:
    return json.dumps(preprocessing, sort_keys=True)


class _Tower(nn.Module):
    """One model: its layers of images, each through its own linear map."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.linear = nn.ModuleList()
        self.layers: list[tuple[str, Any]] = []

    def add(self, layer: str, pooling: Any, weight: NDArray[np.float64]) -> None:
        found = self.model.traced.get(layer)
        if found is not None and pooled_shape(found, pooling) != (weight.shape[1],):
            raise SchemaError(
                f"The encoder has {weight.shape[1]} features of layer {layer!r}, and pooling "
                f"{pooling!r} gives {pooled_shape(found, pooling)}.",
                "Features that were reduced after extraction cannot be followed by a gradient.",
            )
        w = torch.as_tensor(weight, dtype=torch.float32)
        if (layer, pooling) in self.layers:
            self.linear[self.layers.index((layer, pooling))].get_parameter("weight").data.add_(w)
            return
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        linear.weight.data = w
        self.linear.append(linear)
        self.layers.append((layer, pooling))

    def close(self, interpolation: str | None) -> None:
        self.features = ImageFeatures(self.model, self.layers, interpolation=interpolation)

    def forward(self, images: Tensor) -> Tensor:
        found = self.features(images)
        return torch.stack([f(x) for f, x in zip(self.linear, found, strict=True)]).sum(0)


class ImageEncoder(nn.Module):
    r"""What encoders predict for images, with a gradient.

    .. math:: y_k(I) = \sum_e \sum_v r^e_{kv} \left( W^e_v \,
              \frac{\phi^e(P^e(I)) - \mu^e}{\sigma^e} + b^e_v \right)

    with P resizing the image to the model's size (antialiased), cropping its centre and
    normalising it, :math:`\phi` the layer as it was pooled, and r the readout of each encoder:
    the mean of a ROI, a contrast, or a row for each neuroid. Encoders of one model share its
    forward pass.

    Parameters
    ----------
    encoders : Dataset or sequence of Dataset
        ``encoder`` schema; encoders of several layers of one or more models are understood.
    readouts : sequence of ndarray, shape (n_outputs, n_neuroids) or (n_neuroids,), optional
        One an encoder; by default every neuroid of the only encoder.
    models : mapping of str to Model, optional
        See `load_source`.
    interpolation : {None, "bilinear", "bicubic"}
        How images of another size are resized; None for the model's own. The paper has bilinear.
    device : str or torch.device
        Where to.

    Raises
    ------
    SchemaError
        If the encoder has delays, or its features cannot be computed from an image by the model
        that it names.
    ConfigError
        If the model's preprocessing is more than resize, crop and normalise.
    """

    def __init__(
        self,
        encoders: xr.Dataset | Sequence[xr.Dataset],
        readouts: Sequence[NDArray[np.float64]] | None = None,
        *,
        models: Mapping[str, Model] | None = None,
        interpolation: str | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        super().__init__()
        device = resolve_device(device)
        encoders = parts_of(encoders)
        if readouts is None:
            if len(encoders) != 1:
                raise ConfigError("Several encoders need readouts to be added up by.")
            readouts = [np.eye(encoders[0].sizes["neuroid"])]
        if len(readouts) != len(encoders) or not encoders:
            raise ConfigError(f"{len(readouts)} readouts came for {len(encoders)} encoders.")
        towers: dict[str, _Tower] = {}
        bias = np.zeros(1)
        for encoder, readout in zip(encoders, readouts, strict=True):
            validate(encoder, "encoder")
            if "delay" in encoder.dims:
                raise SchemaError(
                    "The encoder has delays: it predicts over time, not from one image."
                )
            r = np.atleast_2d(np.asarray(readout, dtype=np.float64))
            if r.shape[1] != encoder.sizes["neuroid"]:
                raise SchemaError(
                    f"A readout has {r.shape[1]} neuroids, its encoder {encoder.sizes['neuroid']}."
                )
            scale = encoder["feature_scale"].values.astype(np.float64)
            used = np.flatnonzero((r != 0).any(axis=0))
            if not len(used):
                continue
            w = encoder["weights"].isel(neuroid=used).values.astype(np.float64)
            w = (r[:, used] @ w) / scale
            bias = (
                bias
                + r @ encoder["intercept"].values.astype(np.float64)
                - w @ encoder["feature_mean"].values
            )
            start = 0
            for source in sources_of(encoder):
                stop = start + int(source["n_features"])
                key = sha256_of(source["model"], source.get("weights_sha256"),
                                source.get("preprocessing"))[:16]  # fmt: skip
                if key not in towers:
                    model = load_source(source, models=models, device=device)
                    towers[key] = _Tower(model)
                pooling = source.get("pooling", "mean")
                towers[key].add(source["layer"], pooling, w[:, start:stop])
                start = stop
        for tower in towers.values():
            tower.close(interpolation)
        self.towers = nn.ModuleDict(towers)
        self.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32), requires_grad=False)
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Return (image, output) for images (image, 3, row, column) in [0, 1]."""
        images = images.to(self.bias.dtype)
        return self.bias + sum(tower(images) for tower in self.towers.values())

    def objective(self, images: Tensor) -> Tensor:
        """Return the only output of each image, shape (image,)."""
        return self(images)[:, 0]
