"""The attention mechanism that a model was trained with: recorded in its folder, put in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainalign.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from brainalign_kernels import Swap

__all__ = ["ATTENTION_KEY", "full_attention", "place_attention", "recorded_attention"]

#: Where ``open_clip_config.json`` says what attention the weights were trained with.
ATTENTION_KEY = "attention"


def full_attention(attention: str) -> str:
    """Return a specification with all its options, such as ``neighborhood:d=1,k=3,stride=1``.

    Raises
    ------
    ConfigError
        If it is unknown; with what there is.
    """
    from brainalign_kernels import ShapeError
    from brainalign_kernels.adapters import parse

    try:
        return str(parse(attention))
    except ShapeError as error:
        raise ConfigError(f"attention={attention!r}: {error}") from error


def recorded_attention(folder: str | Path) -> str:
    """Return the attention that a folder of open_clip records; softmax where it says nothing."""
    text = (Path(folder) / "open_clip_config.json").read_text(encoding="utf-8")
    return full_attention(json.loads(text).get(ATTENTION_KEY, "softmax"))


def place_attention(module: nn.Module, attention: str) -> Swap | None:
    """Put a mechanism into the image tower of an open_clip model, to train it or to run it.

    Parameters
    ----------
    module : torch.nn.Module
        Has its image tower as ``visual``.
    attention : str
        A specification; softmax leaves the module as it is.

    Returns
    -------
    Swap or None
        What takes it out again; None for softmax.

    Raises
    ------
    ConfigError
        If it is unknown, or an attention layer of the tower cannot have it.
    """
    from brainalign_kernels import ShapeError, UnsupportedError
    from brainalign_kernels.adapters import swap_attention

    if full_attention(attention) == "softmax":
        return None
    tower: Any = getattr(module, "visual", None)
    if tower is None:
        raise ConfigError(f"{type(module).__name__} has no image tower to put {attention!r} into.")
    try:
        swap = swap_attention(tower, attention)
        if swap.skipped:
            swap.restore()
            raise UnsupportedError("; ".join(f"{k}: {v}" for k, v in swap.skipped.items()))
    except (ShapeError, UnsupportedError) as error:
        raise ConfigError(f"attention={attention!r} in {type(tower).__name__}: {error}") from error
    return swap
