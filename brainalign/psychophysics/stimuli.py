"""Pictures of low contrast in octave noise: what critical band masking shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from brainalign.errors import ConfigError, SchemaError
from brainalign.psychophysics.analysis import NOISE_SDS
from brainalign.psychophysics.pyramid import band_frequencies, octave_noise

__all__ = [
    "CONTRAST",
    "MARGIN",
    "MEAN",
    "divide_images",
    "draw_noise",
    "keep_in_range",
    "low_contrast",
    "mask",
    "masking_design",
]

#: Contrast and mean of the pictures; a pixel out of 0..1 is put this far inside.
CONTRAST, MEAN, MARGIN = 0.2, 0.449, 0.1


def low_contrast(images: Tensor, contrast: float = CONTRAST, mean: float = MEAN) -> Tensor:
    r"""Return grey images with their contrast lowered around one mean.

    .. math:: I = (x - \bar x)\, c + m

    Parameters
    ----------
    images : Tensor, shape (..., height, width)
        x, intensities in 0..1; each has its own mean taken off.
    contrast, mean : float
        c and m.
    """
    return (images - images.mean((-2, -1), keepdim=True)) * contrast + mean


def draw_noise(
    seeds: Sequence[int], height: int, width: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, list[torch.Generator]]:
    """Return white noise of variance 1, each image from a seed of its own.

    A seed gives the same noise in any batch; another kind of device gives other noise.

    Returns
    -------
    noise : Tensor, shape (n, height, width)
    generators : list of torch.Generator
        For what must be drawn later.
    """
    made = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    noise = torch.empty(len(made), height, width, device=device)
    for one, generator in zip(noise, made, strict=True):
        one.normal_(generator=generator)
    return noise, made


def keep_in_range(
    images: Tensor, noise: Tensor, noise_sd: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Add noise to images and mend the pixels that leave 0..1.

    Where the sum is below 0 the image's pixel becomes 0.1 - noise, where it is above 1 it becomes
    0.9 - noise. Where that is no intensity itself (noise beyond 0.9), the image's pixel stays and
    its noise is drawn again from N(0, SD), unfiltered, until the sum is in range.

    Parameters
    ----------
    images, noise : Tensor, shape (n, height, width)
        Intensities in 0..1, and what is added.
    noise_sd : Tensor, shape (n,)
        SD.
    generators : sequence of torch.Generator
        One an image, for what is drawn again.

    Returns
    -------
    Tensor, shape (n, height, width)
        In 0..1.

    Raises
    ------
    SchemaError
        If an image leaves 0..1 without noise.
    """
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise SchemaError("Images leave 0..1 before noise is added.", "Lower their contrast.")
    total = images + noise
    below, above = total < 0, total > 1
    moved = torch.where(below, MARGIN - noise, 1 - MARGIN - noise)
    again = (below & (moved > 1)) | (above & (moved < 0))
    total = torch.where(below, torch.full_like(total, MARGIN), total)
    total = torch.where(above, torch.full_like(total, 1 - MARGIN), total)
    for i in torch.nonzero(again.flatten(1).any(1)).flatten().tolist():
        pixels = images[i][again[i]]
        sums = pixels.clone().fill_(-1)
        while bool((bad := (sums < 0) | (sums > 1)).any()):
            drawn = torch.randn(
                int(bad.sum()), generator=generators[i], device=images.device, dtype=images.dtype
            )
            sums[bad] = pixels[bad] + drawn * noise_sd[i]
        total[i][again[i]] = sums
    return total


def mask(
    images: Tensor,
    noise_sd: Sequence[float] | np.ndarray,
    band: Sequence[int] | np.ndarray,
    seeds: Sequence[int] | np.ndarray,
    *,
    contrast: float = CONTRAST,
    mean: float = MEAN,
) -> Tensor:
    """Return images of low contrast in octave noise, each in a condition of its own.

    Parameters
    ----------
    images : Tensor, shape (n, height, width)
        Grey, intensities in 0..1, on any device.
    noise_sd : sequence of float, length n
        Standard deviation of the white noise that is filtered; 0 for none.
    band : sequence of int, length n
        See `octave_noise`; without noise it counts for nothing.
    seeds : sequence of int, length n
        Of each image's noise.
    contrast, mean : float
        See `low_contrast`.

    Returns
    -------
    Tensor, shape (n, height, width)
        In 0..1.

    Raises
    ------
    SchemaError
        If shapes or values do not fit.
    ConfigError
        If there is no such band.
    """
    if images.ndim != 3 or not images.is_floating_point():
        raise SchemaError(
            f"Grey floating-point images (n, height, width) are needed; got {images.dtype} of "
            f"shape {tuple(images.shape)}."
        )
    if not len(images) == len(noise_sd) == len(band) == len(seeds):
        raise SchemaError(
            f"{len(images)} images came with {len(noise_sd)} noise_sd, {len(band)} bands and "
            f"{len(seeds)} seeds."
        )
    sds = np.asarray(noise_sd, dtype=np.float64)
    if not (sds >= 0).all():
        raise SchemaError(f"noise_sd must be at least 0; the least is {sds.min():g}.")
    shown = low_contrast(images, contrast, mean)
    noisy = np.flatnonzero(sds > 0)
    if not noisy.size:
        return keep_in_range(shown, torch.zeros_like(shown), torch.zeros(len(shown)), ())
    bands = np.asarray(band)[noisy]
    noise, generators = draw_noise(
        np.asarray(seeds)[noisy].tolist(), *images.shape[-2:], device=images.device
    )
    sd = torch.as_tensor(sds[noisy], dtype=images.dtype, device=images.device)
    noise = noise.to(images.dtype) * sd[:, None, None]
    for f in np.unique(bands).tolist():
        rows = torch.as_tensor(np.flatnonzero(bands == f), device=images.device)
        noise[rows] = octave_noise(noise[rows], f)
    places = torch.as_tensor(noisy, device=images.device)
    shown[places] = keep_in_range(shown[places], noise, sd, generators)
    return shown


def divide_images(
    category: Sequence[str], n_tested: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Divide images into those that are tested, as many of each category as can be, and the others.

    Parameters
    ----------
    category : sequence of str
        What each image shows.
    n_tested : int
        How many are tested.
    seed : int
        Of the choice.

    Returns
    -------
    tested, others : ndarray of int
        Rows, rising.

    Raises
    ------
    ConfigError
        If there are not so many.
    """
    names = np.array(category, dtype=str)
    if not 0 <= n_tested <= len(names):
        raise ConfigError(f"{n_tested} images were asked for; there are {len(names)}.")
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    rank = np.empty(len(names), dtype=int)
    for name in np.unique(names):
        own = order[names[order] == name]
        rank[own] = np.arange(len(own))
    order = order[np.argsort(rank[order], kind="stable")]
    return np.sort(order[:n_tested]), np.sort(order[n_tested:])


def masking_design(
    stimulus_id: Sequence[str],
    category: Sequence[str],
    *,
    size: tuple[int, int] = (224, 224),
    noise_sds: Sequence[float] = NOISE_SDS,
    bands: Sequence[int] | None = None,
    crossed: bool = True,
    seed: int = 0,
) -> xr.Dataset:
    """Return which image is shown in which noise: a trial a row, without responses.

    Parameters
    ----------
    stimulus_id, category : sequence of str
        The images and what they show.
    size : tuple of int
        Height and width in pixels, which give the bands their frequencies.
    noise_sds : sequence of float
        Levels of noise.
    bands : sequence of int, optional
        Default all; see `band_frequencies`.
    crossed : bool
        Every image in every condition (a network forgets). Otherwise every image once, in random
        order, with conditions as equally often as can be within each category (people do not).
    seed : int
        Of the order and of the noise.

    Returns
    -------
    xarray.Dataset
        ``category``, ``noise_sd``, ``band``, ``frequency`` (cycles/image) and ``seed`` (trial),
        with the coordinates ``stimulus_id`` and ``condition``.

    Raises
    ------
    SchemaError
        If there are no images or not one category an image.
    ConfigError
        If a band does not exist.
    """
    ids, categories = np.array(stimulus_id, dtype=str), np.array(category, dtype=str)
    if not len(ids) or ids.shape != categories.shape:
        raise SchemaError(f"{len(ids)} stimuli came with {len(categories)} categories.")
    frequencies = band_frequencies(*size)
    chosen = np.arange(len(frequencies)) if bands is None else np.asarray(bands)
    if not np.isin(chosen, np.arange(len(frequencies))).all():
        raise ConfigError(
            f"Images of {size[0]} x {size[1]} pixels have bands 0 to {len(frequencies) - 1}; got "
            f"{chosen.tolist()}."
        )
    cells = np.array([(sd, f) for sd in noise_sds for f in chosen])
    rng = np.random.default_rng(seed)
    if crossed:
        image = np.repeat(np.arange(len(ids)), len(cells))
        cell = np.tile(np.arange(len(cells)), len(ids))
    else:
        image = rng.permutation(len(ids))
        # Within a category, conditions come in whole rounds, each in a random order; categories
        # go on where the last one ended, so that rounds are whole over all images too.
        image = image[np.argsort(categories[image], kind="stable")]
        rounds = -(-len(ids) // len(cells))
        cell = np.concatenate([rng.permutation(len(cells)) for _ in range(rounds)])[: len(ids)]
        order = rng.permutation(len(ids))
        image, cell = image[order], cell[order]
    sd, band = cells[cell, 0], cells[cell, 1].astype(int)
    frequency = frequencies[band]
    names = [f"sd {s:g}, {f:g} cycles/image" for s, f in zip(sd, frequency, strict=True)]
    return xr.Dataset(
        {
            "category": ("trial", categories[image]),
            "noise_sd": ("trial", sd),
            "band": ("trial", band),
            "frequency": ("trial", frequency, {"units": "cycles/image"}),
            "seed": ("trial", rng.integers(2**62, size=len(sd))),
        },
        coords={"stimulus_id": ("trial", ids[image]), "condition": ("trial", np.array(names))},
    )
