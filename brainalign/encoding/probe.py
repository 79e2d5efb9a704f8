"""A linear probe trained by gradient descent on augmented images, beside closed-form ridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from brainalign.data.schema import validate
from brainalign.data.stimuli import StimulusSet
from brainalign.device import resolve_device
from brainalign.encoding.align import align
from brainalign.errors import ConfigError, SchemaError
from brainalign.features.differentiable import ImageFeatures
from brainalign.features.extraction import extract
from brainalign.features.layers import Pooling
from brainalign.features.models import Model, load_model

__all__ = ["AdamWProbe", "augment", "fit_probe"]


def augment(
    images: Tensor,
    normalise: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    *,
    brightness: float = 0.05,
    shift: int = 4,
    noise: float = 0.05,
) -> Tensor:
    r"""Vary images as a subject's eyes and screen do, at the size and in the units of a model.

    .. math:: I' = P(u \, I)_{x + \delta} + \eta, \qquad u \sim U(1 - b, 1 + b), \quad
              \delta \sim U\{-s, \dots, s\}^2, \quad \eta \sim N(0, \sigma^2)

    P normalises; borders are replicated. There is one u and one :math:`\delta` an image and one
    :math:`\eta` a pixel and channel.

    Parameters
    ----------
    images : tensor, shape (image, channel, row, column)
        At the model's input size, in [0, 1].
    normalise : callable
        P, such as `brainalign.features.differentiable.Preprocess.normalise`.
    generator : torch.Generator
        On the CPU.
    brightness : float
        b, of the image before it is normalised.
    shift : int
        s, in pixels of the model's input.
    noise : float
        :math:`\sigma`, in units of the normalised image: with the normalisation of CLIP, 0.05 are
        0.013 of the range of a pixel.

    Returns
    -------
    tensor, shape (image, channel, row, column)
        Normalised.

    References
    ----------
    Luo et al. (2023), BrainDiVE, NeurIPS; order, units and numbers are those of the authors' code.
    """
    n, _, rows, columns = images.shape
    factor = 1 + brightness * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
    moved = torch.randint(-shift, shift + 1, (n, 2), generator=generator)
    seen = normalise(images * factor.to(images))
    wide = functional.pad(seen, (shift,) * 4, mode="replicate")
    out = torch.stack(
        [
            wide[i, :, shift + y : shift + y + rows, shift + x : shift + x + columns]
            for i, (y, x) in enumerate(moved.tolist())
        ]
    )
    return out + noise * torch.randn(out.shape, generator=generator).to(out)


class AdamWProbe(RegressorMixin, BaseEstimator):
    r"""Linear map from features to responses, fitted by AdamW.

    .. math:: \min_{W, b} \frac{1}{n V} \sum_{i, v} (y_{iv} - W_v^\top \phi(a(I_i)) - b_v)^2

    with decoupled weight decay :math:`\lambda`, the learning rate :math:`\eta_e = \eta_0 \,
    (1/2)^{e / E}` in epoch e = 1, ..., E, and an image resized for the model and augmented anew (a)
    each time it is seen.

    Parameters
    ----------
    model : Model, optional
        Computes features of images in [0, 1], ``X`` (n, 3, row, column). Without it X are features
        (n, feature), and nothing is augmented.
    layer, pooling : str
        Of the model.
    n_epochs : int
        E.
    learning_rate : float
        :math:`\eta_0`.
    weight_decay : float
        :math:`\lambda`; 0.02 with CLIP ViT-B/16 in the paper.
    batch_size : int
        Images a step.
    brightness, shift, noise
        See `augment`.
    seed : int
        Draws the first weights, the order of images and the augmentation.
    device : str
        Where to work.
    progress : bool, optional
        Whether to draw a progress bar; by default in a terminal.

    Attributes
    ----------
    coef_ : ndarray, shape (n_targets, n_features)
    intercept_ : ndarray, shape (n_targets,)
    loss_ : ndarray, shape (n_epochs,)
        Mean squared error of the batches of each epoch.

    References
    ----------
    Luo et al. (2023), Brain Diffusion for Visual Exploration (BrainDiVE), NeurIPS: 100 epochs of
    learning rate 3e-4 to 1.5e-4, weight decay 2e-2, batches of 64; see `augment` for the images.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        layer: str = "output",
        pooling: Pooling = "unit",
        n_epochs: int = 100,
        learning_rate: float = 3e-4,
        weight_decay: float = 2e-2,
        batch_size: int = 64,
        brightness: float = 0.05,
        shift: int = 4,
        noise: float = 0.05,
        seed: int = 0,
        device: str = "auto",
        progress: bool | None = None,
    ) -> None:
        self.model, self.layer, self.pooling = model, layer, pooling
        self.n_epochs, self.learning_rate, self.weight_decay = n_epochs, learning_rate, weight_decay
        self.batch_size = batch_size
        self.brightness, self.shift, self.noise = brightness, shift, noise
        self.seed, self.device, self.progress = seed, device, progress

    def fit(self, X: Any, y: ArrayLike) -> AdamWProbe:
        """Fit to X, images or features, and y (n,) or (n, n_targets).

        X may be an array, a tensor, or a StimulusSet, which is read batch by batch.

        Raises
        ------
        SchemaError
            If numbers of rows differ or a response is not finite.
        ConfigError
            If a setting is out of range.
        """
        if self.n_epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ConfigError("n_epochs and batch_size are at least 1, learning_rate above 0.")
        target = torch.as_tensor(np.asarray(y, dtype=np.float32))
        self._one = target.ndim == 1
        target = target[:, None] if self._one else target
        if len(X) != len(target):
            raise SchemaError(f"{len(X)} images or features came with {len(target)} responses.")
        if not bool(target.isfinite().all()):
            raise SchemaError("A response is not finite.", "Leave its neuroid or image out.")
        device = resolve_device(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        features = self._features(device, generator)
        width = self._features(device)(self._rows(X, np.arange(1)).to(device)).shape[1]
        linear = nn.Linear(width, target.shape[1])
        # Small beside what the responses vary by; drawn from our own generator.
        linear.weight.data = torch.randn(linear.weight.shape, generator=generator) * 1e-3
        linear.bias.data = target.mean(0)
        linear.to(device)
        optimiser = torch.optim.AdamW(
            linear.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        losses = np.empty(self.n_epochs)
        hide = None if self.progress is None else not self.progress
        for epoch in tqdm(range(self.n_epochs), desc="probe", unit="epoch", disable=hide):
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * 0.5 ** ((epoch + 1) / self.n_epochs)
            total = 0.0
            for rows in self._batches(len(target), generator):
                found = linear(features(self._rows(X, rows).to(device)))
                loss = functional.mse_loss(found, target[torch.from_numpy(rows)].to(device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            losses[epoch] = total / len(target)
        self.coef_ = linear.weight.detach().cpu().numpy()
        self.intercept_ = linear.bias.detach().cpu().numpy()
        self.loss_, self.n_features_in_ = losses, width
        return self

    def predict(self, X: Any) -> NDArray[np.float32]:
        """Return predicted responses to images or features, not augmented."""
        check_is_fitted(self, "coef_")
        device = resolve_device(self.device)
        features = self._features(device)
        out = [
            features(self._rows(X, rows).to(device)).cpu().numpy() @ self.coef_.T + self.intercept_
            for rows in np.array_split(np.arange(len(X)), max(1, -(-len(X) // self.batch_size)))
        ]
        whole = np.concatenate(out)
        return whole[:, 0] if self._one else whole

    def _features(
        self, device: torch.device, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Return what computes features; with a generator, of images that it augments."""
        if self.model is None:
            return lambda x: x
        module = ImageFeatures(self.model.to(device), [(self.layer, self.pooling)])
        change: dict[str, Any] = {k: getattr(self, k) for k in ("brightness", "shift", "noise")}

        @torch.no_grad()
        def run(images: Tensor) -> Tensor:
            preprocess = module.preprocess
            if generator is None:
                return module(images)[0]
            resized = preprocess.resize(images)
            return module.of_inputs(augment(resized, preprocess.normalise, generator, **change))[0]

        return run

    def _rows(self, X: Any, rows: NDArray[np.intp]) -> Tensor:
        if isinstance(X, StimulusSet):
            read = np.stack([np.asarray(X.open(int(i)), dtype=np.float32) for i in rows])
            return torch.from_numpy(read).movedim(-1, 1) / 255
        return torch.as_tensor(X[rows], dtype=torch.float32)

    def _batches(self, n: int, generator: torch.Generator) -> Iterator[NDArray[np.intp]]:
        order = torch.randperm(n, generator=generator).numpy()
        for start in range(0, n, self.batch_size):
            yield order[start : start + self.batch_size]


def fit_probe(
    model: Model | str,
    stimuli: StimulusSet,
    responses: xr.Dataset,
    *,
    layer: str = "output",
    pooling: Pooling = "unit",
    device: str = "auto",
    bad_neuroids: str = "exclude",
    **options: Any,
) -> xr.Dataset:
    """Fit an `AdamWProbe` to the mean response to each stimulus, as an encoder.

    Parameters
    ----------
    model : Model or str
        Computes the features.
    stimuli : StimulusSet
        Images of one size, with those that responses are of.
    responses : Dataset
        ``responses`` schema.
    layer, pooling : str
        Of the model.
    device : str
        Where to work.
    bad_neuroids : str
        As in `brainalign.encoding.encode`.
    **options
        Of `AdamWProbe`.

    Returns
    -------
    Dataset
        ``encoder`` schema, alike that of `brainalign.encoding.fit_encoder`: its alpha is NaN.
    """
    model = load_model(model, device=device) if isinstance(model, str) else model.to(device)
    shown = set(responses["stimulus_id"].values.astype(str).tolist())
    stimuli = stimuli.select([s for s in stimuli.ids if s in shown])
    features = extract(model, stimuli, layer, pooling=pooling, device=device)[layer]
    aligned = align(features, responses, repetitions="average", bad_neuroids=bad_neuroids)
    rows = stimuli.select(aligned.row_id.astype(str).tolist())
    probe = AdamWProbe(model, layer=layer, pooling=pooling, device=device, **options)
    probe.fit(rows, aligned.responses)
    kept = ("pooling", "preprocessing", "weights_sha256")
    n, width = probe.coef_.shape
    ds = xr.Dataset(
        {
            "weights": (("neuroid", "feature"), probe.coef_),
            "intercept": ("neuroid", probe.intercept_.astype(np.float64)),
            "alpha": ("neuroid", np.full(n, np.nan)),
            "feature_mean": ("feature", np.zeros(width)),
            "feature_scale": ("feature", np.ones(width)),
        },
        coords={"model": model.name, "layer": layer},
        attrs={
            **{k: str(aligned.attrs.get(k, "")) for k in ("units", "subject", "space")},
            **{k: features.attrs[k] for k in kept},
            "n_stimuli": len(rows),
            "estimator": "AdamWProbe",
        },
    )
    return validate(ds.merge(aligned.neuroids, combine_attrs="override"), "encoder")
