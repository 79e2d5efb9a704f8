"""Ridge regression in the eigenbasis of the training data, as pure functions on torch tensors.

One factorisation of X serves every target and every alpha. The smaller of X'X and XX' is
factorised, in float64; the products with the targets keep the dtype of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainalign.errors import ConfigError

__all__ = [
    "Factors",
    "choose_alpha",
    "factorise",
    "resolve_device",
    "ridge_fit",
    "ridge_gcv",
    "ridge_kfold",
    "ridge_loo",
    "score_alphas",
    "split_indices",
    "target_batches",
]

#: Elements of the largest temporary array when the number of targets in flight is not given: what
#: stays in a CPU's cache (a third of the time of 2**25), or keeps a GPU busy.
BATCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
#: Fewest targets in flight: products with fewer columns are slow whatever the rows.
LEAST_TARGETS = 256


@dataclass(frozen=True)
class Factors:
    """Eigenvectors of centred training data, in primal (X'X) or kernel (XX') form.

    With ``X_c = U diag(sqrt(l)) V'`` the prediction for new rows and one alpha is
    ``project(X_new) @ (rotate(Y - mean(Y)) / (l + alpha)) + mean(Y)``.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Training data, centred if there is an intercept.
    mean : Tensor, shape (n_features,)
        What was subtracted; zeros without an intercept.
    eigenvalues : Tensor, shape (n_components,), float64
        ``l``, at least 0.
    vectors : Tensor
        V (n_features, n_components) in primal form, U (n_samples, n_components) in kernel form.
    left : Tensor, shape (n_samples, n_components)
        ``X_c V`` in primal form, U in kernel form.
    primal : bool
        The form.
    centred : bool
        Whether there is an intercept.
    """

    X: Tensor
    mean: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    left: Tensor
    primal: bool
    centred: bool

    def rotate(self, Y: Tensor) -> Tensor:
        """Put targets (n_samples, n_targets) into the eigenbasis: (n_components, n_targets)."""
        return self.left.T @ Y

    def project(self, X_new: Tensor) -> Tensor:
        """Centre new rows (n_new, n_features) and put them into the eigenbasis."""
        X_new = X_new - self.mean
        return X_new @ self.vectors if self.primal else (X_new @ self.X.T) @ self.vectors

    def weights(self, rotated: Tensor, alpha: Tensor) -> Tensor:
        """Coefficients in the eigenbasis: `rotated` / (l + alpha), one alpha per target."""
        return rotated / (self.eigenvalues[:, None] + alpha[None, :]).to(rotated.dtype)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Coefficients (n_targets, n_features) from those in the eigenbasis."""
        if self.primal:
            return weights.T @ self.vectors.T
        return (self.vectors @ weights).T @ self.X

    def orthonormal(self) -> tuple[Tensor, Tensor]:
        """U in float64 and its eigenvalues, without the directions that X does not span.

        The kernel form keeps these directions (eigenvalue 0): its U spans all that is orthogonal
        to the intercept.
        """
        left, values = self.left.double(), self.eigenvalues
        if not self.primal:
            return left, values
        n, p = self.X.shape
        keep = values > values.max().clamp(min=0) * max(n, p) * torch.finfo(torch.float64).eps
        return left[:, keep] / values[keep].sqrt(), values[keep]


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch sees no CUDA device.",
                          'Use device="cpu" or "auto".')  # fmt: skip
    return torch.device(device)


def factorise(X: Tensor, *, fit_intercept: bool = True) -> Factors:
    """Factorise training data once for all targets and alphas.

    The form is chosen from the shape: primal where there are at least as many samples as
    features, kernel otherwise. The Gram matrix and its eigenvectors are float64 whatever the data.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        float32 or float64, finite.
    fit_intercept : bool
        Centre X by its mean.

    Returns
    -------
    Factors
    """
    n, p = X.shape
    mean = X.mean(dim=0, dtype=torch.float64).to(X.dtype) if fit_intercept else X.new_zeros(p)
    X = X - mean
    double = X.double()
    if n >= p:
        values, vectors = torch.linalg.eigh(double.T @ double)
        vectors = vectors.to(X.dtype)
        return Factors(X, mean, values.clamp(min=0), vectors, X @ vectors, True, fit_intercept)
    gram = double @ double.T
    if fit_intercept:
        # The constant direction is lifted above all others and dropped, so that what remains is
        # orthogonal to it even where X has further null directions.
        gram += torch.linalg.norm(gram).clamp(min=1.0) * 2 / n
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[:-1], vectors[:, :-1]
    else:
        values, vectors = torch.linalg.eigh(gram)
    vectors = vectors.to(X.dtype)
    return Factors(X, mean, values.clamp(min=0), vectors, vectors, False, fit_intercept)


def target_batches(
    n_targets: int, rows: int, batch: int | None, device: torch.device
) -> Iterator[slice]:
    """Yield slices over the targets, `batch` at a time or as many as `BATCH_ELEMENTS` allow."""
    elements = BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS["cuda"])
    size = batch or max(LEAST_TARGETS, elements // max(1, rows))
    for start in range(0, n_targets, size):
        yield slice(start, min(start + size, n_targets))


def ridge_fit(
    X: Tensor,
    Y: Tensor,
    alpha: Tensor,
    *,
    fit_intercept: bool = True,
    factors: Factors | None = None,
    target_batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Fit ridge regression with one alpha per target.

    .. math:: \min_{w, b} \|y_t - X w_t - b_t\|^2 + \alpha_t \|w_t\|^2

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Training data.
    Y : Tensor, shape (n_samples, n_targets)
        Targets.
    alpha : Tensor, shape (n_targets,)
        Penalty of each target, above 0.
    fit_intercept : bool
        Fit ``b``, which is not penalised.
    factors : Factors, optional
        ``factorise(X)``, if it is at hand.
    target_batch : int, optional
        Targets in flight.

    Returns
    -------
    coef : Tensor, shape (n_targets, n_features)
    intercept : Tensor, shape (n_targets,)

    References
    ----------
    Hoerl & Kennard (1970), Technometrics 12, 55-67.
    """
    f = factors or factorise(X, fit_intercept=fit_intercept)
    coef = X.new_empty((Y.shape[1], X.shape[1]))
    intercept = X.new_zeros(Y.shape[1])
    alpha = alpha.double()
    for t in target_batches(Y.shape[1], sum(X.shape), target_batch, X.device):
        y_mean = _mean(Y[:, t]) if f.centred else Y.new_zeros(Y[:, t].shape[1])
        weights = f.weights(f.rotate(Y[:, t] - y_mean), alpha[t])
        coef[t] = f.coefficients(weights)
        intercept[t] = y_mean - coef[t] @ f.mean
    return coef, intercept


def ridge_kfold(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    splits: Sequence[tuple[Any, Any]],
    *,
    fit_intercept: bool = True,
    target_batch: int | None = None,
) -> Tensor:
    r"""Score a grid of alphas by cross-validation.

    .. math:: R^2_{\alpha t} = \frac1K \sum_k 1 -
              \frac{\|y_{kt} - \hat y_{kt}(\alpha)\|^2}{\|y_{kt} - \bar y_{kt}\|^2}

    The intercept is fitted inside each training fold. A target that is constant in a validation
    fold is scored over the other folds; NaN if it is constant in all of them.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Data.
    Y : Tensor, shape (n_samples, n_targets)
        Targets.
    alphas : Tensor, shape (n_alphas,)
        Penalties, above 0.
    splits : sequence of (train, test)
        Row indices; every test set has at least two rows.
    fit_intercept : bool
        Fit an intercept.
    target_batch : int, optional
        Targets in flight.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
        Mean R^2 over the folds.

    Raises
    ------
    ConfigError
        If a validation fold has fewer than two rows.
    """
    pairs = [split_indices(s, X.device) for s in splits]
    for k, (_, test) in enumerate(pairs):
        if len(test) < 2:
            raise ConfigError(
                f"Validation fold {k} has {len(test)} row(s); R^2 needs at least two.",
                'Use fewer folds, or cv="loo" for leave-one-out.',
            )
    total = torch.zeros((len(alphas), Y.shape[1]), dtype=torch.float64, device=Y.device)
    count = torch.zeros(Y.shape[1], dtype=torch.float64, device=Y.device)
    for train, test in pairs:
        f = factorise(X[train], fit_intercept=fit_intercept)
        projected = f.project(X[test])
        for t in target_batches(Y.shape[1], len(X) + len(f.eigenvalues), target_batch, X.device):
            y = Y[:, t]
            scores, defined = fold_scores(f, projected, y[train], y[test], alphas)
            total[:, t] += torch.where(defined, scores, torch.zeros_like(scores))
            count[t] += defined
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def fold_scores(
    factors: Factors, projected: Tensor, y_train: Tensor, y_test: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """R^2 of every alpha and target in one validation fold, and where it is defined.

    Returns
    -------
    scores : Tensor, shape (n_alphas, n_targets), float64
    defined : Tensor of bool, shape (n_targets,)
        False for targets that are constant in the fold.
    """
    y_mean = _mean(y_train) if factors.centred else y_train.new_zeros(y_train.shape[1])
    rotated = factors.rotate(y_train - y_mean)
    residual_total = _sum_squares(y_test - _mean(y_test))
    defined = ~_constant(y_test)
    target = y_test - y_mean
    scores = torch.empty((len(alphas), y_test.shape[1]), dtype=torch.float64, device=y_test.device)
    for a, alpha in enumerate(alphas.double()):
        shrunk = projected / (factors.eigenvalues + alpha).to(rotated.dtype)
        scores[a] = 1 - _sum_squares(target - shrunk @ rotated) / residual_total
    return scores, defined


def ridge_loo(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    *,
    fit_intercept: bool = True,
    factors: Factors | None = None,
    target_batch: int | None = None,
) -> Tensor:
    r"""Score a grid of alphas by exact leave-one-out, from one fit.

    .. math:: e_i = \frac{y_i - \hat y_i}{1 - h_{ii}}, \qquad
              R^2 = 1 - \frac{\sum_i e_i^2}{\sum_i (y_i - \bar y)^2}

    with ``h`` the hat matrix, the intercept included.

    Parameters
    ----------
    X, Y, alphas, fit_intercept, target_batch
        As in `ridge_kfold`.
    factors : Factors, optional
        ``factorise(X)``, if it is at hand.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
        Leave-one-out R^2; NaN for constant targets.

    References
    ----------
    Golub, Heath & Wahba (1979), Technometrics 21, 215-223, eq. 1.4.
    """
    f = factors or factorise(X, fit_intercept=fit_intercept)
    U, shrink, outside = _residual_maker(f, alphas)
    n = len(X)
    constant = 1.0 / n if fit_intercept else 0.0
    squared = U.square()
    spanned = squared.sum(dim=1)
    leftover = (1 - constant - spanned).clamp(min=0) if outside else torch.zeros_like(spanned)
    diagonal = leftover[:, None] + squared @ shrink.T  # (n, alphas): 1 - h_ii
    U = U.to(Y.dtype)

    def score(y: Tensor) -> Tensor:
        rotated = U.T @ y
        rest = y - U @ rotated if outside else None
        error = []
        for a in range(len(alphas)):
            residual = U @ (shrink[a].to(y.dtype)[:, None] * rotated)
            if rest is not None:
                residual = residual + rest
            error.append(_sum_squares(residual / diagonal[:, a, None].to(y.dtype)))
        return torch.stack(error)

    return _closed_form(score, Y, alphas, fit_intercept, target_batch)


def ridge_gcv(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    *,
    fit_intercept: bool = True,
    factors: Factors | None = None,
    target_batch: int | None = None,
) -> Tensor:
    r"""Score a grid of alphas by generalised cross-validation, without forming predictions.

    .. math:: \mathrm{GCV}(\alpha) = \frac{\|(I - H_\alpha) y\|^2}
              {(\mathrm{tr}(I - H_\alpha) / n)^2}, \qquad
              R^2 = 1 - \frac{\mathrm{GCV}}{\|y - \bar y\|^2}

    Parameters
    ----------
    X, Y, alphas, fit_intercept, target_batch
        As in `ridge_kfold`.
    factors : Factors, optional
        ``factorise(X)``, if it is at hand.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
        NaN for constant targets.

    References
    ----------
    Golub, Heath & Wahba (1979), Technometrics 21, 215-223, eq. 1.3.
    """
    f = factors or factorise(X, fit_intercept=fit_intercept)
    U, shrink, outside = _residual_maker(f, alphas)
    n = len(X)
    free = n - int(fit_intercept) - U.shape[1] if outside else 0
    trace = (free + shrink.sum(dim=1)) / n

    def score(y: Tensor) -> Tensor:
        rotated = (U.to(y.dtype).T @ y).double().square()
        error = shrink.square() @ rotated
        if outside:
            error = error + (_sum_squares(y) - rotated.sum(dim=0)).clamp(min=0)
        return error / trace.square()[:, None]

    return _closed_form(score, Y, alphas, fit_intercept, target_batch)


def score_alphas(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    cv: str | Sequence[tuple[Any, Any]],
    *,
    fit_intercept: bool = True,
    factors: Factors | None = None,
    target_batch: int | None = None,
) -> Tensor:
    """Score a grid of alphas by `ridge_loo` ("loo"), `ridge_gcv` ("gcv") or `ridge_kfold` (splits).

    Parameters
    ----------
    X, Y, alphas, fit_intercept, target_batch
        As in `ridge_kfold`.
    cv : "loo", "gcv" or sequence of (train, test)
        How to score.
    factors : Factors, optional
        ``factorise(X)``, if it is at hand; folds have their own.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
    """
    options: dict[str, Any] = {"fit_intercept": fit_intercept, "target_batch": target_batch}
    if isinstance(cv, str):
        closed = {"loo": ridge_loo, "gcv": ridge_gcv}
        if cv not in closed:
            raise ConfigError(
                f"cv is {cv!r}; expected a number of folds, a splitter, a list of (train, test), "
                '"loo" or "gcv".'
            )
        if len(X) < 3:
            raise ConfigError(f"cv={cv!r} needs at least 3 samples; n_samples={len(X)}.")
        return closed[cv](X, Y, alphas, factors=factors, **options)
    return ridge_kfold(X, Y, alphas, cv, **options)


def choose_alpha(scores: Tensor, alphas: Tensor, *, per_target: bool = True) -> Tensor:
    """Index of the best alpha of each target; the largest alpha where no score is defined.

    Parameters
    ----------
    scores : Tensor, shape (n_alphas, n_targets)
        Higher is better.
    alphas : Tensor, shape (n_alphas,)
        The grid.
    per_target : bool
        If False, one alpha for all: the best mean over the targets with a score.

    Returns
    -------
    Tensor of int, shape (n_targets,)
    """
    undefined = torch.isnan(scores).any(dim=0)
    if not per_target:
        mean = scores[:, ~undefined].mean(dim=1)
        best = alphas.argmax() if undefined.all() else mean.argmax()
        return best.expand(scores.shape[1]).clone()
    best = scores.nan_to_num(nan=-torch.inf).argmax(dim=0)
    return torch.where(undefined, alphas.argmax(), best)


def split_indices(split: tuple[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a (train, test) pair of indices or masks as index tensors."""
    train, test = (np.asarray(s) for s in split)
    train, test = (np.flatnonzero(s) if s.dtype == bool else s for s in (train, test))
    return (
        torch.as_tensor(train.astype(np.int64), device=device),
        torch.as_tensor(test.astype(np.int64), device=device),
    )


def _residual_maker(f: Factors, alphas: Tensor) -> tuple[Tensor, Tensor, bool]:
    """U, alpha / (l + alpha) per alpha, and whether there are directions outside U.

    In kernel form U spans everything but the intercept, and residuals are formed without the
    cancellation of ``1 - h`` where the fit nearly interpolates.
    """
    U, values = f.orthonormal()
    alphas = alphas.double()[:, None]
    return U, alphas / (values[None, :] + alphas), f.primal


def _closed_form(
    score: Callable[[Tensor], Tensor],
    Y: Tensor,
    alphas: Tensor,
    fit_intercept: bool,
    target_batch: int | None,
) -> Tensor:
    out = torch.empty((len(alphas), Y.shape[1]), dtype=torch.float64, device=Y.device)
    for t in target_batches(Y.shape[1], 4 * len(Y), target_batch, Y.device):
        y = Y[:, t]
        total = _sum_squares(y - _mean(y))
        result = 1 - score(y - _mean(y) if fit_intercept else y) / total
        out[:, t] = torch.where(_constant(y), torch.nan, result)
    return out


def _mean(y: Tensor) -> Tensor:
    return y.mean(dim=0, dtype=torch.float64).to(y.dtype)


def _sum_squares(y: Tensor) -> Tensor:
    return y.square().sum(dim=0, dtype=torch.float64)


def _constant(y: Tensor) -> Tensor:
    return (y == y[:1]).all(dim=0)
