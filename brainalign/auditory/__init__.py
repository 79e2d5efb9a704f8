"""Auditory attention: which talker a listener attends to, from recordings of the brain."""

from importlib import import_module
from typing import Any

_HOME = {
    "ResponsiveChannels": "preprocessing",
    "accuracy_curve": "evaluation",
    "accuracy_records": "results",
    "broadband_envelope": "sound",
    "chance_band": "evaluation",
    "expected_accuracy": "evaluation",
    "expected_switch_duration": "evaluation",
    "gammatone_envelope": "sound",
    "mel_spectrogram": "sound",
    "mesd": "evaluation",
    "onsets": "sound",
    "preprocess": "preprocessing",
    "read_results": "results",
    "switch_latency": "evaluation",
    "talker_features": "sound",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
