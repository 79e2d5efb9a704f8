"""What a model's layers compute for images, with a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainalign.errors import ConfigError, UnknownNameError, near
from brainalign.features.layers import OUTPUT, Pooling, hooked, pooled, pooled_shape, tensor_of
from brainalign.features.models import Model

__all__ = ["ImageFeatures", "Preprocess"]

_INTERPOLATIONS = ("bilinear", "bicubic")
#: Largest difference, in the range of a pixel, between a model's own preprocessing and ours.
_PIXEL_TOLERANCE = 0.02


@lru_cache(maxsize=16)
# The matrix is kept for later calls, which may need a gradient.
@torch.inference_mode(False)
def _resizing(
    n_in: int, n_out: int, interpolation: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the matrix that resizes one axis: torch's filter, applied to every unit vector."""
    # Torch works out half precision in float32, and rounds the filter's positions to its type.
    unit = torch.eye(n_in, dtype=torch.promote_types(dtype, torch.float32))[None, None]
    matrix = functional.interpolate(
        unit, (n_out, n_in), mode=interpolation, align_corners=False, antialias=True
    )
    return matrix[0, 0].to(device, dtype)


class Preprocess(nn.Module):
    r"""Images in [0, 1] to what a model takes: resized with antialiasing, cropped, normalised.

    .. math:: P(I) = (R \, I \, C^\top - \mu) / \sigma

    where the matrices R and C hold the interpolation's filter for the rows and for the columns
    inside the crop (bicubic values are clipped to [0, 1]). Unlike those of
    ``torch.nn.functional.interpolate`` on a GPU, their gradient is summed in a fixed order.

    Parameters
    ----------
    model : Model
        Whose preprocessing.
    interpolation : {None, "bilinear", "bicubic"}
        How images of another size are resized; None for the model's own.

    Raises
    ------
    ConfigError
        If the model's preprocessing is more than that, which a test image shows.
    """

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
        """Return what the model takes, for images (image, 3, row, column) in [0, 1]."""
        return self.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """Return images (image, 3, row, column) at the model's size, in the same range."""
        rows, columns = images.shape[-2:]
        if self.squash:
            size = (self.side[0], self.side[1])
        else:
            factor = max(self.side[0] / rows, self.side[1] / columns)
            size = (round(rows * factor), round(columns * factor))
        inside = [
            slice(start := round((n - m) / 2), start + m)
            for n, m in zip(size, self.size, strict=True)
        ]
        if size == (rows, columns):
            return images[..., inside[0], inside[1]]
        left, right = (
            _resizing(n, m, self.interpolation, images.dtype, images.device)[keep]
            for n, m, keep in zip((rows, columns), size, inside, strict=True)
        )
        resized = left @ (images @ right.mT)
        return resized.clamp(0, 1) if self.interpolation == "bicubic" else resized

    def normalise(self, images: Tensor) -> Tensor:
        """Return images of the model's size as the model takes them."""
        return (images - self.get_buffer("mean")) / self.get_buffer("std")

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


class ImageFeatures(nn.Module):
    """Features of images, with a gradient; `brainalign.features.extract` gives the same values.

    Parameters
    ----------
    model : Model
        In eval mode; the module is shared, not copied.
    layers : sequence of (str, str)
        Each layer with its pooling.
    interpolation : {None, "bilinear", "bicubic"}
        See `Preprocess`.

    Raises
    ------
    UnknownNameError
        If there is no such layer.
    ConfigError
        If a layer cannot be pooled so, or the preprocessing not be reproduced.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[tuple[str, Pooling]],
        *,
        interpolation: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)
        for layer, pooling in self.layers:
            if layer not in model.traced:
                raise UnknownNameError(
                    f"{model.name} has no layer {layer!r}.{near(layer, model.traced)}"
                )
            pooled_shape(model.traced[layer], pooling)
        self.preprocess = Preprocess(model, interpolation).to(model.device)
        self.module = model.module

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one array a layer, as `extract` shapes it, for images (image, 3, row, column)."""
        return self.of_inputs(self.preprocess(images))

    def of_inputs(self, inputs: Tensor) -> list[Tensor]:
        """Return the same for what the model takes: images that are preprocessed already."""
        found: dict[tuple[str, Pooling], Tensor] = {}
        names = list(dict.fromkeys(layer for layer, _ in self.layers))

        def receive(name: str, output: Tensor) -> None:
            for layer, pooling in self.layers:
                if layer == name:
                    # A copy: a later layer may work in place.
                    known = self.model.traced[name]
                    found[layer, pooling] = pooled(output, known, pooling).clone()

        with hooked(self.module, names, receive):
            output = tensor_of(self.model.forward(inputs))
        if OUTPUT in names and output is not None and not any(k[0] == OUTPUT for k in found):
            receive(OUTPUT, output)
        return [found[key] for key in self.layers]
