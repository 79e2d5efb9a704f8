"""How good a prediction is, how good it could be, and how sure that is. Nothing here refits."""

from brainalign.evaluation.ceilings import (
    leave_one_subject_out,
    ncsnr,
    noise_ceiling,
    normalised_score,
    simulated_ceiling,
    split_half,
)
from brainalign.evaluation.cka import gram, linear_cka, resampled_cka
from brainalign.evaluation.group import (
    GroupEstimate,
    SignFlipTest,
    compare_over_subjects,
    compare_samples,
    group_map,
    sign_flip_test,
    two_factor_test,
    two_factor_variance,
)
from brainalign.evaluation.layer_roi import layer_roi_cka, layer_roi_rsa
from brainalign.evaluation.partition import (
    product_measure,
    subsets,
    unique_variance,
    variance_partition,
)
from brainalign.evaluation.scores import pearson_r, r2, undefined
from brainalign.evaluation.significance import (
    PermutationTest,
    bootstrap_ci,
    bootstrap_counts,
    bootstrap_r,
    fdr,
    kept_variance,
    max_statistic_p,
    permutation_p,
    permutation_test,
)
from brainalign.evaluation.trainings import compare_trainings

__all__ = [
    "GroupEstimate",
    "PermutationTest",
    "SignFlipTest",
    "bootstrap_ci",
    "bootstrap_counts",
    "bootstrap_r",
    "compare_over_subjects",
    "compare_samples",
    "compare_trainings",
    "fdr",
    "gram",
    "group_map",
    "kept_variance",
    "layer_roi_cka",
    "layer_roi_rsa",
    "leave_one_subject_out",
    "linear_cka",
    "max_statistic_p",
    "ncsnr",
    "noise_ceiling",
    "normalised_score",
    "pearson_r",
    "permutation_p",
    "permutation_test",
    "product_measure",
    "r2",
    "resampled_cka",
    "sign_flip_test",
    "simulated_ceiling",
    "split_half",
    "subsets",
    "two_factor_test",
    "two_factor_variance",
    "undefined",
    "unique_variance",
    "variance_partition",
]
