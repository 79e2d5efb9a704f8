"""Linear models with one penalty per target: pure solvers, thin estimators."""

from brainalign.linear.ridge import AlphaEdgeWarning, Ridge
from brainalign.linear.solvers import (
    Factors,
    choose_alpha,
    factorise,
    ridge_fit,
    ridge_gcv,
    ridge_kfold,
    ridge_loo,
    score_alphas,
)

__all__ = [
    "AlphaEdgeWarning",
    "Factors",
    "Ridge",
    "choose_alpha",
    "factorise",
    "ridge_fit",
    "ridge_gcv",
    "ridge_kfold",
    "ridge_loo",
    "score_alphas",
]
