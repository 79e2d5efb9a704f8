"""Linear models with one penalty per target: pure solvers, thin estimators."""

from brainalign.linear.banded import (
    BandedRidge,
    BandedSearch,
    banded_fit,
    banded_kfold,
    feature_spaces,
    sample_gammas,
)
from brainalign.linear.lagged import (
    LaggedRidge,
    TimeBlocks,
    delayed,
    delays,
    lagged_cross,
    lagged_gram,
    lagged_kernel,
    lagged_predict,
)
from brainalign.linear.ridge import AlphaEdgeWarning, RankWarning, Ridge
from brainalign.linear.search import (
    RidgeSolver,
    Solution,
    ridge_gcv,
    ridge_kfold,
    ridge_loo,
    score_alphas,
)
from brainalign.linear.solvers import Factors, choose_alpha, factorise, ridge_fit
from brainalign.linear.stacking import Stacking, simplex_weights
from brainalign.linear.streaming import ridge_to_store

__all__ = [
    "AlphaEdgeWarning",
    "BandedRidge",
    "BandedSearch",
    "Factors",
    "LaggedRidge",
    "RankWarning",
    "Ridge",
    "RidgeSolver",
    "Solution",
    "Stacking",
    "TimeBlocks",
    "banded_fit",
    "banded_kfold",
    "choose_alpha",
    "delayed",
    "delays",
    "factorise",
    "feature_spaces",
    "lagged_cross",
    "lagged_gram",
    "lagged_kernel",
    "lagged_predict",
    "ridge_fit",
    "ridge_gcv",
    "ridge_kfold",
    "ridge_loo",
    "ridge_to_store",
    "sample_gammas",
    "score_alphas",
    "simplex_weights",
]
