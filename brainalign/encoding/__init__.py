"""Encoding models: brain responses predicted from features."""

from brainalign.encoding.align import Aligned, align, make_splits
from brainalign.encoding.clusters import spherical_kmeans
from brainalign.encoding.compare import (
    compare_models,
    compare_subjects,
    layer_roi,
    partition_roi,
)
from brainalign.encoding.encode import encode
from brainalign.encoding.gather import gather, gather_folders
from brainalign.encoding.model import feature_weights, fit_encoder, predict, sources_of
from brainalign.encoding.partition import partition_variance
from brainalign.encoding.probe import AdamWProbe, fit_probe
from brainalign.encoding.result import EncodingResult, deviations, read_result, write_result
from brainalign.encoding.rois import roi_members
from brainalign.encoding.selection import (
    check_double_dipping,
    record_choice,
    select,
    selections,
)
from brainalign.encoding.spaces import joint_features

__all__ = [
    "AdamWProbe",
    "Aligned",
    "EncodingResult",
    "align",
    "check_double_dipping",
    "compare_models",
    "compare_subjects",
    "deviations",
    "encode",
    "feature_weights",
    "fit_encoder",
    "fit_probe",
    "gather",
    "gather_folders",
    "joint_features",
    "layer_roi",
    "make_splits",
    "partition_roi",
    "partition_variance",
    "predict",
    "read_result",
    "record_choice",
    "roi_members",
    "select",
    "selections",
    "sources_of",
    "spherical_kmeans",
    "write_result",
]
