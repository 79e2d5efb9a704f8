"""What a piece of cortex stands for, in words."""

from importlib import import_module
from typing import Any

_HOME = {
    "BEAMS": "captioner",
    "CATEGORY_WORDS": "words",
    "DRAWS": "projection",
    "MAX_TOKENS": "captioner",
    "PERSON_WORDS": "words",
    "SMALL_CAPTIONER": "captioner",
    "TEMPERATURE": "projection",
    "Captioner": "captioner",
    "ClipCap": "captioner",
    "VisionLanguageCaptioner": "captioner",
    "beam_search": "captioner",
    "build_library": "projection",
    "caption_best_images": "captions",
    "caption_encoder": "captions",
    "caption_result": "captions",
    "caption_voxels": "captions",
    "captions_section": "sections",
    "cluster_words": "words",
    "draw_of": "projection",
    "embed_2d": "words",
    "embedding_weights": "projection",
    "first_mentioned": "words",
    "load_captioner": "captioner",
    "noun_prompts": "words",
    "nouns": "words",
    "predict_texts": "captions",
    "preferred_category": "words",
    "project": "projection",
    "region_nouns": "captions",
    "region_prompts": "captions",
    "region_word_share": "words",
    "section_from_captions": "sections",
    "top_nouns": "words",
    "voxel_table": "captions",
    "word_share": "words",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
