"""What a model computes: models, layers, extraction, baselines, reduction, zero-shot labels."""

from importlib import import_module
from typing import Any

_HOME = {
    "BASELINES": "baselines",
    "Layer": "layers",
    "Model": "models",
    "PCA": "reduce",
    "SparseRandomProjection": "reduce",
    "accuracy": "zeroshot",
    "extract": "extraction",
    "find_weights": "models",
    "list_layers": "models",
    "load_model": "models",
    "model_card": "manifest",
    "profile_attention": "profile",
    "read_manifest": "manifest",
    "write_manifest": "manifest",
    "zero_shot": "zeroshot",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
