"""Encoders as functions of an image that have a gradient, and what of them is to be high."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from brainalign.data.schema import validate
from brainalign.data.store import sha256_of
from brainalign.device import resolve_device
from brainalign.encoding.clusters import spherical_kmeans
from brainalign.encoding.model import sources_of
from brainalign.encoding.rois import roi_members
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.features.layers import OUTPUT, hooked, pooled, pooled_shape, tensor_of
from brainalign.features.models import Model, load_model

__all__ = ["ImageEncoder", "Target", "load_source", "same_neuroids"]

_INTERPOLATIONS = ("bilinear", "bicubic")
#: Largest difference, in pixel values, between a model's own preprocessing and ours.
_PIXEL_TOLERANCE = 0.02


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
    seed : int
        Of the clustering.
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
    seed: int = 0
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

    def weights(self, encoders: Sequence[xr.Dataset]) -> list[NDArray[np.float64]]:
        """Return the weight of every neuroid of each encoder: 1/n inside, -1/n in `against`.

        Clusters are found in the weights of all encoders together.

        Raises
        ------
        UnknownNameError
            For a ROI or a neuroid that an encoder does not have.
        SchemaError
            If encoders whose weights are clustered together have different features.
        """
        if self.neuroids:
            return [_mean(_by_id(e, self.neuroids), e.sizes["neuroid"]) for e in encoders]
        assert self.roi is not None
        rois = [r for r in (self.roi, self.against) if r is not None]
        members = [roi_members(e, rois) for e in encoders]
        if self.n_clusters is None:
            out = []
            for e, found in zip(encoders, members, strict=True):
                w = _mean(found[self.roi], e.sizes["neuroid"])
                if self.against is not None:
                    w = w - _mean(found[self.against], e.sizes["neuroid"])
                out.append(w)
            return out
        labels = self.clusters(encoders)
        for e, label in zip(encoders, labels, strict=True):
            if not (label == self.cluster).any():
                raise UnknownNameError(
                    f"{self.name} has no neuroid in the encoder of subject "
                    f"{e.attrs.get('subject', '')!r}."
                )
        return [_mean(np.flatnonzero(label == self.cluster), len(label)) for label in labels]

    def clusters(self, encoders: Sequence[xr.Dataset]) -> list[NDArray[np.intp]]:
        """Return the cluster of every neuroid of each encoder, -1 outside the ROI."""
        if self.roi is None or self.n_clusters is None:
            raise ConfigError("There are clusters only of a ROI, with n_clusters.")
        if len({e.sizes["feature"] for e in encoders}) > 1:
            raise SchemaError("Encoders that are clustered together need the same features.")
        members = [roi_members(e, [self.roi])[self.roi] for e in encoders]
        # A neuroid that nothing predicts has no direction.
        w = [e["weights"].isel(neuroid=m).values for e, m in zip(encoders, members, strict=True)]
        directed = [np.linalg.norm(x, axis=1) > 0 for x in w]
        stacked = np.concatenate([x[d] for x, d in zip(w, directed, strict=True)])
        found, _ = spherical_kmeans(stacked, self.n_clusters, seed=self.seed)
        out, start = [], 0
        for e, m, d in zip(encoders, members, directed, strict=True):
            label = np.full(e.sizes["neuroid"], -1, dtype=np.intp)
            label[m[d]] = found[start : start + d.sum()]
            start += int(d.sum())
            out.append(label)
        return out


def _mean(members: NDArray[np.intp], n: int) -> NDArray[np.float64]:
    w = np.zeros(n)
    w[members] = 1 / len(members)
    return w


def _by_id(encoder: xr.Dataset, ids: Sequence[str]) -> NDArray[np.intp]:
    place = {s: i for i, s in enumerate(encoder["neuroid_id"].values.astype(str).tolist())}
    unknown = [s for s in ids if s not in place]
    if unknown:
        raise UnknownNameError(
            f"The encoder has no neuroid {unknown[0]!r} ({len(unknown)} of {len(ids)} are "
            f"missing).{near(unknown[0], place)}"
        )
    return np.array([place[s] for s in ids])


def same_neuroids(
    weights: NDArray[np.float64], encoder: xr.Dataset, other: xr.Dataset
) -> NDArray[np.float64]:
    """Return weights over one encoder's neuroids as weights over another encoder of its subject.

    Neuroids are told by ``neuroid_id``. Those that the other lacks are left out, and what is left
    of the positive and of the negative weights is scaled to the same sums.

    Raises
    ------
    SchemaError
        If the encoders are of different subjects, or have no neuroid of the target in common.
    """
    subjects = [str(e.attrs.get("subject", "")) for e in (encoder, other)]
    if subjects[0] != subjects[1]:
        raise SchemaError(f"The encoders are of subjects {subjects[0]!r} and {subjects[1]!r}.")
    used = np.flatnonzero(weights)
    ids = encoder["neuroid_id"].values.astype(str)[used].tolist()
    place = {s: i for i, s in enumerate(other["neuroid_id"].values.astype(str).tolist())}
    out = np.zeros(other.sizes["neuroid"])
    for name, w in zip(ids, weights[used].tolist(), strict=True):
        if name in place:
            out[place[name]] = w
    for sign in (1, -1):
        whole, here = weights[sign * weights > 0].sum(), out[sign * out > 0].sum()
        if whole and not here:
            raise SchemaError(
                "The encoders have no neuroid of the target in common; the first is missing: "
                f"{ids[0]!r}."
            )
        if whole:
            out[sign * out > 0] *= whole / here
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


class _Preprocess(nn.Module):
    """Images in [0, 1] to what a model takes, with a gradient."""

    def __init__(self, model: Model, interpolation: str | None) -> None:
        super().__init__()
        known = model.preprocessing
        own = str(known.get("interpolation", known.get("processor", {}).get("resample", "")))
        own = {"3": "bicubic", "2": "bilinear"}.get(own, own)
        chosen = own if interpolation is None else interpolation
        if chosen not in _INTERPOLATIONS:
            raise ConfigError(
                f"Images are resized by {' or '.join(_INTERPOLATIONS)} interpolation; "
                f"{model.name} has {own!r} and {interpolation!r} was asked for."
            )
        if not known.get("mean") or not known.get("std"):
            raise ConfigError(f"{model.name} does not say its mean and std.")
        rows, columns = known["image_size"]
        self.size = (int(rows), int(columns))
        crop = float(known.get("crop_pct", 1.0))
        processor = known.get("processor", {})
        if processor.get("do_center_crop"):
            side = processor.get("size", {})
            crop = rows / (side.get("shortest_edge") or side.get("height") or rows)
        squash = "squash" in (known.get("resize"), known.get("crop_mode"))
        squash |= "processor" in known and not processor.get("do_center_crop")
        self.squash, self.interpolation = squash, chosen
        self.side = [math.floor(n / crop) for n in self.size]
        for name in ("mean", "std"):
            values = torch.tensor(known[name], dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self._check(model)

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[-2:]
        if self.squash:
            size = (self.side[0], self.side[1])
        else:
            factor = max(self.side[0] / rows, self.side[1] / columns)
            size = (round(rows * factor), round(columns * factor))
        if size != (rows, columns):
            images = functional.interpolate(
                images, size, mode=self.interpolation, align_corners=False, antialias=True
            )
            if self.interpolation == "bicubic":
                images = images.clamp(0, 1)
        top, left = (round((n - m) / 2) for n, m in zip(size, self.size, strict=True))
        images = images[..., top : top + self.size[0], left : left + self.size[1]]
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images - mean) / std

    def _check(self, model: Model) -> None:
        """Compare with the model's own transform on a smooth image of the model's size."""
        from PIL import Image

        y, x = np.mgrid[: self.size[0], : self.size[1]] / np.array(self.size).reshape(2, 1, 1)
        smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(3 * x + 2 * y)], axis=-1)
        picture = np.round(255 * smooth).astype(np.uint8)
        theirs = model.transform(Image.fromarray(picture))
        ours = self(torch.from_numpy(picture).movedim(-1, 0)[None] / 255)[0]
        if theirs.shape != ours.shape:
            raise ConfigError(
                f"{model.name} takes images of shape {tuple(theirs.shape)}, not "
                f"{tuple(ours.shape)}: its preprocessing is not resize, crop and normalise."
            )
        std = self.get_buffer("std")[0]
        difference = float(((ours - theirs) * std).abs().max())
        if difference > _PIXEL_TOLERANCE:
            raise ConfigError(
                f"The preprocessing of {model.name} is not resize, crop and normalise: on a test "
                f"image ours differs by {difference:.3f} of the range of a pixel.",
                "Guide by an encoder of another model.",
            )


class _Tower(nn.Module):
    """One model: its layers of images, each through its own linear map."""

    def __init__(self, model: Model, interpolation: str | None) -> None:
        super().__init__()
        self.preprocess = _Preprocess(model, interpolation)
        self.module, self.model = model.module, model
        self.maps = nn.ModuleDict()
        self.layers: dict[str, tuple[str, Any]] = {}

    def add(self, layer: str, pooling: Any, weight: NDArray[np.float64]) -> None:
        if layer not in self.model.traced:
            raise UnknownNameError(
                f"{self.model.name} has no layer {layer!r}.{near(layer, self.model.traced)}"
            )
        shape = pooled_shape(self.model.traced[layer], pooling)
        if shape != (weight.shape[1],):
            raise SchemaError(
                f"The encoder has {weight.shape[1]} features of layer {layer!r}, and pooling "
                f"{pooling!r} gives {shape}.",
                "Features that were reduced after extraction cannot be followed by a gradient.",
            )
        key = sha256_of(layer, pooling)[:16]
        if key in self.maps:
            linear: Any = self.maps[key]
            linear.weight.data += torch.as_tensor(weight, dtype=torch.float32)
            return
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = torch.as_tensor(weight, dtype=torch.float32)
        self.maps[key] = linear.requires_grad_(False)
        self.layers[key] = (layer, pooling)

    def forward(self, images: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        names = {layer for layer, _ in self.layers.values()}
        wanted: dict[str, list[Any]] = {n: [] for n in names}
        for key, (layer, pooling) in self.layers.items():
            wanted[layer].append((key, pooling))

        def receive(name: str, output: Tensor) -> None:
            for key, pooling in wanted[name]:
                # A copy: a later layer may work in place.
                found[key] = pooled(output, self.model.traced[name], pooling).clone()

        with hooked(self.module, sorted(names), receive):
            output = tensor_of(self.model.forward(self.preprocess(images)))
        if OUTPUT in names and output is not None:
            receive(OUTPUT, output)
        return sum(self.maps[key](x) for key, x in found.items())


class ImageEncoder(nn.Module):
    r"""What encoders predict for images, with a gradient.

    .. math:: y_k(I) = \frac1E \sum_e \sum_v r^e_{kv} \left( W^e_v \,
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
        encoders = [encoders] if isinstance(encoders, xr.Dataset) else list(encoders)
        if readouts is None:
            if len(encoders) != 1:
                raise ConfigError("Several encoders need readouts to be averaged.")
            readouts = [np.eye(encoders[0].sizes["neuroid"])]
        if len(readouts) != len(encoders) or not encoders:
            raise ConfigError(f"{len(readouts)} readouts came for {len(encoders)} encoders.")
        towers: dict[str, _Tower] = {}
        bias = 0.0
        for encoder, readout in zip(encoders, readouts, strict=True):
            validate(encoder, "encoder")
            if "delay" in encoder.dims:
                raise SchemaError(
                    "The encoder has delays: it predicts over time, not from one image."
                )
            r = np.atleast_2d(np.asarray(readout, dtype=np.float64)) / len(encoders)
            if r.shape[1] != encoder.sizes["neuroid"]:
                raise SchemaError(
                    f"A readout has {r.shape[1]} neuroids, its encoder {encoder.sizes['neuroid']}."
                )
            scale = encoder["feature_scale"].values.astype(np.float64)
            used = np.flatnonzero((r != 0).any(axis=0))
            w = encoder["weights"].isel(neuroid=used).values.astype(np.float64)
            w = (r[:, used] @ w) / scale
            bias = bias + r @ encoder["intercept"].values - w @ encoder["feature_mean"].values
            start = 0
            for source in sources_of(encoder):
                stop = start + int(source["n_features"])
                key = sha256_of(source["model"], source.get("weights_sha256"),
                                source.get("preprocessing"))[:16]  # fmt: skip
                if key not in towers:
                    model = load_source(source, models=models, device=device)
                    towers[key] = _Tower(model, interpolation)
                pooling = source.get("pooling", "mean")
                towers[key].add(source["layer"], pooling, w[:, start:stop])
                start = stop
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
