"""Auditory attention: which talker a listener attends to, from recordings of the brain."""

from importlib import import_module
from typing import Any

_HOME = {
    "AttentionDecoder": "decoders",
    "CanonicalCorrelation": "decoders",
    "CausalFilter": "preprocessing",
    "ForwardResponse": "decoders",
    "ListeningTrial": "trials",
    "Oracle": "decoders",
    "ResponsiveChannels": "preprocessing",
    "SimulatedListener": "listener",
    "StimulusReconstruction": "decoders",
    "StreamingDecoder": "streaming",
    "TalkerCluster": "decoders",
    "accuracy_curve": "evaluation",
    "accuracy_records": "results",
    "broadband_envelope": "sound",
    "calibrate": "decoders",
    "chance_band": "evaluation",
    "content_groups": "trials",
    "cross_validate": "decoders",
    "expected_accuracy": "evaluation",
    "expected_switch_duration": "evaluation",
    "gammatone_envelope": "sound",
    "listening_trials": "trials",
    "mel_spectrogram": "sound",
    "mesd": "evaluation",
    "onsets": "sound",
    "preprocess": "preprocessing",
    "read_results": "results",
    "switch_curve": "evaluation",
    "switch_latency": "evaluation",
    "switching": "listener",
    "talker_features": "sound",
    "talker_streams": "listener",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
