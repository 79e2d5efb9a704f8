"""Auditory attention: which talker a listener attends to, from recordings of the brain."""

from importlib import import_module
from typing import Any

_HOME = {
    "accuracy_curve": "evaluation",
    "accuracy_records": "results",
    "chance_band": "evaluation",
    "expected_accuracy": "evaluation",
    "expected_switch_duration": "evaluation",
    "mesd": "evaluation",
    "read_results": "results",
    "switch_latency": "evaluation",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
