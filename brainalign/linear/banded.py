"""Banded ridge: one penalty per feature space and target, as pure functions and an estimator.

With weights gamma of the spaces on the simplex and a common alpha, the penalty of space s is
``alpha / gamma_s``: ridge regression on features scaled by ``sqrt(gamma_s)``, or equivalently
kernel ridge with ``sum_s gamma_s X_s X_s'``. A candidate gamma is factorised once per fold for
all targets and alphas; what depends on the data alone is computed once for all candidates.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.model_selection import BaseCrossValidator, check_cv
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Tensor
from tqdm import tqdm

from brainalign.device import resolve_device
from brainalign.errors import ConfigError, UnknownNameError, near
from brainalign.linear.ridge import (
    DEFAULT_ALPHAS,
    RankWarning,
    check_alphas,
    check_finite,
    check_folds,
    warn_edges,
)
from brainalign.linear.search import compress
from brainalign.linear.solvers import Design, eigh, split_indices, target_batches

__all__ = [
    "BandedRidge",
    "BandedSearch",
    "banded_fit",
    "banded_kfold",
    "feature_spaces",
    "sample_gammas",
]

logger = logging.getLogger(__name__)

#: What `BandedRidge` and its kin take as feature spaces.
Spaces = Sequence[Any] | Mapping[str, Any] | NDArray[Any] | None
#: Largest error of a shrinkage factor (between 0 and 1) in the compressed basis of the alphas.
SHRINKAGE_ERROR = {torch.float32: 1e-5, torch.float64: 1e-12}
#: Relative residual at which a system is solved.
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-13}
#: Share of a unit vector's square below which others span it.
SPANNED = {torch.float32: 1e-5, torch.float64: 1e-12}
#: Times the rank's tolerance: pivots of a Cholesky factorisation below it call for eigenvalues.
DOUBT = 1e4
#: Elements of targets and their products with X that are held at a time, over all folds.
CHUNK_ELEMENTS = 2**28
#: Largest change of a log penalty in the refinement: a factor of about 20.
REACH = 3.0
NEWTON_STEPS = 12
MOST_ITERATIONS = 500


class BandedSearch(NamedTuple):
    """Result of `banded_kfold`.

    Attributes
    ----------
    penalties : Tensor, shape (n_spaces, n_targets), float64
        Chosen penalty of each space; infinite where its gamma is 0.
    score : Tensor, shape (n_targets,), float64
        Cross-validated R^2 at these penalties.
    cv_scores : Tensor, shape (n_gammas, n_targets), float64
        Cross-validated R^2 of each gamma at its best alpha.
    gamma : Tensor of int, shape (n_targets,)
        The best candidate before refinement.
    alpha : Tensor of int, shape (n_targets,)
        Its alpha.
    """

    penalties: Tensor
    score: Tensor
    cv_scores: Tensor
    gamma: Tensor
    alpha: Tensor


def feature_spaces(
    spaces: Spaces, n_features: int, names: Sequence[str] | None = None
) -> dict[str, NDArray[np.intp]]:
    """Return the indices of the features of each space, by its name.

    Parameters
    ----------
    spaces : sequence or dict, optional
        One label per feature, in any order; or a list of slices, of lists of indices or of lists
        of column names, named "0", "1" ...; or a dict of these by name. None is one space.
    n_features : int
        Number of features.
    names : sequence of str, optional
        Names of the columns.

    Returns
    -------
    dict of str to ndarray of int
        In order of first appearance; each feature belongs to one space.

    Raises
    ------
    ConfigError
        If a space is empty, or a feature is in none or in several.
    UnknownNameError
        For an unknown column.
    """
    if spaces is None:
        return {"0": np.arange(n_features)}
    if not isinstance(spaces, Mapping):
        listed = list(spaces)
        if not listed or not all(isinstance(s, slice | list | tuple | np.ndarray) for s in listed):
            if len(listed) != n_features:
                raise ConfigError(
                    f"spaces holds {len(listed)} labels for {n_features} features.",
                    "Give one label per feature, or a list or dict of slices, indices or columns.",
                )
            labels = np.asarray([str(s) for s in listed])
            return {s: np.flatnonzero(labels == s) for s in dict.fromkeys(labels.tolist())}
        spaces = {str(i): s for i, s in enumerate(listed)}
    found = {str(name): _columns(s, n_features, names) for name, s in spaces.items()}
    for name, index in found.items():
        if len(index) == 0:
            raise ConfigError(f"Feature space {name!r} is empty.", "Leave it out.")
    count = np.bincount(np.concatenate(list(found.values())), minlength=n_features)
    if (count != 1).any():
        raise ConfigError(
            f"Every feature belongs to one space, but {int((count == 0).sum())} of {n_features} "
            f"are in none and {int((count > 1).sum())} in several."
        )
    return found


def _columns(chosen: Any, n_features: int, names: Sequence[str] | None) -> NDArray[np.intp]:
    if isinstance(chosen, slice):
        return np.arange(n_features)[chosen]
    items = list(chosen)
    if items and all(isinstance(i, str) for i in items):
        known = {n: i for i, n in enumerate(names)} if names is not None else {}
        for item in items:
            if item not in known:
                why = near(item, known) if known else " X has no column names."
                raise UnknownNameError(f"There is no column {item!r}.{why}")
        return np.array([known[i] for i in items], dtype=np.intp)
    index = np.asarray(items)
    if index.dtype == bool:
        index = np.flatnonzero(index)
    index = index.astype(np.intp)
    if ((index < 0) | (index >= n_features)).any():
        raise ConfigError(f"Column indices are 0 to {n_features - 1}; got {chosen!r}.")
    return index


def sample_gammas(
    n_iter: int,
    n_spaces: int,
    *,
    concentration: float | Sequence[float] = (0.1, 1.0),
    seed: int = 0,
) -> NDArray[np.float64]:
    """Weights of feature spaces: equal ones, then draws from Dirichlet distributions.

    Parameters
    ----------
    n_iter : int
        Number of candidates.
    n_spaces : int
        Number of spaces.
    concentration : float or sequence of float
        Concentrations, taken in turn: below 1 few spaces dominate, 1 is uniform on the simplex.
    seed : int
        Seed.

    Returns
    -------
    ndarray, shape (n_iter, n_spaces)
        Rows sum to 1. One space has one candidate.
    """
    levels = np.atleast_1d(np.asarray(concentration, dtype=np.float64))
    if n_iter < 1 or not (np.isfinite(levels) & (levels > 0)).all():
        raise ConfigError(
            "n_iter must be at least 1 and concentrations above 0; "
            f"got {n_iter!r} and {concentration!r}."
        )
    equal = np.full((1, n_spaces), 1 / n_spaces)
    if n_spaces == 1:
        return equal
    rng = np.random.default_rng(seed)
    drawn = [
        rng.dirichlet(np.full(n_spaces, levels[i % len(levels)])) for i in range(n_iter - 1)
    ]  # fmt: skip
    return np.vstack([equal, *drawn])


@dataclass(frozen=True)
class _Basis:
    """Eigenvectors of one fold's scaled Gram matrix (or weighted kernel) for one gamma.

    The solution for one alpha is ``lift @ u`` with ``u = (rhs @ lift) / (values + alpha)``, and
    ``test @ u`` its prediction of the validation rows.
    """

    values: Tensor  # (d,) float64
    vectors: Tensor  # (d, d)
    lift: Tensor  # (rows of rhs, d)
    test: Tensor  # (m, d)


class _Bands:
    """Parts N_s of one fold's system in primal form: the eigenvectors' rows of each space.

    The system is ``values + alpha sum_s exp(-eta_s) N_s`` for penalties
    ``alpha exp(-eta_s) / gamma_s``.
    """

    def __init__(self, vectors: Tensor, space: Tensor, n_spaces: int) -> None:
        self.vectors, self.space = vectors, space
        self.columns = [(space == s).nonzero()[:, 0] for s in range(n_spaces)]

    def images(self, flat: Tensor) -> list[Tensor]:
        """Rows of `flat` times each part."""
        features = flat @ self.vectors.T
        return [features[:, c] @ self.vectors[c] for c in self.columns]

    def apply(self, u: Tensor, factors: Tensor) -> Tensor:
        """Rows of `u` (T, d) times the parts' sum, weighted by each row's factors (T, S)."""
        features = u @ self.vectors.T
        return (features * factors[:, self.space]) @ self.vectors


class _Kernels:
    """Parts N_s in kernel form, the rotated kernels: ``alpha + sum_s exp(eta_s) N_s``."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = matrices

    def images(self, flat: Tensor) -> list[Tensor]:
        """Rows of `flat` times each part."""
        return [flat @ m for m in self.matrices]

    def apply(self, u: Tensor, factors: Tensor) -> Tensor:
        """Rows of `u` (T, d) times the parts' sum, weighted by each row's factors (T, S)."""
        out = torch.zeros_like(u)
        for s, image in enumerate(self.images(u)):
            out += factors[:, s, None] * image
        return out


@dataclass(frozen=True)
class _Targets:
    """Targets of one fold, one row each; validation rows are deviations from the training mean."""

    rhs: Tensor  # (T, d): X'y in primal form, y in kernel form
    test: Tensor  # (T, m)
    square: Tensor  # (T,) float64, sum of squares of the validation rows
    total: Tensor  # (T,) float64, the same about their own mean
    defined: Tensor  # (T,) bool, not constant
    mean: Tensor  # (T,) of the training rows


class _Fold:
    """What one pair of training and validation rows needs, whatever the gamma."""

    primal: bool

    def __init__(self, X: Tensor, train: Tensor, test: Tensor, centred: bool) -> None:
        self.X, self.train, self.test_rows, self.centred = X, train, test, centred
        self.short: Tensor | None = None

    def targets(self, Y: Tensor) -> _Targets:
        y, e = Y[self.train], Y[self.test_rows]
        mean = y.mean(dim=0, dtype=torch.float64).to(y.dtype)
        if not self.centred:
            mean = torch.zeros_like(mean)
        total = (e - e.mean(dim=0, dtype=torch.float64).to(e.dtype)).square()
        defined = (e != e[:1]).any(dim=0) if len(e) else torch.ones_like(mean, dtype=torch.bool)
        e = e - mean
        square = e.square().sum(dim=0, dtype=torch.float64)
        if self.short is not None:
            e = self.short @ e
        return _Targets(
            self.rhs(y - mean),
            e.T.contiguous(),
            square,
            total.sum(dim=0, dtype=torch.float64),
            defined,
            mean,
        )

    def rhs(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def basis(self, gamma: Tensor) -> _Basis:
        raise NotImplementedError

    def pieces(self, gamma: Tensor, basis: _Basis) -> tuple[_Bands | _Kernels, list[Tensor]]:
        """Parts of the system, and of the prediction: (m, d), one or as many as spaces."""
        raise NotImplementedError

    def coefficients(self, gamma: Tensor, eta: Tensor, lifted: Tensor) -> Tensor:
        """Coefficients (T, p) of targets with solutions `lifted` (T, rows of rhs)."""
        raise NotImplementedError


class _Primal(_Fold):
    primal = True

    def __init__(
        self, X: Tensor, space: Tensor, n_spaces: int, train: Tensor, test: Tensor, centred: bool
    ) -> None:
        super().__init__(X, train, test, centred)
        self.space, self.n_spaces = space, n_spaces
        rows = X[train]
        self.mean = rows.mean(dim=0, dtype=torch.float64).to(X.dtype)
        if not centred:
            self.mean = torch.zeros_like(self.mean)
        double = (rows - self.mean).double()
        self.gram = double.T @ double
        self.held_out = X[test] - self.mean
        if len(test) > X.shape[1]:
            # Errors over many rows are those over as many rows as there are features.
            q, r = torch.linalg.qr(self.held_out.double())
            self.held_out, self.short = r.to(X.dtype), q.T.to(X.dtype)

    def rhs(self, y: Tensor) -> Tensor:
        return y.T @ (self.X[self.train] - self.mean)

    def basis(self, gamma: Tensor) -> _Basis:
        scale = gamma[self.space].sqrt()
        values, vectors = eigh(scale[:, None] * self.gram * scale)
        vectors = vectors.to(self.X.dtype)
        lift = scale[:, None].to(self.X.dtype) * vectors
        return _Basis(values, vectors, lift, self.held_out @ lift)

    def pieces(self, gamma: Tensor, basis: _Basis) -> tuple[_Bands, list[Tensor]]:
        return _Bands(basis.vectors, self.space, self.n_spaces), [basis.test]

    def coefficients(self, gamma: Tensor, eta: Tensor, lifted: Tensor) -> Tensor:
        return lifted


class _Kernel(_Fold):
    primal = False

    def __init__(
        self,
        X: Tensor,
        columns: Sequence[Tensor],
        kernels: Tensor,
        train: Tensor,
        test: Tensor,
        centred: bool,
    ) -> None:
        super().__init__(X, train, test, centred)
        self.columns, self.kernels = columns, kernels
        self.mean = X[train].mean(dim=0, dtype=torch.float64).to(X.dtype)
        if not centred:
            self.mean = torch.zeros_like(self.mean)

    def rhs(self, y: Tensor) -> Tensor:
        return y.T.contiguous()

    def _centre(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Return a kernel of all rows among training rows, and of validation with them."""
        rows = kernel[:, self.train]
        inner, outer = rows[self.train], rows[self.test_rows]
        if self.centred:
            mean = inner.mean(dim=0)
            outer = outer - outer.mean(dim=1, keepdim=True) - mean + mean.mean()
            inner = inner - mean[:, None] - mean + mean.mean()
        return inner, outer

    def basis(self, gamma: Tensor) -> _Basis:
        inner, outer = self._centre(torch.tensordot(gamma, self.kernels, dims=1))
        values, vectors = eigh(inner)
        vectors = vectors.to(self.X.dtype)
        return _Basis(values, vectors, vectors, outer.to(self.X.dtype) @ vectors)

    def pieces(self, gamma: Tensor, basis: _Basis) -> tuple[_Kernels, list[Tensor]]:
        parts, tests = [], []
        for g, kernel in zip(gamma, self.kernels, strict=True):
            inner, outer = self._centre(g * kernel)
            parts.append(basis.vectors.T @ (inner.to(self.X.dtype) @ basis.vectors))
            tests.append(outer.to(self.X.dtype) @ basis.vectors)
        return _Kernels(parts), tests

    def coefficients(self, gamma: Tensor, eta: Tensor, lifted: Tensor) -> Tensor:
        coef = lifted.new_empty((len(lifted), self.X.shape[1]))
        weight = (gamma * eta.exp()).to(lifted.dtype)
        for s, columns in enumerate(self.columns):
            coef[:, columns] = weight[:, s, None] * (
                lifted @ (self.X[self.train][:, columns] - self.mean[columns])
            )
        return coef


def _make_folds(
    X: Tensor, columns: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], centred: bool
) -> list[_Fold]:
    """Build the folds in primal form where the least training set has as many rows as features."""
    if min(len(train) for train, _ in pairs) >= X.shape[1]:
        space = torch.empty(X.shape[1], dtype=torch.int64, device=X.device)
        for s, c in enumerate(columns):
            space[c] = s
        return [_Primal(X, space, len(columns), *pair, centred) for pair in pairs]
    double = [X[:, c].double() for c in columns]
    kernels = torch.stack([x @ x.T for x in double])
    return [_Kernel(X, columns, kernels, *pair, centred) for pair in pairs]


def _errors(basis: _Basis, targets: _Targets, t: slice, vectors: Tensor, mix: Tensor) -> Tensor:
    """Squared errors of the validation rows (targets, n_alphas), float64.

    Predictions are formed once per vector, and the alphas combined in their Gram matrices.
    """
    rotated = targets.rhs[t] @ basis.lift  # (b, d)
    b, d = rotated.shape
    r = len(vectors)
    weights = rotated[:, None, :] * vectors.to(rotated.dtype)
    parts = (weights.reshape(b * r, d) @ basis.test.T).view(b, r, -1)
    linear = torch.bmm(parts, targets.test[t][:, :, None])[:, :, 0].double()
    gram = torch.bmm(parts, parts.transpose(1, 2)).double()
    quadratic = ((mix @ gram) * mix).sum(dim=2)
    return targets.square[t][:, None] - 2 * linear @ mix.T + quadratic


def _mean_r2(errors: Sequence[Tensor], targets: Sequence[_Targets], t: Any) -> Tensor:
    """Mean R^2 over the folds in which a target varies; `errors` (targets, ...) of each fold."""
    total = torch.zeros_like(errors[0])
    count = torch.zeros(len(errors[0]), dtype=torch.float64, device=total.device)
    shape = (-1,) + (1,) * (total.ndim - 1)
    for error, fold in zip(errors, targets, strict=True):
        defined = fold.defined[t]
        r2 = 1 - error / torch.where(defined, fold.total[t], 1.0).view(shape)
        total += torch.where(defined.view(shape), r2, 0.0)
        count += defined
    return torch.where(count.view(shape) > 0, total / count.clamp(min=1).view(shape), torch.nan)


def _check_problem(X: Tensor, columns: Sequence[Tensor], gammas: Tensor) -> None:
    if gammas.ndim != 2 or gammas.shape[1] != len(columns) or len(gammas) == 0:
        raise ConfigError(
            f"gammas has shape {tuple(gammas.shape)}; expected (n_gammas, {len(columns)}), one "
            "column per feature space."
        )
    if not (torch.isfinite(gammas) & (gammas >= 0)).all() or (gammas.sum(dim=1) == 0).any():
        raise ConfigError("gammas must be finite, at least 0, and not all 0 in a row.")
    if sum(len(c) for c in columns) != X.shape[1]:
        raise ConfigError(
            f"The feature spaces hold {sum(len(c) for c in columns)} features; X has {X.shape[1]}."
        )


def banded_kfold(
    X: Tensor,
    Y: Tensor,
    spaces: Sequence[Tensor],
    gammas: Tensor,
    alphas: Tensor,
    splits: Sequence[tuple[Any, Any]],
    *,
    refine: bool = True,
    fit_intercept: bool = True,
    target_batch: int | None = None,
) -> BandedSearch:
    r"""Choose one penalty per feature space and target by cross-validation.

    .. math:: \min_{w, b} \|y_t - \sum_s X_s w_{st} - b_t\|^2
              + \sum_s \alpha_{st} \|w_{st}\|^2, \qquad \alpha_{st} = \alpha_t / \gamma_{st}

    All pairs of candidates are scored for all targets; the alphas of a gamma cost about as much
    as ten or fifteen of them, however many there are. Refinement moves each target's best
    penalties by up to a factor of 20 along Newton steps on the same cross-validated R^2. The steps
    are made in a small model of each fold's solution (a Galerkin projection on its derivatives
    up to second order with respect to the log penalties); the new penalties are kept where the
    R^2 of the exact solution is higher. This is a local choice, near the best of the candidates:
    R^2 may have other and higher peaks.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Data, float32 or float64.
    Y : Tensor, shape (n_samples, n_targets)
        Targets.
    spaces : sequence of Tensor of int
        Columns of each feature space.
    gammas : Tensor, shape (n_gammas, n_spaces)
        Candidate weights, at least 0; a space with weight 0 is left out.
    alphas : Tensor, shape (n_alphas,)
        Candidate common penalties, above 0.
    splits : sequence of (train, test)
        Row indices; every test set has at least two rows.
    refine : bool
        Whether to leave the grid at the end.
    fit_intercept : bool
        Fit an unpenalised intercept inside each training fold.
    target_batch : int, optional
        Targets in flight.

    Returns
    -------
    BandedSearch

    Raises
    ------
    ConfigError
        If a validation fold has fewer than two rows, or gammas do not fit the spaces.

    References
    ----------
    Nunez-Elizalde, Huth & Gallant (2019), NeuroImage 197, 482-492; Dupre la Tour, Eickenberg,
    Nunez-Elizalde & Gallant (2022), NeuroImage 264, 119728 (random search over the simplex).
    """
    gammas, alphas = gammas.double(), alphas.double()
    _check_problem(X, spaces, gammas)
    pairs = [split_indices(s, len(X), X.device) for s in splits]
    if not pairs:
        raise ConfigError("cv makes no folds.", "Give at least one (train, test) pair.")
    for k, (_, test) in enumerate(pairs):
        if len(test) < 2:
            raise ConfigError(
                f"Validation fold {k} has {len(test)} row(s); R^2 needs at least two.",
                "Use fewer folds.",
            )
    if fit_intercept:
        X = X - X.mean(dim=0, dtype=torch.float64).to(X.dtype)
    folds = _make_folds(X, spaces, pairs, fit_intercept)
    n_targets = Y.shape[1]
    size = sum(min(X.shape[1], len(train)) + len(test) for train, test in pairs)
    chunk = max(target_batch or 1, CHUNK_ELEMENTS // size)
    found = []
    with tqdm(
        total=len(gammas) * -(-n_targets // chunk), desc="banded ridge", disable=None, leave=False
    ) as bar:
        for start in range(0, n_targets, chunk):
            Y_chunk = Y[:, start : start + chunk]
            found.append(_search(folds, Y_chunk, gammas, alphas, refine, target_batch, bar))
    return BandedSearch(*(torch.cat(parts, dim=-1) for parts in zip(*found, strict=True)))


def _search(
    folds: Sequence[_Fold],
    Y: Tensor,
    gammas: Tensor,
    alphas: Tensor,
    refine: bool,
    target_batch: int | None,
    bar: Any,
) -> BandedSearch:
    targets = [fold.targets(Y) for fold in folds]
    n, device = Y.shape[1], Y.device
    dtype = Y.dtype
    score = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    choice = torch.zeros(n, dtype=torch.int64, device=device)
    alpha = torch.full_like(choice, int(alphas.argmax()))
    cv_scores = torch.empty((len(gammas), n), dtype=torch.float64, device=device)
    for j, gamma in enumerate(gammas):
        errors = [
            torch.empty((n, len(alphas)), dtype=torch.float64, device=device) for _ in folds
        ]  # fmt: skip
        for fold, own, error in zip(folds, targets, errors, strict=True):
            basis = fold.basis(gamma)
            # Weighted by the least of them, the factors lie between 0 and 1.
            profile = 1 / (basis.values[:, None] + alphas)
            vectors, mix = compress(profile, basis.values + alphas.min(), SHRINKAGE_ERROR[dtype])
            rows = len(vectors) * (own.rhs.shape[1] + own.test.shape[1])
            for t in target_batches(n, rows, target_batch, device):
                error[t] = _errors(basis, own, t, vectors, mix)
        best, index = _mean_r2(errors, targets, slice(None)).max(dim=1)
        cv_scores[j] = best
        better = best > score  # never for NaN
        score = torch.where(better, best, score)
        choice = torch.where(better, j, choice)
        alpha = torch.where(better, index, alpha)
        bar.update()
    score = torch.where(torch.isnan(cv_scores[0]), torch.nan, score)
    eta = torch.zeros((n, gammas.shape[1]), dtype=torch.float64, device=device)
    if refine:
        for j in choice.unique():
            members = ((choice == j) & ~torch.isnan(score)).nonzero()[:, 0]
            _refine(folds, targets, gammas[j], alphas[alpha], members, eta, score, target_batch)
    penalties = alphas[alpha][:, None] * (-eta).exp() / gammas[choice]
    return BandedSearch(penalties.T.contiguous(), score, cv_scores, choice, alpha)


def _factors(eta: Tensor, alpha: Tensor, primal: bool) -> tuple[Tensor, Tensor]:
    """Factors of the pieces of the system (T, n_spaces) and of the prediction (T, 1 or S)."""
    if primal:
        return alpha[:, None] * (-eta).exp(), torch.ones_like(eta[:, :1])
    return eta.exp(), eta.exp()


def _solve(
    basis: _Basis,
    pieces: _Bands | _Kernels,
    rotated: Tensor,
    alpha: Tensor,
    eta: Tensor,
    primal: bool,
    start: Tensor | None = None,
    slack: float = 1.0,
) -> Tensor:
    """Solve each target's system by conjugate gradients, preconditioned by that at eta = 0.

    The condition number is at most ``exp(2 max |eta|)``, whatever the data.
    """
    dtype = rotated.dtype
    diagonal = (basis.values + alpha[:, None]).to(dtype)
    constant = (basis.values.expand(diagonal.shape) if primal else alpha[:, None]).to(dtype)
    factors = _factors(eta, alpha, primal)[0].to(dtype)
    out = rotated / diagonal if start is None else start
    least = (slack * RESIDUAL[dtype]) ** 2
    goal = least * (rotated.square() / diagonal).sum(dim=1, dtype=torch.float64)
    u, rows = out.clone(), torch.arange(len(out), device=out.device)
    residual = rotated - constant * u - pieces.apply(u, factors)
    step = residual / diagonal
    old = (residual * step).sum(dim=1, dtype=torch.float64)
    for _ in range(MOST_ITERATIONS):
        active = old > goal
        if active.sum() <= 0.8 * len(active):  # go on with the targets that are not yet there
            out[rows[~active]] = u[~active]
            rows, u, residual, step, old, goal, diagonal, constant, factors = (
                x[active] for x in (rows, u, residual, step, old, goal, diagonal, constant, factors)
            )
            if len(rows) == 0:
                return out
        image = constant * step + pieces.apply(step, factors)
        curvature = (step * image).sum(dim=1, dtype=torch.float64)
        length = torch.where(curvature > 0, old / curvature, 0.0).to(dtype)[:, None]
        u += length * step
        residual -= length * image
        scaled = residual / diagonal
        new = (residual * scaled).sum(dim=1, dtype=torch.float64)
        step = scaled + torch.where(old > 0, new / old, 0.0).to(dtype)[:, None] * step
        old = new
    logger.warning("Conjugate gradients stopped after %d steps for %d of %d targets.",
                   MOST_ITERATIONS, int((old > goal).sum()), len(out))  # fmt: skip
    out[rows] = u
    return out


@dataclass(frozen=True)
class _Small:
    """One fold's solution of some targets as a function of eta, in few dimensions."""

    span: Tensor  # (T, q, d)
    constant: Tensor  # (T, q, q)
    parts: Tensor  # (T, n_spaces, q, q)
    rhs: Tensor  # (T, q)
    gram: Tensor  # (T, S' q, S' q) of the predictions' parts
    linear: Tensor  # (T, S' q)
    square: Tensor  # (T,)
    weight: Tensor  # (T,), of this fold's squared error in 1 - R^2

    def solve(self, factors: Tensor) -> Tensor:
        system = self.constant + (factors[:, :, None, None] * self.parts).sum(dim=1)
        return torch.linalg.solve(system, self.rhs)

    def loss(self, eta: Tensor, alpha: Tensor, primal: bool) -> Tensor:
        factors, outer = _factors(eta, alpha, primal)
        c = (outer[:, :, None] * self.solve(factors)[:, None, :]).flatten(1)
        quadratic = (torch.bmm(self.gram, c[:, :, None])[:, :, 0] * c).sum(dim=1)
        return self.weight * (self.square - 2 * (self.linear * c).sum(dim=1) + quadratic)


def _shrink(
    basis: _Basis,
    pieces: _Bands | _Kernels,
    tests: Sequence[Tensor],
    own: _Targets,
    t: Tensor,
    rotated: Tensor,
    alpha: Tensor,
    weight: Tensor,
    primal: bool,
) -> _Small:
    """Project on the solution at eta = 0 and its derivatives up to second order."""
    inverse = (1 / (basis.values + alpha[:, None])).to(rotated.dtype)[:, None]
    base = rotated[:, None] * inverse
    first_images = _images(base, pieces)
    first = torch.cat(first_images, dim=1) * inverse
    second_images = _images(first, pieces)
    second = [
        (second_images[s][:, r] + second_images[r][:, s])[:, None] * inverse
        for s in range(len(first_images))
        for r in range(s + 1)
    ]
    last = torch.cat(second, dim=1)
    vectors = torch.cat([base, first, last], dim=1)
    images = [
        torch.cat(parts, dim=1)
        for parts in zip(first_images, second_images, _images(last, pieces), strict=True)
    ]
    # Orthonormal combinations of the vectors; those that the others span already become zero.
    norm = vectors.norm(dim=2, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    unit = vectors * inverse
    size, axes = _eigh_each(torch.bmm(unit, unit.transpose(1, 2)).double())
    keep = size > SPANNED[vectors.dtype]
    axes = axes * torch.where(keep, size.clamp(min=1e-300).rsqrt(), 0.0)[:, None]
    combine = (axes * inverse.double()).transpose(1, 2).to(vectors.dtype)
    span = torch.bmm(combine, vectors)
    parts = torch.stack(
        [torch.bmm(torch.bmm(combine, i), span.transpose(1, 2)).double() for i in images], dim=1
    )
    scale = (basis.values if primal else alpha[:, None]).to(span.dtype)
    constant = torch.bmm(span * scale[..., None, :], span.transpose(1, 2)).double()
    dropped = torch.diag_embed((~keep).double())
    predicted = torch.cat([span @ test.T for test in tests], dim=1)
    held_out = own.test[t][:, :, None]
    return _Small(
        span,
        (constant + constant.transpose(1, 2)) / 2 + dropped,
        (parts + parts.transpose(2, 3)) / 2,
        torch.bmm(span, rotated[:, :, None])[:, :, 0].double(),
        torch.bmm(predicted, predicted.transpose(1, 2)).double(),
        torch.bmm(predicted, held_out)[:, :, 0].double(),
        own.square[t],
        weight,
    )


def _eigh_each(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, of either sign, and eigenvectors of small symmetric matrices (T, q, q).

    On the CPU where an accelerator fails, which is logged.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
        if not _accelerated(matrices) or bool(torch.isfinite(vectors).all()):
            return values, vectors
        reason = "not finite"
    except torch.linalg.LinAlgError as error:
        if not _accelerated(matrices):
            raise
        reason = str(error)
    logger.warning(
        "The eigendecompositions of %d matrices of %d x %d failed on %s (%s); repeated on the CPU.",
        *matrices.shape, matrices.device, reason,
    )  # fmt: skip
    values, vectors = torch.linalg.eigh(matrices.cpu())
    return values.to(matrices.device), vectors.to(matrices.device)


def _accelerated(matrices: Tensor) -> bool:
    return matrices.is_cuda


def _images(vectors: Tensor, pieces: _Bands | _Kernels) -> list[Tensor]:
    """Rows of `vectors` (T, q, d) times each part, as one product for all targets."""
    b, q, d = vectors.shape
    return [image.view(b, q, d) for image in pieces.images(vectors.reshape(b * q, d))]


def _newton(models: Sequence[_Small], alpha: Tensor, n_spaces: int, primal: bool) -> Tensor:
    """Eta (T, n_spaces) that minimises the sum of the models' losses, within `REACH` of 0."""

    def loss(eta: Tensor) -> Tensor:
        return torch.stack([m.loss(eta, alpha, primal) for m in models]).sum(dim=0)

    eta = torch.zeros((len(alpha), n_spaces), dtype=torch.float64, device=alpha.device)
    damping = torch.full((len(alpha), 1), 1e-3, dtype=torch.float64, device=alpha.device)
    for _ in range(NEWTON_STEPS):
        point = eta.clone().requires_grad_()
        value = loss(point)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        hessian = torch.stack(
            [torch.autograd.grad(g.sum(), point, retain_graph=True)[0] for g in slope.unbind(1)],
            dim=1,
        )
        value, slope = value.detach(), slope.detach()
        # A direction of negative curvature is walked down; what lies at the wall stays there.
        stuck = (eta.abs() >= REACH) & (slope * eta < 0)
        slope = torch.where(stuck, 0.0, slope)
        free = (~stuck).double()
        hessian = hessian * free[:, :, None] * free[:, None, :]
        curvature, axes = _eigh_each((hessian + hessian.transpose(1, 2)) / 2)
        curvature = curvature.abs()
        scale = curvature.amax(dim=1, keepdim=True).clamp(min=1e-12)
        along = torch.bmm(axes.transpose(1, 2), slope[:, :, None])[:, :, 0]
        move = along / (curvature + damping * scale)
        new = (eta - torch.bmm(axes, move[:, :, None])[:, :, 0]).clamp(-REACH, REACH)
        with torch.no_grad():
            lower = (loss(new) < value)[:, None]
        eta = torch.where(lower, new, eta)
        damping = torch.where(lower, damping / 4, damping * 10).clamp(1e-9, 1e9)
    return eta


def _refine(
    folds: Sequence[_Fold],
    targets: Sequence[_Targets],
    gamma: Tensor,
    alpha: Tensor,
    members: Tensor,
    eta: Tensor,
    score: Tensor,
    target_batch: int | None,
) -> None:
    """Refine the penalties of targets that chose the same gamma; `eta`, `score` in place."""
    if len(members) == 0:
        return
    primal, n_spaces = folds[0].primal, len(gamma)
    bases = [fold.basis(gamma) for fold in folds]
    parts = [fold.pieces(gamma, basis) for fold, basis in zip(folds, bases, strict=True)]
    q = 1 + n_spaces + n_spaces * (n_spaces + 1) // 2
    rows = 2 * q * max(own.rhs.shape[1] + own.test.shape[1] for own in targets)
    for chosen in target_batches(len(members), rows, target_batch, score.device):
        t = members[chosen]
        a = alpha[t]
        defined = torch.stack([own.defined[t] for own in targets])
        rotated = [own.rhs[t] @ basis.lift for own, basis in zip(targets, bases, strict=True)]
        models = []
        for k, own in enumerate(targets):
            weight = torch.where(defined[k], 1 / own.total[t], 0.0) / defined.sum(dim=0)
            models.append(
                _shrink(bases[k], *parts[k], own, t, rotated[k], a, weight, primal)
            )  # fmt: skip
        moved = _newton(models, a, n_spaces, primal)
        inner, outer = _factors(moved, a, primal)
        errors = []
        for k, own in enumerate(targets):
            small = models[k].solve(inner).to(rotated[k].dtype)
            start = torch.bmm(small[:, None, :], models[k].span)[:, 0]
            pieces, tests = parts[k]
            u = _solve(bases[k], pieces, rotated[k], a, moved, primal, start, slack=10.0)
            predicted = torch.zeros_like(own.test[t])
            for s, test in enumerate(tests):
                predicted += outer[:, s, None].to(u.dtype) * (u @ test.T)
            inside = own.test[t]
            outside = own.square[t] - inside.square().sum(dim=1, dtype=torch.float64)
            error = (inside - predicted).square().sum(dim=1, dtype=torch.float64)
            errors.append(error + outside)
        exact = _mean_r2(errors, targets, t)
        better = exact > score[t]
        eta[t] = torch.where(better[:, None], moved, eta[t])
        score[t] = torch.where(better, exact, score[t])


def banded_fit(
    X: Tensor,
    Y: Tensor,
    spaces: Sequence[Tensor],
    penalties: Tensor,
    *,
    centres: Tensor | None = None,
    fit_intercept: bool = True,
    target_batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Fit ridge regression with one penalty per feature space and target.

    .. math:: \min_{w, b} \|y_t - \sum_s X_s w_{st} - b_t\|^2 + \sum_s \alpha_{st} \|w_{st}\|^2

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Training data.
    Y : Tensor, shape (n_samples, n_targets)
        Targets.
    spaces : sequence of Tensor of int
        Columns of each feature space.
    penalties : Tensor, shape (n_spaces, n_targets)
        Above 0; infinity leaves a space out.
    centres : Tensor, shape (n_spaces, n_targets), optional
        Weights gamma near those of the penalties. Targets with the same ones share a
        factorisation and get their solution from it by conjugate gradients. By default each
        target's own, so that there are as many factorisations as ratios of penalties.
    fit_intercept : bool
        Fit ``b``, which is not penalised.
    target_batch : int, optional
        Targets in flight.

    Returns
    -------
    coef : Tensor, shape (n_targets, n_features)
    intercept : Tensor, shape (n_targets,)

    References
    ----------
    Nunez-Elizalde, Huth & Gallant (2019), NeuroImage 197, 482-492.
    """
    penalties = penalties.double().T
    if penalties.shape != (Y.shape[1], len(spaces)) or not (penalties > 0).all():
        raise ConfigError(
            f"penalties must be above 0 and have shape ({len(spaces)}, {Y.shape[1]}); "
            f"got {tuple(penalties.T.shape)}."
        )
    gammas = 1 / penalties if centres is None else centres.double().T
    _check_problem(X, spaces, gammas)
    gammas = gammas / gammas.sum(dim=1, keepdim=True)
    used = gammas > 0
    if (torch.isfinite(penalties) != used).any():
        raise ConfigError("Centres must be 0 where penalties are infinite, and only there.")
    # log(alpha) is the mean over the spaces of log(penalty * gamma); eta is what remains.
    product = torch.where(used, penalties * gammas, 1.0).log()
    log_alpha = product.sum(dim=1) / used.sum(dim=1)
    eta = torch.where(used, log_alpha[:, None] - product, 0.0)
    eta = torch.where(eta.abs() < 1e-12, 0.0, eta)
    centre, member = torch.unique(_rounded(gammas), dim=0, return_inverse=True)

    offset = X.mean(dim=0, dtype=torch.float64).to(X.dtype)
    if not fit_intercept:
        offset = torch.zeros_like(offset)
    everything = torch.arange(len(X), device=X.device)
    (fold,) = _make_folds(X - offset, spaces, [(everything, everything[:0])], fit_intercept)
    coef = X.new_empty((Y.shape[1], X.shape[1]))
    intercept = X.new_zeros(Y.shape[1])
    for j in range(len(centre)):
        members = (member == j).nonzero()[:, 0]
        gamma = gammas[members[0]]
        basis = fold.basis(gamma)
        moved = bool(eta[members].any())
        pieces = fold.pieces(gamma, basis)[0] if moved else None
        for chosen in target_batches(len(members), sum(X.shape), target_batch, X.device):
            t = members[chosen]
            own = fold.targets(Y[:, t])
            rotated = own.rhs @ basis.lift
            alpha = log_alpha[t].exp()
            if pieces is None:
                u = rotated / (basis.values + alpha[:, None]).to(rotated.dtype)
            else:
                u = _solve(basis, pieces, rotated, alpha, eta[t], fold.primal)
            coef[t] = fold.coefficients(gamma, eta[t], u @ basis.lift.T)
            intercept[t] = own.mean - coef[t] @ offset
    return coef, intercept


def _rounded(gammas: Tensor) -> Tensor:
    """Gammas without the last digits, so that equal ratios of penalties are equal rows."""
    return torch.round(gammas, decimals=12)


class SpacesEstimator(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What estimators over feature spaces share: reading data and predicting space by space."""

    spaces: Spaces
    fit_intercept: bool
    device: str
    dtype: str
    coef_: NDArray[np.floating]
    intercept_: Any
    mean_: NDArray[np.floating]
    spaces_: dict[str, NDArray[np.intp]]

    def predict(self, X: ArrayLike, split: bool = False) -> NDArray[np.floating]:
        """Predict the targets of new rows.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
            Data.
        split : bool
            Return what each space contributes, as a deviation from the prediction for the mean
            of the training rows: ``(X_s - mean_s) w_s``.

        Returns
        -------
        ndarray, shape (n_samples,) or (n_samples, n_targets)
            With `split`, (n_spaces, n_samples) or (n_spaces, n_samples, n_targets).
        """
        check_is_fitted(self)
        data: Any = validate_data(
            self, X, dtype=_dtypes(self.dtype), reset=False, ensure_all_finite=False
        )
        check_finite(data, "X", "features")
        if split:
            data = data - self.mean_
            return np.stack(
                [data[:, c] @ self.coef_[..., c].T for c in self.spaces_.values()]
            )  # fmt: skip
        predicted: NDArray[np.floating] = data @ self.coef_.T + self.intercept_
        return predicted

    def _read(self, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return finite X and y of one type, and set `spaces_` and `mean_`."""
        finite = {"ensure_all_finite": False}  # counted below
        checked: Any = validate_data(
            self,
            X,
            y,
            validate_separately=(
                {"dtype": _dtypes(self.dtype), **finite},
                {"dtype": "numeric", "ensure_2d": False, **finite},
            ),
        )
        data: NDArray[Any] = checked[0]
        target = np.asarray(checked[1], dtype=data.dtype)
        check_consistent_length(data, target)
        check_finite(data, "X", "features")
        check_finite(target.reshape(len(target), -1), "y", "targets")
        names = getattr(self, "feature_names_in_", None)
        self.spaces_ = feature_spaces(self.spaces, data.shape[1], names)
        self.mean_ = data.mean(axis=0, dtype=np.float64).astype(data.dtype)
        if not self.fit_intercept:
            self.mean_ = np.zeros_like(self.mean_)
        return data, target

    def _set_weights(self, coef: NDArray[Any], intercept: NDArray[Any], one: bool) -> None:
        self.coef_ = coef[0] if one else coef
        self.intercept_ = float(intercept[0]) if one else intercept


def warn_spanned(gram: Tensor, n: int, centred: bool) -> None:
    """Warn of features that others hold already, by the rule of `Ridge`.

    A Cholesky factorisation, far cheaper than those of a fit, says whether there may be any; their
    number comes from the eigenvalues. With fewer rows than features weights are never unique, and
    nothing is said.

    Parameters
    ----------
    gram : Tensor, shape (n_features, n_features), float64
        X'X of data that are centred if there is an intercept.
    n : int
        Rows of X.
    centred : bool
        Whether there is an intercept.
    """
    p = len(gram)
    if n < p:
        return
    floor = n * torch.finfo(torch.float64).eps
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if int(info) == 0 and bool(pivots.min() > DOUBT * floor * pivots.max()):
        return
    values = eigh(gram)[0]
    rank, possible = int((values > floor * values.max()).sum()), min(n - int(centred), p)
    if rank < possible:
        warnings.warn(
            f"X spans {rank} of {possible} possible directions: some features are constant or sums "
            "of others. Predictions are as good; single weights are not unique. Drop these "
            "features, or reduce X by PCA, before reading weights.",
            RankWarning,
            stacklevel=3,
        )


def _dtypes(dtype: str) -> list[Any]:
    known: dict[str, list[Any]] = {
        "auto": [np.float64, np.float32],
        "float32": [np.float32],
        "float64": [np.float64],
    }
    if dtype not in known:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(known)}.")
    return known[dtype]


def make_splits(
    cv: Any, X: NDArray[Any], y: NDArray[Any], groups: ArrayLike | None
) -> list[tuple[Any, Any]]:
    """Return the splits of a number of folds, a splitter or a list, as a list."""
    if isinstance(cv, str):
        raise ConfigError(
            f"cv is {cv!r}; expected a number of folds, a splitter or a list of (train, test)."
        )
    splitter = check_cv(cv)
    check_folds(len(X), splitter.get_n_splits(X, y, groups) if isinstance(cv, int) else 1)
    return list(splitter.split(X, y, groups))


class BandedRidge(SpacesEstimator):
    r"""Ridge regression that chooses one penalty per feature space and target.

    .. math:: \min_{w, b} \|y_t - \sum_s X_s w_{st} - b_t\|^2
              + \sum_s \alpha_{st} \|w_{st}\|^2, \qquad \alpha_{st} = \alpha_t / \gamma_{st}

    The weights gamma lie on the simplex and come from a random search, alpha from a grid; both
    are then refined for each target. The choice is local: cross-validated R^2 may have several
    peaks, of which this finds one near the best candidate, and another `seed` or `n_iter` may end
    at another. Primal or kernel form is chosen from the shape of X.
    float32 data stay float32; Gram matrices and their eigenvectors are float64.

    Parameters
    ----------
    spaces : sequence or dict, optional
        Feature spaces: one label per feature; or a list of slices, of lists of indices or of
        lists of column names; or a dict of these by name. None is one space: plain ridge.
    alphas : float or sequence of float
        Grid of the common penalty, all above 0.
    n_iter : int
        Number of candidate gammas, the first with equal weights.
    gammas : array-like, shape (n_gammas, n_spaces), optional
        The candidates themselves, in place of `n_iter`, `concentration` and `seed`; a space
        with weight 0 is left out. One row with one alpha is used as it is.
    concentration : float or sequence of float
        Concentrations of the Dirichlet distributions that gammas are drawn from, in turn.
    refine : bool
        Move each target's penalties from its best candidate uphill to a nearby peak.
    cv : int, splitter or list of (train, test)
        How candidates are scored: K unshuffled folds, a scikit-learn splitter or given splits.
    fit_intercept : bool
        Fit an unpenalised intercept, inside each training fold.
    device : str
        ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
    dtype : {"auto", "float32", "float64"}
        Type of the computation; "auto" takes that of X.
    target_batch : int, optional
        Targets in flight.
    seed : int
        Seed of the gammas.

    Attributes
    ----------
    coef_ : ndarray, shape (n_targets, n_features) or (n_features,)
    intercept_ : ndarray, shape (n_targets,), or float
    alphas_ : ndarray, shape (n_spaces, n_targets) or (n_spaces,)
        The chosen penalties.
    gammas_ : ndarray, shape (n_gammas, n_spaces)
        The candidates.
    cv_scores_ : ndarray, shape (n_gammas, n_targets)
        Cross-validated R^2 of each candidate at its best alpha; absent if nothing was chosen.
    best_score_ : ndarray, shape (n_targets,), or float
        Cross-validated R^2 at the chosen penalties. It took part in the choice: it is no
        estimate of performance on new data.
    spaces_ : dict of str to ndarray of int
        Columns of each space, by name.
    mean_ : ndarray, shape (n_features,)
        Mean of the training rows; zeros without an intercept.

    References
    ----------
    Nunez-Elizalde, Huth & Gallant (2019), NeuroImage 197, 482-492; Dupre la Tour, Eickenberg,
    Nunez-Elizalde & Gallant (2022), NeuroImage 264, 119728.
    """

    def __init__(
        self,
        spaces: Spaces = None,
        *,
        alphas: float | Sequence[float] = DEFAULT_ALPHAS,
        n_iter: int = 50,
        gammas: ArrayLike | None = None,
        concentration: float | Sequence[float] = (0.1, 1.0),
        refine: bool = True,
        cv: int | BaseCrossValidator | Iterable[tuple[Any, Any]] = 5,
        fit_intercept: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        target_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        self.spaces = spaces
        self.alphas = alphas
        self.n_iter = n_iter
        self.gammas = gammas
        self.concentration = concentration
        self.refine = refine
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.device = device
        self.dtype = dtype
        self.target_batch = target_batch
        self.seed = seed

    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Choose penalties and fit.

        Parameters
        ----------
        X : array-like, shape (n_samples, n_features)
            Data.
        y : array-like, shape (n_samples,) or (n_samples, n_targets)
            Targets.
        groups : array-like, shape (n_samples,), optional
            Groups of rows for a splitter that keeps them whole.

        Returns
        -------
        BandedRidge
            Itself.

        Raises
        ------
        ConfigError
            For non-finite values (with their count), penalties that are not above 0, spaces that
            do not fit X, or more folds than samples.

        Warns
        -----
        RankWarning
            If there are as many rows as features, and some features are sums of others, of any
            space.
        AlphaEdgeWarning
            If many targets choose an end of the grid.
        """
        alphas = check_alphas(self.alphas)
        data, target = self._read(X, y)
        n_spaces, one = len(self.spaces_), target.ndim == 1
        if self.gammas is None:
            gammas = sample_gammas(
                self.n_iter, n_spaces, concentration=self.concentration, seed=self.seed
            )
        else:
            gammas = np.atleast_2d(np.asarray(self.gammas, dtype=np.float64))
        self.gammas_ = gammas
        device = resolve_device(self.device)
        Xt = torch.as_tensor(np.require(data, requirements="W"), device=device)
        Yt = torch.as_tensor(
            np.require(target.reshape(len(target), -1), requirements="W"), device=device
        )
        columns = [torch.as_tensor(c, device=device) for c in self.spaces_.values()]
        grid, weights = (torch.as_tensor(a, device=device) for a in (alphas, gammas))
        _check_problem(Xt, columns, weights)
        if len(Xt) >= Xt.shape[1]:
            gram = Design(Xt, fit_intercept=self.fit_intercept).gram
            warn_spanned(gram, len(Xt), self.fit_intercept)
        options: dict[str, Any] = {
            "fit_intercept": self.fit_intercept,
            "target_batch": self.target_batch,
        }
        if len(alphas) * len(gammas) > 1:
            splits = make_splits(self.cv, data, target, groups)
            search = banded_kfold(
                Xt, Yt, columns, weights, grid, splits, refine=self.refine, **options
            )
            best = search.score.cpu().numpy()
            self.cv_scores_ = search.cv_scores.cpu().numpy()
            self.best_score_ = float(best[0]) if one else best
            warn_edges(search.alpha.cpu().numpy(), best, alphas)
            penalties, centres = search.penalties, weights[search.gamma].T
        else:
            centres = weights.T.expand(n_spaces, Yt.shape[1])
            penalties = grid / centres
        coef, intercept = banded_fit(Xt, Yt, columns, penalties, centres=centres, **options)
        self._set_weights(coef.cpu().numpy(), intercept.cpu().numpy(), one)
        self.alphas_ = penalties.cpu().numpy()[:, 0] if one else penalties.cpu().numpy()
        return self
