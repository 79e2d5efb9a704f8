"""Attention mechanisms by name: ``"neighborhood:k=7"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from brainalign_kernels.adapters.sites import Attend
from brainalign_kernels.errors import ShapeError

__all__ = ["Attention", "describe", "parse"]


@dataclass(frozen=True)
class Mechanism:
    """How to build an attention from options.

    Parameters
    ----------
    build : callable
        Takes the options, returns an `Attend`.
    options : mapping
        Names and defaults.
    grid : bool
        Whether it needs to know where on a grid the tokens are.
    cross : bool
        Whether queries and keys may be different tokens.
    """

    build: Callable[..., Attend]
    options: Mapping[str, Any]
    grid: bool = False
    cross: bool = False


@dataclass(frozen=True)
class Attention:
    """An attention with its options, and where it can go.

    ``str`` gives the specification with all options, also those that were left at their defaults.
    """

    spec: str
    run: Attend
    grid: bool = False
    cross: bool = False

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

    Raises
    ------
    ShapeError
        If the name, an option or its value is not known; with what there is.
    """
    if isinstance(attention, Attention):
        return attention
    if not isinstance(attention, str):
        return Attention(getattr(attention, "__name__", repr(attention)), attention, cross=True)
    name, _, rest = attention.strip().partition(":")
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
    written = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return Attention(
        f"{name}:{written}" if written else name,
        mechanism.build(**options),
        mechanism.grid,
        mechanism.cross,
    )


def describe() -> list[str]:
    """Return all specifications, with their options at the defaults."""
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


def _softmax() -> Attend:
    from brainalign_kernels import softmax_attention

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shape: tuple[int, ...] | None,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        return softmax_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)

    return attend


MECHANISMS = {"softmax": Mechanism(_softmax, {}, cross=True)}
