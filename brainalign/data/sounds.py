"""Sound files."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from brainalign.errors import MissingDependencyError, UnavailableError

__all__ = ["read_sound"]


def read_sound(path: str | Path | BinaryIO) -> tuple[NDArray[np.float64], float]:
    """Read a sound file (WAV, FLAC, Ogg, MP3); several channels are averaged.

    Parameters
    ----------
    path : path or binary file
        The file.

    Returns
    -------
    sound : ndarray, shape (n_samples,)
        Full scale is 1.
    rate : float
        Hz.

    Raises
    ------
    MissingDependencyError
        If soundfile is not installed.
    UnavailableError
        If there is no such file, or it holds no sound that can be read.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError(
            "Sound files need the package soundfile.",
            'Install it: pip install "brainalign[auditory]".',
        ) from error
    if isinstance(path, str | Path) and not Path(path).is_file():
        raise UnavailableError(f"There is no sound file {path}.")
    try:
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UnavailableError(f"{path} cannot be read as sound: {error}.") from error
    return samples.mean(axis=1), float(rate)
