r"""Models without learning, which every report compares with: pixels and V1 energy.

The V1 model is a bank of Gabor filters in quadrature, :math:`g_{\phi}(x, y) = e^{-(x^2 + y^2) /
2\sigma^2} \cos(2\pi u / \lambda + \phi)` with :math:`u = y\cos\theta + x\sin\theta`, cut where the
envelope is below 1 %, with :math:`\sigma = 3\lambda\sqrt{\ln 2 / 2} / \pi` (a bandwidth of one
octave), scaled so that a matched grating of full contrast (-1/2 to 1/2) gives 1. For an image
:math:`I` its amplitude and normalised amplitude are

.. math:: E_\theta = \sqrt{(I * g_0)^2 + (I * g_{-\pi/2})^2}, \qquad
          f_\theta = E_\theta / (s + \tfrac{1}{n} \sum_{\theta'} E_{\theta'}).

Sources: Adelson & Bergen 1985 (energy), Heeger 1992 (normalisation), Kay, Naselaris, Prenger &
Gallant 2008 (Gabor pyramid as an encoding model), Kay & Yeatman 2017 (front end ``v1:kay2017``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainalign.errors import ConfigError, near

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BASELINES", "Kay2017", "Pixels", "V1Energy", "gabor_amplitude", "gabor_bank"]

ENVELOPE_CUT = 0.01


def gabor_bank(
    wavelength: float, n_orientations: int = 8, size: int | None = None, *, balanced: bool = False
) -> Tensor:
    """Return quadrature Gabor kernels of one octave, shape (2, orientation, size, size).

    Parameters
    ----------
    wavelength : float
        Of the carrier, in pixels.
    n_orientations : int
        Evenly spaced over 180 degrees, from 0 (horizontal) counter-clockwise.
    size : int, optional
        Side in pixels; by default the smallest odd number that holds the cut envelope.
    balanced : bool
        Take the envelope's share of their mean off the cosine kernels, so that a uniform image
        gives nothing; the published bank keeps it.

    Returns
    -------
    tensor, float32
        Cosine then sine phase.
    """
    sigma = 3 * wavelength * math.sqrt(math.log(2) / 2) / math.pi
    if size is None:
        size = 2 * math.ceil(sigma * math.sqrt(-2 * math.log(ENVELOPE_CUT))) + 1
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
    envelope[envelope < ENVELOPE_CUT] = 0
    theta = torch.arange(n_orientations, dtype=torch.float64).view(-1, 1, 1) * (
        math.pi / n_orientations
    )
    phase = torch.tensor([0, -math.pi / 2], dtype=torch.float64).view(-1, 1, 1, 1)
    u = x * torch.sin(theta) + y * torch.cos(theta)
    carrier = torch.cos(2 * math.pi * u / wavelength + phase)
    gabor = envelope * carrier
    if balanced:
        gabor = gabor - envelope * gabor.sum((-1, -2), keepdim=True) / envelope.sum()
    return (gabor / (0.5 * (gabor * carrier).sum((-1, -2), keepdim=True))).float()


def gabor_amplitude(image: Tensor, bank: Tensor, stride: int = 1) -> Tensor:
    """Return the quadrature amplitude, shape (image, orientation, row, column).

    Parameters
    ----------
    image : tensor, shape (image, 1, row, column)
        Contrast, padded by the caller.
    bank : tensor, shape (2, orientation, size, size)
        Of `gabor_bank`.
    stride : int
        Pixels between positions.
    """
    n = bank.shape[1]
    response = functional.conv2d(image, bank.flatten(0, 1).unsqueeze(1), stride=stride)
    return torch.hypot(response[:, :n], response[:, n:])


class Tap(nn.Identity):
    """Passes its input on, and so makes it a layer."""


class V1Energy(nn.Module):
    """A pyramid of Gabor amplitudes, averaged over a grid.

    Each spatial frequency sees the image at 6 pixels a cycle, so one bank serves all. The layers
    are ``amplitude`` and ``normalised``: (frequency, orientation, row, column) as one vector.

    Parameters
    ----------
    frequencies : sequence of float
        Cycles per image.
    n_orientations : int
        Evenly spaced over 180 degrees.
    grid : int
        Cells a side; at most two a cycle, so coarse frequencies have fewer.
    constant : float
        The s of the normalisation, in units of the response to a full-contrast grating.
    """

    PIXELS_PER_CYCLE = 6

    def __init__(
        self,
        frequencies: Sequence[float] = (2, 4, 8, 16, 32),
        n_orientations: int = 8,
        grid: int = 8,
        constant: float = 0.1,
    ) -> None:
        super().__init__()
        self.frequencies = tuple(frequencies)
        self.grid = grid
        self.constant = constant
        self.bank: Tensor
        self.register_buffer(
            "bank", gabor_bank(self.PIXELS_PER_CYCLE, n_orientations, balanced=True)
        )
        self.amplitude = Tap()
        self.normalised = Tap()

    def forward(self, image: Tensor) -> Tensor:
        """Return the normalised amplitudes of luminance images, shape (image, feature)."""
        margin = self.bank.shape[-1] // 2
        plain, normalised = [], []
        for frequency in self.frequencies:
            side = round(self.PIXELS_PER_CYCLE * frequency)
            x = functional.interpolate(
                image - 0.5, (side, side), mode="bilinear", antialias=True, align_corners=False
            )
            x = functional.pad(x, (margin,) * 4, mode="replicate")
            amplitude = gabor_amplitude(x, self.bank)
            cells = max(1, min(self.grid, int(2 * frequency)))
            ratio = amplitude / (self.constant + amplitude.mean(1, keepdim=True))
            plain.append(functional.adaptive_avg_pool2d(amplitude, cells).flatten(1))
            normalised.append(functional.adaptive_avg_pool2d(ratio, cells).flatten(1))
        self.amplitude(torch.cat(plain, 1))
        return self.normalised(torch.cat(normalised, 1))


class Kay2017(nn.Module):
    """The V1 front end of Kay & Yeatman 2017: one frequency, a 32 x 32 grid, 8 orientations.

    Filters of 4 cycles per degree at 60 pixels per degree (15 pixels a cycle on 250 x 250 pixels),
    every 8 pixels, normalised over orientations with s = 0.5. The layer ``normalised`` holds (row,
    column, orientation) as one vector of 8192.
    """

    SIDE, WAVELENGTH, SIZE, STRIDE, CONSTANT = 250, 15, 52, 8, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.bank: Tensor
        self.register_buffer("bank", gabor_bank(self.WAVELENGTH, 8, self.SIZE))
        self.normalised = Tap()

    def forward(self, image: Tensor) -> Tensor:
        """Return the normalised amplitudes of linear luminance images, shape (image, 8192)."""
        side = (self.SIDE, self.SIDE)
        x = functional.interpolate(image - 0.5, side, mode="bicubic", antialias=True)
        amplitude = gabor_amplitude(functional.pad(x, (25,) * 4), self.bank, self.STRIDE)
        ratio = amplitude / (self.CONSTANT + amplitude.mean(1, keepdim=True))
        return self.normalised(ratio.movedim(1, -1).flatten(1))


class Pixels(nn.Module):
    """The image itself, averaged down to `side` pixels: layers ``luminance`` and ``rgb``."""

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        self.side = side
        self.luminance = Tap()
        self.rgb = Tap()

    def forward(self, image: Tensor) -> Tensor:
        """Return the pixels as vectors, shape (image, 3 * side ** 2)."""
        x = functional.adaptive_avg_pool2d(image, self.side)
        weights = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        self.luminance((x * weights).sum(1).flatten(1))
        return self.rgb(x.flatten(1))


def _square(image: Image) -> Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _luminance(image: Image, gamma: float, side: int | None) -> Tensor:
    grey = np.asarray(_square(image).convert("L"), np.float32) / 255
    x = torch.from_numpy(grey**gamma)[None]
    if side is None:
        return x
    return functional.interpolate(x[None], (side, side), mode="bilinear", antialias=True)[0]


def _rgb(image: Image, side: int) -> Tensor:
    pixels = np.asarray(_square(image).convert("RGB").resize((side, side)), np.float32) / 255
    return torch.from_numpy(pixels).movedim(-1, 0)


Built = tuple[nn.Module, Callable[["Image"], Tensor], dict[str, Any]]
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], int, float]] = {
    "pixels": (Pixels, 128, 1.0),
    "v1": (V1Energy, 192, 1.0),
    "v1:kay2017": (Kay2017, 500, 2.0),
}
BASELINES = tuple(_BUILDERS)


def build(name: str, options: Mapping[str, Any], image_size: int | None) -> Built:
    """Return a baseline's module, its transform and what the transform does.

    Options are those of its class and, for the V1 models, ``gamma``: luminance is the pixel value
    to that power (1 for ``v1``: the value as it is; 2 for ``v1:kay2017``, whose stimuli are square
    roots of luminance).
    """
    make, side, gamma = _BUILDERS[name]
    side = side if image_size is None else image_size
    options = dict(options)
    preprocessing: dict[str, Any] = {
        "image_size": [side, side],
        "resize": "centre square",
        "interpolation": "bicubic" if name == "pixels" else "bilinear",
        "mean": [0.0],
        "std": [1.0],
    }
    transform: Callable[[Image], Tensor]
    if name == "pixels":

        def transform(image: Image) -> Tensor:
            return _rgb(image, side)

    else:
        gamma = float(options.pop("gamma", gamma))
        preprocessing["gamma"] = gamma

        def transform(image: Image) -> Tensor:
            return _luminance(image, gamma, side)

    try:
        return make(**options), transform, preprocessing
    except TypeError as error:
        import inspect

        known = [*inspect.signature(make).parameters, "gamma"]
        bad = [o for o in options if o not in known]
        hint = near(bad[0], known) if bad else ""
        raise ConfigError(f"{name}: {error}.{hint}", f"Options: {', '.join(known)}.") from error
