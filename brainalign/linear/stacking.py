"""Stacked regression: one ridge model per feature space, mixed with convex weights per target."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import BaseCrossValidator, GroupKFold
from sklearn.utils.validation import check_consistent_length
from torch import Tensor

from brainalign.errors import ConfigError
from brainalign.linear.banded import Spaces, SpacesEstimator, make_splits
from brainalign.linear.ridge import DEFAULT_ALPHAS, Ridge, check_alphas
from brainalign.linear.solvers import split_indices

__all__ = ["Stacking", "simplex_weights"]

#: How far a gradient may be from its optimality condition, relative to its size.
OPTIMAL = 1e-10


def simplex_weights(products: Tensor) -> Tensor:
    r"""Convex weights that minimise a quadratic form, exactly, for many targets at once.

    .. math:: \min_{w} w_t^\top P_t w_t \quad \text{with} \quad w_t \ge 0, \; \sum_s w_{st} = 1

    With :math:`v = w / (w^\top P w)` this is :math:`\min_{v \ge 0} v^\top P v / 2 - \sum_s v_s`,
    which an active set solves: a space enters where the gradient is steepest, and leaves when its
    weight would become negative.

    Parameters
    ----------
    products : Tensor, shape (n_targets, n_spaces, n_spaces)
        ``P``: products of the spaces' errors, symmetric, positive semidefinite, finite.

    Returns
    -------
    Tensor, shape (n_targets, n_spaces), float64
        Equal weights where all errors are 0.

    References
    ----------
    Lawson & Hanson (1974), Solving Least Squares Problems, ch. 23 (the active set).
    """
    P = products.double()
    n, spaces = P.shape[:2]
    scale = P.diagonal(dim1=1, dim2=2).mean(dim=1)
    empty = scale <= 0
    eye = torch.eye(spaces, dtype=P.dtype, device=P.device)
    # Regular also where spaces make the same errors; one of them then has their weight.
    P = P / torch.where(empty, 1.0, scale)[:, None, None] + 1e-12 * eye
    v = torch.zeros((n, spaces), dtype=P.dtype, device=P.device)
    inside = torch.zeros_like(v, dtype=torch.bool)
    todo = torch.arange(n, device=P.device)
    for _ in range(10 * spaces + 10):
        slope = 1 - torch.bmm(P[todo], v[todo, :, None])[:, :, 0]
        slope = slope.masked_fill(inside[todo], -torch.inf)
        steepest, entering = slope.max(dim=1)
        go = steepest > OPTIMAL
        todo, entering = todo[go], entering[go]
        if len(todo) == 0:
            break
        inside[todo, entering] = True
        _settle(P, v, inside, todo, eye)
    else:
        raise ConfigError(f"The weights of {len(todo)} targets did not settle.", "Report this.")
    v = torch.where(empty[:, None], 1.0, v)
    return v / v.sum(dim=1, keepdim=True)


def _settle(P: Tensor, v: Tensor, inside: Tensor, todo: Tensor, eye: Tensor) -> None:
    """Minimise over the spaces inside, dropping those that would go below 0; in place."""
    while len(todo):
        own = inside[todo]
        mask = own.double()
        system = P[todo] * mask[:, :, None] * mask[:, None, :] + eye * (1 - mask)[:, None, :]
        goal = torch.linalg.solve(system, mask)
        negative = own & (goal <= 0)
        share = torch.where(negative, v[todo] / (v[todo] - goal).clamp(min=1e-300), torch.inf)
        length, first = share.min(dim=1)
        done = ~negative.any(dim=1)
        length = torch.where(done, 1.0, length)[:, None]
        v[todo] = torch.where(own, (v[todo] + length * (goal - v[todo])).clamp(min=0), 0.0)
        todo, first = todo[~done], first[~done]
        inside[todo, first] = False
        v[todo, first] = 0.0


class Stacking(SpacesEstimator):
    r"""Ridge per feature space, mixed for each target with convex weights.

    .. math:: \hat y_t = \sum_s v_{st} \hat y_{st}, \qquad
              v_t = \arg\min_{v \ge 0, \sum_s v_s = 1}
              \| y_t - \sum_s v_s \hat y^{\mathrm{out}}_{st} \|^2

    The predictions :math:`\hat y^{\mathrm{out}}` are of rows held out in turn; the penalty of
    each space and target is chosen inside the other rows. The models are then fitted to all rows.
    Unlike banded ridge, spaces do not share a target's variance: a space is not shrunk because
    another one predicts the same.

    Parameters
    ----------
    spaces : sequence or dict, optional
        Feature spaces, as in `BandedRidge`.
    alphas : float or sequence of float
        Grid of each space's penalty, all above 0.
    cv : int, splitter or list of (train, test)
        Folds whose held-out predictions the weights are made from.
    alpha_cv : int, splitter, "loo" or "gcv", optional
        How penalties are chosen, as in `Ridge`, among the rows that a model is fitted to. By
        default leave-one-out; if `fit` gets groups, up to 5 folds that keep them whole.
    fit_intercept : bool
        Fit an unpenalised intercept, inside each training fold.
    device : str
        ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
    dtype : {"auto", "float32", "float64"}
        Type of the computation; "auto" takes that of X.
    target_batch : int, optional
        Targets in flight.

    Attributes
    ----------
    weights_ : ndarray, shape (n_spaces, n_targets) or (n_spaces,)
        Convex weights.
    alphas_ : ndarray, shape (n_spaces, n_targets) or (n_spaces,)
        Penalty of each space's own model.
    coef_ : ndarray, shape (n_targets, n_features) or (n_features,)
        Coefficients of the mixture.
    intercept_ : ndarray, shape (n_targets,), or float
    space_scores_ : ndarray, shape (n_spaces, n_targets) or (n_spaces,)
        R^2 of each space's held-out predictions, over all held-out rows.
    best_score_ : ndarray, shape (n_targets,), or float
        R^2 of the mixture of these predictions. The weights were chosen on them: it is no
        estimate of performance on new data.
    spaces_ : dict of str to ndarray of int
        Columns of each space, by name.
    mean_ : ndarray, shape (n_features,)
        Mean of the training rows; zeros without an intercept.

    References
    ----------
    Wolpert (1992), Neural Networks 5, 241-259; Breiman (1996), Machine Learning 24, 49-64;
    Lin, Naselaris, Kay & Wehbe (2024), Human Brain Mapping (stacked regressions and structured
    variance partitioning).
    """

    def __init__(
        self,
        spaces: Spaces = None,
        *,
        alphas: float | Sequence[float] = DEFAULT_ALPHAS,
        cv: int | BaseCrossValidator | Iterable[tuple[Any, Any]] = 5,
        alpha_cv: int | str | BaseCrossValidator | None = None,
        fit_intercept: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        target_batch: int | None = None,
    ) -> None:
        self.spaces = spaces
        self.alphas = alphas
        self.cv = cv
        self.alpha_cv = alpha_cv
        self.fit_intercept = fit_intercept
        self.device = device
        self.dtype = dtype
        self.target_batch = target_batch

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Fit every space, and mix.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
            Data.
        y : array-like, shape (n_samples,) or (n_samples, n_targets)
            Targets.
        groups : array-like, shape (n_samples,), optional
            Groups of rows that `cv` and `alpha_cv` keep whole.

        Returns
        -------
        Stacking
            Itself.

        Raises
        ------
        ConfigError
            For non-finite values (with their count), penalties that are not above 0, spaces that
            do not fit X, more folds than samples, or a group that folds of `cv` or `alpha_cv` have
            on both sides.

        Warns
        -----
        RankWarning, AlphaEdgeWarning
            As `Ridge` does of a space, once for all spaces, of the fits to all rows.
        """
        data, target = self._read(X, y)
        one = target.ndim == 1
        Y = target.reshape(len(target), -1)
        rows = None if groups is None else np.asarray(groups)
        if rows is not None:
            check_consistent_length(data, rows)
        splits = [_rows(s, len(data)) for s in make_splits(self.cv, data, target, groups)]
        _keep_whole(splits, rows, "cv", self.cv)
        errors, measured = [], []
        for train, test in splits:
            own = None if rows is None else rows[train]
            models, _ = self._models(data[train], Y[train], own)
            errors.append(np.stack([Y[test] - m.predict(data[test][:, c]) for m, c in models]))
            measured.append(Y[test] - np.mean(Y[test], axis=0, dtype=np.float64))
        held_out = np.concatenate(errors, axis=1).astype(np.float64)  # (spaces, rows, targets)
        products = np.einsum("ait,bit->tab", held_out, held_out, optimize=True)
        weights = simplex_weights(torch.as_tensor(products)).numpy().T
        total = (np.concatenate(measured).astype(np.float64) ** 2).sum(axis=0)
        total = np.where(total > 0, total, np.nan)
        mixed = np.einsum("at,tab,bt->t", weights, products, weights)
        own_scores = 1 - np.einsum("taa->at", products) / total
        best = 1 - mixed / total

        coef = np.empty((Y.shape[1], data.shape[1]), dtype=data.dtype)
        intercept = np.zeros(Y.shape[1], dtype=data.dtype)
        penalties = []
        models, told = self._models(data, Y, rows)
        for s, (model, columns) in enumerate(models):
            weight = weights[s].astype(data.dtype)
            coef[:, columns] = weight[:, None] * model.coef_
            intercept += weight * model.intercept_
            penalties.append(model.alpha_)
        self._set_weights(coef, intercept, one)
        self.weights_ = weights[:, 0] if one else weights
        self.alphas_ = np.stack(penalties)[:, 0] if one else np.stack(penalties)
        self.space_scores_ = own_scores[:, 0] if one else own_scores
        self.best_score_ = float(best[0]) if one else best
        for category, texts in told.items():
            warnings.warn(" ".join(texts), category, stacklevel=2)
        return self

    def _models(
        self, X: NDArray[Any], Y: NDArray[Any], groups: NDArray[Any] | None
    ) -> tuple[list[tuple[Any, NDArray[np.intp]]], dict[type[Warning], list[str]]]:
        """Return each space's model and columns, and what the fits warned of."""
        models = []
        told: dict[type[Warning], list[str]] = {}
        alpha_cv = self._alpha_folds(X, Y, groups)
        for name, columns in self.spaces_.items():
            model = Ridge(
                self.alphas,
                cv=alpha_cv,
                fit_intercept=self.fit_intercept,
                device=self.device,
                dtype=self.dtype,
                target_batch=self.target_batch,
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                models.append((model.fit(X[:, columns], Y), columns))
            for w in caught:
                told.setdefault(w.category, []).append(f"Space {name!r}: {w.message}")
        return models, told

    def _alpha_folds(self, X: NDArray[Any], Y: NDArray[Any], groups: NDArray[Any] | None) -> Any:
        """Return how penalties are chosen among these rows, with groups whole."""
        cv: Any = "loo" if self.alpha_cv is None and groups is None else self.alpha_cv
        if len(check_alphas(self.alphas)) == 1:
            return cv or "loo"  # not used
        if groups is None:
            return cv
        n_groups = len(np.unique(groups))
        if cv is None:
            if n_groups < 2:
                raise ConfigError(
                    "Penalties are chosen in folds that keep groups whole, and there is one group "
                    "in some training rows.",
                    "Use a cv that leaves at least two groups to train on, or give one alpha.",
                )
            cv = GroupKFold(min(5, n_groups))
        if isinstance(cv, str):
            if n_groups < len(groups):
                raise ConfigError(
                    f"alpha_cv={cv!r} leaves out single rows, and there are groups of several: "
                    "penalties would be chosen on rows of groups they were fitted to.",
                    "Leave alpha_cv out, or give a splitter that keeps groups whole.",
                )
            return cv
        splits = [_rows(s, len(X)) for s in make_splits(cv, X, Y, groups)]
        _keep_whole(splits, groups, "alpha_cv", cv)
        return splits


def _keep_whole(
    splits: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]],
    groups: NDArray[Any] | None,
    name: str,
    cv: Any,
) -> None:
    if groups is None:
        return
    for train, test in splits:
        both = np.intersect1d(groups[train], groups[test])
        if len(both):
            raise ConfigError(
                f"A fold of {name}={cv!r} has {len(both)} group(s) both in training and test "
                f"(first: {both[0]!r}).",
                "Use a splitter that keeps groups whole, such as GroupKFold, or no groups.",
            )


def _rows(split: tuple[Any, Any], n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    train, test = split_indices(split, n, torch.device("cpu"))
    return train.numpy(), test.numpy()
