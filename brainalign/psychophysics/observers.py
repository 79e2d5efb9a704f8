"""Whoever says what a picture shows, behind one interface: networks, CLIP, simulated observers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from brainalign.data.schema import validate
from brainalign.data.stimuli import StimulusSet
from brainalign.errors import (
    ConfigError,
    MissingDependencyError,
    SchemaError,
    UnknownNameError,
    near,
)
from brainalign.features.models import Model, load_model
from brainalign.psychophysics.analysis import probability_correct
from brainalign.psychophysics.stimuli import CONTRAST, MEAN, low_contrast, mask

__all__ = [
    "Classifier",
    "LinearReadout",
    "Observer",
    "SimulatedObserver",
    "ZeroShotClassifier",
    "grey_images",
    "observe",
    "output_labels",
    "prepared",
    "sixteen_classes",
]

#: Says what the labels of an ImageNet classifier's outputs are; one more output is a background.
_IMAGENET = 1000


class Observer(Protocol):
    """Names what pictures show.

    Attributes
    ----------
    name : str
        The subject of its trials.
    classes : tuple of str
        What it chooses from.
    sees : bool
        Whether it needs the pictures; a simulated observer knows of the condition alone.
    """

    name: str
    classes: tuple[str, ...]
    sees: bool

    def respond(self, images: Tensor | None, design: xr.Dataset) -> NDArray[np.str_]:
        """Return a class for each trial.

        Parameters
        ----------
        images : Tensor, shape (n_trials, height, width), or None
            Grey, intensities in 0..1; None for an observer that does not see.
        design : xarray.Dataset
            The trials, as of `brainalign.psychophysics.stimuli.masking_design`. Only simulated
            observers may look at it.
        """
        ...


class SimulatedObserver:
    """An observer with a known channel, which answers by `probability_correct`.

    Its errors are spread evenly over the other classes.

    Parameters
    ----------
    classes : sequence of str
        What it chooses from; chance is one over their number.
    bandwidth, centre, sensitivity, slope, lapse : float
        See `brainalign.psychophysics.analysis.probability_correct`.
    seed : int
        Of its answers.
    name : str
        The subject of its trials.
    """

    sees = False

    def __init__(
        self,
        classes: Sequence[str],
        *,
        bandwidth: float,
        centre: float,
        sensitivity: float,
        slope: float = 2.0,
        lapse: float = 0.02,
        seed: int = 0,
        name: str = "simulated",
    ) -> None:
        if len(set(classes)) < 2:
            raise ConfigError(f"An observer chooses from 2 classes or more; got {list(classes)}.")
        self.classes = tuple(classes)
        self.name = name
        self.channel = {
            "bandwidth": bandwidth, "centre": centre, "sensitivity": sensitivity, "slope": slope,
            "lapse": lapse, "guess": 1 / len(self.classes),
        }  # fmt: skip
        self._rng = np.random.default_rng(seed)

    def respond(self, images: Tensor | None, design: xr.Dataset) -> NDArray[np.str_]:
        """Return a class for each trial of the design."""
        noise_sd = design["noise_sd"].values.astype(float)
        frequency = np.where(noise_sd > 0, design["frequency"].values, 1.0)
        p = probability_correct(frequency, noise_sd, **self.channel)
        names = np.array(self.classes)
        place = {c: i for i, c in enumerate(self.classes)}
        true = np.array([place[str(c)] for c in design["category"].values])
        wrong = (true + self._rng.integers(1, len(names), len(true))) % len(names)
        return names[np.where(self._rng.random(len(true)) < p, true, wrong)]


def sixteen_classes() -> dict[str, list[str]]:
    """Return the 16 classes of Geirhos et al. 2018 with their WordNet synsets of ImageNet-1k."""
    text = resources.files(__package__).joinpath("sixteen_classes.json").read_text("utf-8")
    return json.loads(text)


def output_labels(model: Model, n_outputs: int) -> list[str]:
    """Return the labels of a classifier's outputs, in order.

    They are those that the model carries (``label_names`` of timm's configuration, ``id2label`` of
    transformers); for 1000 outputs without any the WordNet synsets of ImageNet-1k, and for 1001 the
    same after ``background``.

    Raises
    ------
    ConfigError
        If the model carries none and does not have as many outputs as ImageNet-1k.
    """
    config = getattr(model.module, "pretrained_cfg", None) or {}
    labels = config.get("label_names") if isinstance(config, Mapping) else None
    if labels is None and n_outputs not in (_IMAGENET, _IMAGENET + 1):
        ids = getattr(getattr(model.module, "config", None), "id2label", None)
        labels = [str(ids[i]) for i in sorted(ids)] if ids else None
    if labels is not None and len(labels) == n_outputs:
        return [str(label) for label in labels]
    if n_outputs not in (_IMAGENET, _IMAGENET + 1):
        raise ConfigError(
            f"{model.name} has {n_outputs} outputs and no labels for them.",
            "Give a mapping of each class to the numbers of its outputs.",
        )
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise MissingDependencyError(
            "The synsets of ImageNet come with timm.", 'pip install "brainalign[features]"'
        ) from error
    synsets = [str(s) for s in ImageNetInfo("imagenet-1k").label_names()]
    return [*(["background"] if n_outputs > _IMAGENET else []), *synsets]


def _read_mapping(mapping: str | Path | Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    if isinstance(mapping, Mapping):
        return mapping
    read = json.loads(Path(mapping).read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not all(isinstance(v, list) for v in read.values()):
        raise ConfigError(
            f"{mapping} is no mapping of classes.",
            'Write JSON such as {"cat": ["n02123045", "n02123159"], "dog": [207]}.',
        )
    return read


class Classifier:
    r"""A classifier of `brainalign.features.load_model`, its outputs gathered into classes.

    .. math:: \hat c = \arg\max_c \frac{1}{|M_c|} \sum_{i \in M_c} \mathrm{softmax}(z)_i

    Pictures go in as they are, resized only where the model takes another size, so that a frequency
    in cycles/image is what it says: a model's own cropping is left out.

    Parameters
    ----------
    model : Model or str
        Its output are logits; or its name.
    mapping : mapping or path, optional
        Each class with the labels (see `output_labels`) or numbers of its outputs, or a JSON file
        of such; default `sixteen_classes`. Labels that the model lacks are an error.
    name : str, optional
        The subject of its trials; default the model's.

    Raises
    ------
    ConfigError
        If the model gives no vector of logits, or a mapping is empty.
    UnknownNameError
        If the model has no output of a label.

    References
    ----------
    Geirhos et al. 2018, NeurIPS (arXiv:1808.08750), for the average over synsets.
    """

    sees = True

    def __init__(
        self,
        model: Model | str,
        mapping: str | Path | Mapping[str, Sequence[Any]] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        self.model = load_model(model) if isinstance(model, str) else model
        self.name = name or self.model.name
        chosen = sixteen_classes() if mapping is None else _read_mapping(mapping)
        if len(chosen) < 2 or not all(chosen.values()):
            raise ConfigError("A mapping needs 2 classes or more, each with an output.")
        self.classes = tuple(chosen)
        n_outputs = self._outputs()
        self._mean = torch.zeros(n_outputs, len(chosen))
        labels: dict[str, int] = {}
        if any(not isinstance(m, int) for members in chosen.values() for m in members):
            labels = {label: i for i, label in enumerate(output_labels(self.model, n_outputs))}
        for column, members in enumerate(chosen.values()):
            for member in members:
                self._mean[_output(member, labels, n_outputs, self.model), column] = 1 / len(
                    members
                )

    def _outputs(self) -> int:
        with torch.no_grad():
            logits = self.model.encode_image(self.model.noise()[None])
        if logits.ndim != 2:
            raise ConfigError(
                f"{self.model.name} gives {tuple(logits.shape[1:])} for an image; a classifier "
                "gives one vector of logits."
            )
        return logits.shape[1]

    def respond(self, images: Tensor | None, design: xr.Dataset) -> NDArray[np.str_]:
        """Return a class for each image."""
        with torch.inference_mode():
            logits = self.model.encode_image(prepared(self.model, images)).float()
            mean = logits.softmax(1) @ self._mean.to(logits.device)
        return np.array(self.classes)[mean.argmax(1).cpu().numpy()]


def _output(member: Any, labels: Mapping[str, int], n_outputs: int, model: Model) -> int:
    if isinstance(member, int):
        if 0 <= member < n_outputs:
            return member
        raise UnknownNameError(f"{model.name} has outputs 0 to {n_outputs - 1}; got {member}.")
    if str(member) not in labels:
        raise UnknownNameError(
            f"{model.name} has no output {str(member)!r}.{near(str(member), labels)}",
            "Map classes to labels of its outputs, or to their numbers.",
        )
    return labels[str(member)]


def prepared(model: Model, images: Tensor | None) -> Tensor:
    """Return grey images as the model's input: three channels, its size, its mean and deviation."""
    if images is None:
        raise SchemaError(f"{model.name} needs pictures.")
    mean, std = model.preprocessing.get("mean"), model.preprocessing.get("std")
    if mean is None or std is None:
        raise ConfigError(
            f"{model.name} does not say how its input is scaled.", "Load it with mean and std."
        )
    size = tuple(model.preprocessing["image_size"])
    x = images.to(model.device)[:, None]
    if x.shape[-2:] != size:
        x = functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    shape = (1, -1, 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


class ZeroShotClassifier:
    r"""A CLIP that chooses the class whose texts are nearest to the picture.

    .. math:: \hat c = \arg\max_c \cos(v(I), \bar t_c)

    with :math:`\bar t_c` the mean of the unit embeddings of the class's texts. Pictures go in as in
    `Classifier`.

    Parameters
    ----------
    model : Model or str
        With a text tower; or its name.
    classes : sequence of str, or mapping of str to sequence of str
        Classes, put into `templates`; or the whole texts of each. Default the 16 classes.
    templates : sequence of str
        Each with one ``{}`` for the class.
    name : str, optional
        The subject of its trials; default the model's.

    Raises
    ------
    ConfigError
        If the model has no text tower, or there are fewer than 2 classes.
    """

    sees = True

    def __init__(
        self,
        model: Model | str,
        classes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        *,
        templates: Sequence[str] = ("a photo of a {}.",),
        name: str | None = None,
    ) -> None:
        self.model = load_model(model) if isinstance(model, str) else model
        self.name = name or self.model.name
        named = list(sixteen_classes()) if classes is None else classes
        texts = (
            named
            if isinstance(named, Mapping)
            else {c: [t.replace("{}", c) for t in templates] for c in named}
        )
        if len(texts) < 2 or not all(texts.values()):
            raise ConfigError("An observer chooses from 2 classes or more, each with a text.")
        self.classes = tuple(texts)
        with torch.no_grad():
            means = [
                functional.normalize(self.model.encode_text(list(t)).float(), dim=-1).mean(0)
                for t in texts.values()
            ]
        self._texts = functional.normalize(torch.stack(means), dim=-1)

    def respond(self, images: Tensor | None, design: xr.Dataset) -> NDArray[np.str_]:
        """Return a class for each image."""
        with torch.inference_mode():
            embedded = self.model.encode_image(prepared(self.model, images)).float()
            nearest = (embedded @ self._texts.to(embedded.device).T).argmax(1)
        return np.array(self.classes)[nearest.cpu().numpy()]


class LinearReadout:
    r"""A model whose output is read by a linear classifier that learnt from clean pictures.

    .. math:: \hat c = \arg\max_c \; w_c^\top \frac{x(I) - \mu}{\sigma} + b_c

    by ridge regression on the classes, its penalty chosen by leave-one-out. It makes an observer of
    a model without a classifier of its own: one trained without labels, a model of V1, an untrained
    network. Pictures go in as in `Classifier`.

    Parameters
    ----------
    model : Model or str
        Any; or its name.
    images : Tensor, shape (n, height, width)
        Grey pictures to learn from, as of `grey_images`; shown in no trial.
    category : sequence of str
        What they show.
    contrast, mean : float
        Of the pictures of the experiment; see `brainalign.psychophysics.stimuli.low_contrast`.
    name : str, optional
        The subject of its trials; default the model's.
    batch_size : int
        Pictures at once.

    Raises
    ------
    SchemaError
        If there are fewer than 2 categories, or not one a picture.
    """

    sees = True

    def __init__(
        self,
        model: Model | str,
        images: Tensor,
        category: Sequence[str],
        *,
        contrast: float = CONTRAST,
        mean: float = MEAN,
        name: str | None = None,
        batch_size: int = 64,
    ) -> None:
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.model = load_model(model) if isinstance(model, str) else model
        self.name = name or self.model.name
        said = np.array(category, dtype=str)
        self.classes = tuple(np.unique(said).tolist())
        if len(said) != len(images) or len(self.classes) < 2:
            raise SchemaError(
                f"A readout learns from pictures of 2 categories or more, one each; got "
                f"{len(images)} pictures, {len(said)} categories of {len(self.classes)} kinds."
            )
        shown = low_contrast(images, contrast, mean)
        seen = [self._embed(part) for part in shown.split(batch_size)]
        ridge = RidgeClassifierCV(alphas=np.logspace(-1, 6, 15))
        self._readout = make_pipeline(StandardScaler(), ridge).fit(np.concatenate(seen), said)

    def _embed(self, images: Tensor | None) -> NDArray[np.float64]:
        with torch.inference_mode():
            output = self.model.encode_image(prepared(self.model, images))
        return output.flatten(1).double().cpu().numpy()

    def respond(self, images: Tensor | None, design: xr.Dataset) -> NDArray[np.str_]:
        """Return a class for each image."""
        return self._readout.predict(self._embed(images)).astype(str)


def grey_images(stimuli: StimulusSet, size: tuple[int, int]) -> Tensor:
    """Return stimuli as grey images, shape (n, height, width), intensities in 0..1.

    They are scaled to cover the size and cropped about their middle.
    """
    from PIL import Image, ImageOps

    height, width = size
    images = torch.empty(len(stimuli), height, width)
    for i in range(len(stimuli)):
        image = ImageOps.fit(
            stimuli.open(i).convert("L"), (width, height), Image.Resampling.BICUBIC
        )
        images[i] = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return images


def observe(
    observer: Observer,
    design: xr.Dataset,
    images: Tensor | None = None,
    stimulus_id: Sequence[str] | None = None,
    *,
    contrast: float = CONTRAST,
    mean: float = MEAN,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> xr.Dataset:
    """Run a masking experiment on an observer.

    Parameters
    ----------
    observer : Observer
        Who answers.
    design : xarray.Dataset
        Of `brainalign.psychophysics.stimuli.masking_design`.
    images : Tensor, shape (n, height, width), optional
        Grey images, as of `grey_images`; the noise is added here, in batches. Not needed for an
        observer that does not see.
    stimulus_id : sequence of str, length n
        Names of the images.
    contrast, mean : float
        Of the pictures; see `brainalign.psychophysics.stimuli.low_contrast`.
    batch_size : int
        Trials at once.
    device : str
        Where pictures are made; the noise depends on the kind of device.

    Returns
    -------
    xarray.Dataset
        The ``trials`` schema: the design with ``response`` and ``correct``, and the observer's name
        as ``subject``.

    Raises
    ------
    SchemaError
        If images are missing, or a category is none of the observer's classes.
    """
    strange = sorted({*design["category"].values.astype(str).tolist()} - {*observer.classes})
    if strange:
        raise SchemaError(
            f"Category {strange[0]!r} is none of the {len(observer.classes)} classes of "
            f"{observer.name}.{near(strange[0], observer.classes)}"
        )
    place: dict[str, int] = {}
    if observer.sees:
        if images is None or stimulus_id is None or len(images) != len(stimulus_id):
            raise SchemaError(f"{observer.name} needs images, and as many stimulus ids.")
        place = {str(s): i for i, s in enumerate(stimulus_id)}
        lacking = sorted({*design["stimulus_id"].values.astype(str).tolist()} - {*place})
        if lacking:
            raise SchemaError(f"There is no image {lacking[0]!r}.{near(lacking[0], place)}")
    size = design.sizes["trial"]
    answers = []
    for start in tqdm(range(0, size, batch_size), desc=observer.name, unit="batch", disable=None):
        part = design.isel(trial=slice(start, start + batch_size))
        shown = None
        if images is not None and observer.sees:
            rows = [place[str(s)] for s in part["stimulus_id"].values]
            shown = mask(
                images[rows].to(device), part["noise_sd"].values, part["band"].values,
                part["seed"].values, contrast=contrast, mean=mean,
            )  # fmt: skip
        answers.append(observer.respond(shown, part))
    response = np.concatenate(answers)
    trials = design.assign(
        response=("trial", response), correct=("trial", response == design["category"].values)
    ).assign_coords(subject=observer.name)
    return validate(trials.assign_attrs(contrast=contrast, mean=mean), "trials")
