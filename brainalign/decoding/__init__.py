"""What a recording tells of the stimulus: pattern classification."""

from brainalign.decoding.classification import (
    Decoding,
    block_patterns,
    classify,
    decode,
    section,
    section_from_folder,
)

__all__ = [
    "Decoding",
    "block_patterns",
    "classify",
    "decode",
    "section",
    "section_from_folder",
]
