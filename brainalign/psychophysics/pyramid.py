"""Laplacian pyramids of images, and octaves of noise by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from brainalign.errors import ConfigError, SchemaError

__all__ = ["band_frequencies", "laplacian_pyramid", "n_bands", "octave_noise"]

#: One image in memory of the processor, or any number of them anywhere.
Images: TypeAlias = "np.ndarray | Tensor"

_BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16 * np.sqrt(2)
#: Images up to this side are filtered by products of matrices, which need the fewest calls.
_SMALL = 64
#: Columns of one product of a larger image, whose matrix has few entries outside its diagonal.
_BLOCK = 32


def n_bands(height: int, width: int) -> int:
    """Return the number of levels of a pyramid: halvings until a side is below 5 pixels, and 1."""
    side, levels = min(height, width), 1
    while side >= len(_BINOMIAL):
        side, levels = side // 2, levels + 1
    return levels


def band_frequencies(height: int, width: int) -> np.ndarray:
    """Return the centres of the octave bands, cycles/image, from the lowest to the highest.

    Band f of F is level F - 1 - f of the pyramid, centred at side / 2**(F - f), where the side is
    the shorter one: 1.75, 3.5, ... 112 for 224 pixels.
    """
    total = n_bands(height, width)
    return min(height, width) / 2.0 ** np.arange(total, 0, -1)


def _reducing(size: int, times: int = 1) -> np.ndarray:
    """Return the matrix that blurs a line of pixels and keeps every second one, so many times."""
    if times > 1:
        return _reducing((size + 1) // 2, times - 1) @ _reducing(size)
    matrix = np.zeros(((size + 1) // 2, size))
    for row in range(len(matrix)):
        for tap, weight in enumerate(_BINOMIAL):
            matrix[row, _mirrored(2 * row + tap - 2, size)] += weight
    return matrix


def _expanding(size: int, times: int = 1) -> np.ndarray:
    """Return the matrix that puts zeros between pixels and blurs, up to a line of this size."""
    if times > 1:
        return _expanding(size) @ _expanding((size + 1) // 2, times - 1)
    matrix = np.zeros((size, (size + 1) // 2))
    for row in range(size):
        for tap, weight in enumerate(_BINOMIAL):
            source = _mirrored(row + tap - 2, size)
            if source % 2 == 0:
                matrix[row, source // 2] += weight
    return matrix


def _mirrored(position: int, size: int) -> int:
    """Return the pixel that a position is, reflected about the outermost pixels."""
    position %= 2 * size - 2
    return min(position, 2 * size - 2 - position)


@lru_cache(maxsize=256)
def _matrices(
    make: Callable[..., np.ndarray], height: int, width: int, times: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    return make(height, times).astype(dtype), make(width, times).astype(dtype).T


def _product(
    make: Callable[..., np.ndarray],
    images: Images,
    height: int,
    width: int,
    times: int = 1,
    out: np.ndarray | None = None,
) -> Images:
    """Apply the matrices for two sizes to the axes of images."""
    if isinstance(images, np.ndarray):
        rows, columns = _matrices(make, height, width, times, images.dtype)
        return np.matmul(rows @ images, columns, out=out)
    r, c = (
        torch.as_tensor(m).to(images)
        for m in _matrices(make, height, width, times, np.dtype(np.float64))
    )
    return r @ images @ c


@lru_cache(maxsize=256)
def _blocks(
    make: Callable[..., np.ndarray], size: int, dtype: np.dtype
) -> list[tuple[slice, slice, np.ndarray]]:
    """Return the bands of a matrix, transposed, each with where it reads and where it writes."""
    matrix = (make(size) * _BINOMIAL[0]).astype(dtype)
    n = -(-len(matrix) // _BLOCK)
    edges = [i * len(matrix) // n for i in range(n + 1)]
    blocks = []
    for a, b in pairwise(edges):
        read = np.flatnonzero(matrix[a:b].any(axis=0))
        source = slice(int(read[0]), int(read[-1]) + 1)
        blocks.append((source, slice(a, b), np.ascontiguousarray(matrix[a:b, source].T)))
    return blocks


def _columns(
    make: Callable[..., np.ndarray], image: np.ndarray, size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Apply the matrix for a size to the columns of an image, times the factor of its rows."""
    blocks = _blocks(make, size, image.dtype)
    if out is None:
        out = np.empty((len(image), blocks[-1][1].stop), image.dtype)
    for source, target, matrix in blocks:
        np.matmul(image[:, source], matrix, out=out[:, target])
    return out


def _reduce(images: Images, out: np.ndarray | None = None) -> Images:
    height, width = images.shape[-2:]
    if isinstance(images, Tensor) or height <= _SMALL >= width:
        return _product(_reducing, images, height, width, out=out)
    return _columns(_reducing, _halved(images), width, out)


def _expand(images: Images, height: int, width: int) -> Images:
    if isinstance(images, Tensor) or height <= _SMALL >= width:
        return _product(_expanding, images, height, width)
    larger = np.empty((height, width), images.dtype)
    larger[0::2], larger[1::2] = _doubled(_columns(_expanding, images, width), height)
    return larger


def _finer(images: Images, smaller: Images, out: np.ndarray | None = None) -> Images:
    """Return what images have beyond the smaller ones, expanded; `out` may be the images."""
    height, width = images.shape[-2:]
    if isinstance(images, Tensor) or isinstance(smaller, Tensor):
        return images - _product(_expanding, smaller, height, width)
    if height <= _SMALL >= width:
        return np.subtract(images, _product(_expanding, smaller, height, width), out=out)
    out = np.empty_like(images) if out is None else out
    even, odd = _doubled(_columns(_expanding, smaller, width), height)
    np.subtract(images[0::2], even, out=out[0::2])
    np.subtract(images[1::2], odd, out=out[1::2])
    return out


def _halved(lines: np.ndarray) -> np.ndarray:
    """Return every second line, after adding up neighbours by (1 4 6 4 1)."""
    even, odd = np.array(lines[0::2]), lines[1::2]
    n, m = len(even), len(odd)
    out = np.empty_like(even)
    np.add(odd[:-1], odd[1:], out=out[1:m])
    np.add(odd[0], odd[0], out=out[0])
    if m < n:
        np.add(odd[-1], odd[-1], out=out[-1])
    out *= 4
    out[1:] += even[:-1]
    out[:-1] += even[1:]
    out[0] += even[1]
    out[-1] += even[-1] if m == n else even[-2]
    even *= 6
    out += even
    return out


def _doubled(lines: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the even and the odd lines of `size`, zeros put between and added up likewise."""
    n, m = len(lines), size // 2
    odd = np.empty((m, *lines.shape[1:]), lines.dtype)
    between = np.add(lines[:-1], lines[1:], out=odd[: n - 1])
    if m == n:
        np.add(lines[-1], lines[-1], out=odd[-1])
    even = lines * 4
    even[1:] += between
    even[:-1] += between
    even[0] += between[0]
    even[-1] += odd[-1]
    odd *= 4
    return even, odd


def _over_images(
    function: Callable[[Any, list[Any]], list[Any]],
    images: Tensor,
    shapes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Apply a function to images: each in the cache of a processor, or at once.

    The function takes images and where to put each of its results, or None to make room itself.
    """
    plain = images.device.type == "cpu" and images.dtype in (torch.float32, torch.float64)
    if not plain or not images.numel() or (images.requires_grad and torch.is_grad_enabled()):
        return function(images, [None] * len(shapes))
    lead = images.shape[:-2]
    stack = images.detach().reshape(-1, *images.shape[-2:]).numpy()
    made = [np.empty((len(stack), *shape), stack.dtype) for shape in shapes]
    for i, image in enumerate(stack):
        function(image, [whole[i] for whole in made])
    return [torch.from_numpy(whole).view(*lead, *whole.shape[1:]) for whole in made]


def laplacian_pyramid(images: Tensor, levels: int | None = None) -> list[Tensor]:
    r"""Return the Laplacian pyramid of images, from the finest level to the residual.

    .. math:: G_0 = x, \quad G_{k+1} = D G_k, \quad L_k = G_k - U G_{k+1}, \quad L_K = G_K

    D blurs with the binomial filter (1 4 6 4 1)/16 :math:`\sqrt 2` along each axis, reflecting
    about the edge, and keeps every second pixel; U puts zeros between pixels and blurs likewise.

    Parameters
    ----------
    images : Tensor, shape (..., height, width)
        Floating point, on any device.
    levels : int, optional
        How many; by default `n_bands`.

    Returns
    -------
    list of Tensor, shapes (..., ceil(height / 2**k), ceil(width / 2**k))

    Raises
    ------
    SchemaError
        If the images are no floating-point tensor of two dimensions or more.
    ConfigError
        If there are more levels than the images allow.

    References
    ----------
    Burt & Adelson 1983, IEEE Trans Commun 31:532-540.
    """
    if images.ndim < 2 or not images.is_floating_point():
        raise SchemaError(
            f"A pyramid needs floating-point images (..., height, width); got {images.dtype} of "
            f"shape {tuple(images.shape)}."
        )
    most = n_bands(*images.shape[-2:])
    levels = most if levels is None else levels
    if not 1 <= levels <= most:
        raise ConfigError(
            f"Images of {images.shape[-2]} x {images.shape[-1]} pixels have 1 to {most} levels; "
            f"{levels} were asked for."
        )

    if levels == 1:
        return [images.clone()]
    height, width = images.shape[-2:]
    shapes = [(-(-height // 2**k), -(-width // 2**k)) for k in range(levels)]

    def split(at: Images, out: list[np.ndarray | None]) -> list[Images]:
        pyramid = []
        for place, following in pairwise(out):
            smaller = _reduce(at, following)
            pyramid.append(_finer(at, smaller, place))
            at = smaller
        return [*pyramid, at]

    return _over_images(split, images, shapes)


def octave_noise(white: Tensor, band: int) -> Tensor:
    r"""Filter white noise to an octave and give it the power that it has in the highest band.

    .. math:: n = b_f \, \frac{\mathrm{rms}(b_{F-1})}{\mathrm{rms}(b_f)}

    with :math:`b_f` the level F - 1 - f of the Laplacian pyramid alone, expanded to the image's
    size.

    Parameters
    ----------
    white : Tensor, shape (..., height, width)
        Noise.
    band : int
        f, from 0, the lowest; see `band_frequencies`.

    Returns
    -------
    Tensor
        Of the same shape.

    Raises
    ------
    ConfigError
        If there is no such band.

    References
    ----------
    Subramanian et al. 2023, NeurIPS (arXiv:2309.13190).
    """
    total = n_bands(*white.shape[-2:])
    if not 0 <= band < total:
        raise ConfigError(
            f"Images of {white.shape[-2]} x {white.shape[-1]} pixels have bands 0 to {total - 1}; "
            f"got {band}."
        )
    level = total - 1 - band

    height, width = white.shape[-2:]

    def filtered(at: Images, out: list[np.ndarray | None]) -> list[Images]:
        smaller = _reduce(at)
        highest = _finer(at, smaller, None if level else out[0])
        if not level:
            return [highest]
        at = smaller
        if level > 1:
            rows, columns = at.shape[-2:]
            at = _product(_reducing, at, rows, columns, level - 1)
        if level < total - 1:
            at = _finer(at, _reduce(at))
        if level > 1:
            at = _product(_expanding, at, height, width, level)
        else:
            at = _expand(at, height, width)
        # Without noise there is nothing to scale.
        gain = _rms(highest) / _rms(at).clip(min=torch.finfo(white.dtype).tiny)
        return [np.multiply(at, gain, out=out[0]) if isinstance(at, np.ndarray) else at * gain]

    return _over_images(filtered, white, [(height, width)])[0]


def _rms(images: Images) -> Any:
    if isinstance(images, np.ndarray):
        return np.sqrt(np.square(images).mean())
    return images.square().mean((-2, -1), keepdim=True).sqrt()
