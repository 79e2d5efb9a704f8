"""What a piece of cortex stands for, in pictures: images that an encoder predicts it prefers."""

from importlib import import_module
from typing import Any

_HOME = {
    "Guidance": "guidance",
    "ImageEncoder": "objective",
    "Jitter": "jitter",
    "Target": "objective",
    "alphabar": "guidance",
    "ascend": "sampling",
    "ascend_pixels": "sampling",
    "check_pipeline": "guidance",
    "dive": "sampling",
    "dive_section": "sections",
    "guided": "guidance",
    "jittered": "jitter",
    "judge": "judging",
    "label": "judging",
    "label_images": "judging",
    "largest_batch": "sampling",
    "load_pipeline": "sampling",
    "load_source": "objective",
    "predict_target": "sampling",
    "read_encoder": "objective",
    "read_kept": "sampling",
    "sample": "sampling",
    "same_neuroids": "objective",
    "wanted_neuroids": "objective",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
