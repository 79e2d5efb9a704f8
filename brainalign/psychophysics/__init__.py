"""What an observer, human or network, makes of images: critical band masking and trial files."""

from importlib import import_module
from typing import Any

_HOME = {
    "FREQUENCIES": "analysis",
    "NOISE_SDS": "analysis",
    "Channel": "analysis",
    "ChannelFit": "analysis",
    "AreaFit": "areas",
    "Classifier": "observers",
    "LinearReadout": "observers",
    "SimulatedObserver": "observers",
    "ZeroShotClassifier": "observers",
    "accuracy": "trials",
    "band_frequencies": "pyramid",
    "bootstrap_channel": "analysis",
    "channels_section": "sections",
    "compare_channels": "analysis",
    "consistency_with_people": "trials",
    "error_consistency": "trials",
    "fit_area": "areas",
    "fit_channel": "analysis",
    "fit_index_channel": "analysis",
    "fit_thresholds": "analysis",
    "laplacian_pyramid": "pyramid",
    "mask": "stimuli",
    "masking_design": "stimuli",
    "move_areas": "areas",
    "observe": "observers",
    "octave_noise": "pyramid",
    "pairwise_consistency": "trials",
    "probability_correct": "analysis",
    "recovery_error": "analysis",
    "shape_bias": "trials",
    "threshold_indices": "analysis",
    "write_experiment": "experiment",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
