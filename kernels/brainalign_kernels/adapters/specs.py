"""Attention mechanisms by name: ``"neighborhood:k=7"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from brainalign_kernels.adapters import mechanisms
from brainalign_kernels.adapters.sites import Attend
from brainalign_kernels.errors import ShapeError

__all__ = ["Attention", "describe", "options_of", "parse"]


@dataclass(frozen=True)
class Mechanism:
    """How to build an attention from options.

    Parameters
    ----------
    build : callable
        Takes the options' values in their order, returns an `Attend`.
    options : mapping
        Names and defaults.
    grid : bool
        Whether it is for image tokens: it needs their places, or cannot be causal.
    cross : bool
        Whether queries and keys may be different tokens.
    line : bool
        Whether the grid may be one axis, as text is.
    """

    build: Callable[..., Attend]
    options: Mapping[str, Any]
    grid: bool = False
    cross: bool = False
    line: bool = True


@dataclass(frozen=True)
class Attention:
    """An attention with its options, and where it can go.

    ``str`` gives the specification with all options, also those that were left at their defaults.

    Parameters
    ----------
    spec : str
        The specification, or the name of a callable.
    run : Attend
        Computes it.
    grid, cross, line : bool
        Whether it is for image tokens, whether queries and keys may be different tokens, and
        whether the grid may be one axis.
    """

    spec: str
    run: Attend
    grid: bool = False
    cross: bool = False
    line: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """See `Attend`."""
        return self.run(q, k, v, **options)

    def __str__(self) -> str:
        return self.spec


def parse(attention: str | Attend) -> Attention:
    """Return the attention that a specification names.

    Parameters
    ----------
    attention : str or callable
        ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``; the names are those of `describe`. A
        callable is taken as it is.

    Returns
    -------
    Attention

    Raises
    ------
    ShapeError
        If the name, an option or its value is not known; with what there is.
    """
    if isinstance(attention, Attention):
        return attention
    if not isinstance(attention, str):
        return Attention(getattr(attention, "__name__", repr(attention)), attention, cross=True)
    name, options = options_of(attention)
    mechanism = MECHANISMS[name]
    written = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return Attention(
        f"{name}:{written}" if written else name,
        mechanism.build(*options.values()),
        mechanism.grid,
        mechanism.cross,
        mechanism.line,
    )


def options_of(attention: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a specification's mechanism, and the values of all its options.

    Raises
    ------
    ShapeError
        If the name, an option or its value is not known; with what there is.
    """
    name, _, rest = (part.strip() for part in attention.partition(":"))
    if name not in MECHANISMS:
        raise ShapeError(f"There is no attention {name!r}. Known: {'; '.join(describe())}.")
    mechanism = MECHANISMS[name]
    options = dict(mechanism.options)
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, text = (p.strip() for p in part.partition("="))
        if key not in options or not equals:
            known = ", ".join(f"{k}={v}" for k, v in mechanism.options.items()) or "none"
            raise ShapeError(f"{name!r} has no option {part!r}. Known, with defaults: {known}.")
        options[key] = _read(text, mechanism.options[key], f"{name}:{key}")
    return name, options


def describe() -> list[str]:
    """Return all specifications, with their options at the defaults.

    Returns
    -------
    list of str
        Such as ``"neighborhood:k=7,d=1,stride=1"``.
    """
    return [
        name + (":" + ",".join(f"{k}={v}" for k, v in m.options.items()) if m.options else "")
        for name, m in sorted(MECHANISMS.items())
    ]


def _read(text: str, default: Any, where: str) -> Any:
    kind = type(default)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise ShapeError(f"{where} is {text!r}; expected {kind.__name__}, such as {default}.")


MECHANISMS = {
    "agent": Mechanism(mechanisms.agent, {"m": 49, "k_scale2": 1.0, "k_shortcut": 0.0}, grid=True),
    "clear": Mechanism(mechanisms.clear, {"r": 8.0}, grid=True, line=False),
    "flow": Mechanism(mechanisms.flow, {}, cross=True),
    "halo": Mechanism(mechanisms.halo, {"block": 7, "halo": 3}, grid=True, line=False),
    "hip": Mechanism(
        mechanisms.hip, {"k": 128, "block_q": 32, "block_k": 2, "window": 0, "sinks": 0}
    ),
    "lightnet": Mechanism(mechanisms.lightnet, {}),
    "lightning": Mechanism(mechanisms.lightning, {"scale": 1.0}),
    "linear": Mechanism(mechanisms.linear, {"eps": 1e-6}, cross=True),
    "neighborhood": Mechanism(mechanisms.neighborhood, {"k": 7, "d": 1, "stride": 1}, grid=True),
    "reversed": Mechanism(mechanisms.reversed_softmax, {}, grid=True),
    "sink": Mechanism(mechanisms.sink, {"c": 0.0}, cross=True),
    "softmax": Mechanism(mechanisms.softmax, {}, cross=True),
}
