"""Linear models with one penalty per target: pure solvers, thin estimators."""

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

__all__ = [
    "AlphaEdgeWarning",
    "Factors",
    "LaggedRidge",
    "RankWarning",
    "Ridge",
    "RidgeSolver",
    "Solution",
    "TimeBlocks",
    "choose_alpha",
    "delayed",
    "delays",
    "factorise",
    "lagged_cross",
    "lagged_gram",
    "lagged_kernel",
    "lagged_predict",
    "ridge_fit",
    "ridge_gcv",
    "ridge_kfold",
    "ridge_loo",
    "score_alphas",
]
