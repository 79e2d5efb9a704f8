"""Ridge regression in the eigenbasis of the training data, as pure functions on torch tensors.

One factorisation of X serves every target and every alpha. The smaller of X'X and XX' is
factorised, in float64; the products with the targets keep the dtype of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainalign.errors import ConfigError

__all__ = [
    "Design",
    "Factors",
    "choose_alpha",
    "eigh",
    "factorise",
    "ridge_fit",
    "split_indices",
    "target_batches",
]

logger = logging.getLogger(__name__)

#: Elements of the largest temporary array when the number of targets in flight is not given: what
#: stays in a CPU's cache (a third of the time of 2**25), or keeps a GPU busy.
BATCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
#: Fewest targets in flight: products with fewer columns are slow whatever the rows.
LEAST_TARGETS = 256
#: Rows of a Gram matrix that are cast to float64 at once.
GRAM_ROWS = 4096
#: Largest error of a float64 prediction, as a share of the norm of the responses, that squaring X
#: may bring; above it the singular vectors of X itself are used.
SQUARING = 1e-9


class Design:
    """Training data of many targets, centred, with its Gram matrices formed at most once each.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        float32 or float64, finite.
    fit_intercept : bool
        Centre X by its mean.

    Attributes
    ----------
    X : Tensor, shape (n_samples, n_features)
        Centred if there is an intercept.
    mean : Tensor, shape (n_features,)
        What was subtracted; zeros without an intercept.
    """

    def __init__(self, X: Tensor, *, fit_intercept: bool = True) -> None:
        self.mean = (
            X.mean(dim=0, dtype=torch.float64).to(X.dtype)
            if fit_intercept
            else X.new_zeros(X.shape[1])
        )
        self.X = X - self.mean if fit_intercept else X
        self.centred = fit_intercept

    @cached_property
    def gram(self) -> Tensor:
        """X'X (n_features, n_features), float64."""
        return gram(self.X)

    @cached_property
    def kernel(self) -> Tensor:
        """XX' (n_samples, n_samples), float64."""
        return gram(self.X.T)

    def factors(self, least: Tensor | float | None = None) -> Factors:
        """Factorise for penalties of at least `least`; see `factorise`."""
        n, p = self.X.shape
        primal = n > p + int(self.centred)
        values, vectors = eigh(self.gram) if primal else kernel_eigh(self.kernel, self.centred)
        right = None
        if squaring_costs(self.X, values, least):
            values, vectors, right = singular(self.X, primal, self.centred)
        vectors = vectors.to(self.X.dtype)
        left = self.X @ vectors if primal else vectors
        return Factors(self.X, self.mean, values, vectors, left, primal, self.centred, right)


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
    right : Tensor, shape (n_features, n_components), optional
        X'U in kernel form, where it is at hand more exactly than from this product.
    """

    X: Tensor
    mean: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    left: Tensor
    primal: bool
    centred: bool
    right: Tensor | None = None

    def rotate(self, Y: Tensor) -> Tensor:
        """Put targets (n_samples, n_targets) into the eigenbasis: (n_components, n_targets)."""
        return self.left.T @ Y

    def project(self, X_new: Tensor) -> Tensor:
        """Centre new rows (n_new, n_features) and put them into the eigenbasis."""
        X_new = X_new - self.mean
        right = self.vectors if self.primal else self.right
        return (X_new @ self.X.T) @ self.vectors if right is None else X_new @ right

    def weights(self, rotated: Tensor, alpha: Tensor) -> Tensor:
        """Coefficients in the eigenbasis: `rotated` / (l + alpha), one alpha per target."""
        return rotated / (self.eigenvalues[:, None] + alpha[None, :]).to(rotated.dtype)

    def coefficients(self, weights: Tensor) -> Tensor:
        """Coefficients (n_targets, n_features) from those in the eigenbasis."""
        right = self.vectors if self.primal else self.right
        return (self.vectors @ weights).T @ self.X if right is None else weights.T @ right.T

    @cached_property
    def rank(self) -> int:
        """Number of directions that X spans, to float64 rounding of its largest eigenvalue."""
        n, p = self.X.shape
        if not len(self.eigenvalues):
            return 0
        floor = self.eigenvalues.max() * max(n, p) * torch.finfo(torch.float64).eps
        return int((self.eigenvalues > floor).sum())

    def orthonormal(self) -> tuple[Tensor, Tensor]:
        """U in the dtype of X and its eigenvalues, without the directions that X does not span.

        The kernel form keeps these directions (eigenvalue 0): its U spans all that is orthogonal
        to the intercept.
        """
        if not self.primal:
            return self.left, self.eigenvalues
        values = self.eigenvalues[len(self.eigenvalues) - self.rank :]
        left = self.left[:, len(self.eigenvalues) - self.rank :]
        return (left / values.sqrt()).to(left.dtype), values


def factorise(
    X: Tensor, *, fit_intercept: bool = True, least: Tensor | float | None = None
) -> Factors:
    """Factorise training data once for all targets and alphas.

    The form is chosen from the shape: primal where the features, and the intercept, cannot fit all
    samples, kernel otherwise. The Gram matrix and its eigenvectors are float64 whatever the data.
    Where X is float64 and the smallest penalty so small beside the largest eigenvalue that the
    rounding of the Gram matrix counts, the singular vectors of X replace them.

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        float32 or float64, finite.
    fit_intercept : bool
        Centre X by its mean.
    least : float, optional
        Smallest penalty that will be used.

    Returns
    -------
    Factors
    """
    return Design(X, fit_intercept=fit_intercept).factors(least)


def gram(X: Tensor) -> Tensor:
    """X'X in float64, from rows cast a few thousand at a time."""
    out = X.new_zeros((X.shape[1], X.shape[1]), dtype=torch.float64)
    for start in range(0, len(X), GRAM_ROWS):
        rows = X[start : start + GRAM_ROWS].double()
        out.addmm_(rows.T, rows)
    return out


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least 0 and ascending, and eigenvectors of a symmetric float64 matrix.

    A factorisation that fails on a GPU, by an error or by vectors that do not give the matrix
    back, is repeated on the CPU, which is logged.

    Parameters
    ----------
    matrix : Tensor, shape (n, n), float64
        Positive semi-definite up to rounding.

    Returns
    -------
    values : Tensor, shape (n,)
    vectors : Tensor, shape (n, n)
    """
    if _accelerated(matrix):
        try:
            values, vectors = torch.linalg.eigh(matrix)
            reason = _wrong(matrix, values, vectors)
        except torch.linalg.LinAlgError as error:
            reason = str(error)
        if not reason:
            return values.clamp(min=0), vectors
        logger.warning(
            "The eigendecomposition of a %d x %d matrix failed on %s (%s); repeated on the CPU.",
            *matrix.shape, matrix.device, reason,
        )  # fmt: skip
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.clamp(min=0).to(matrix.device), vectors.to(matrix.device)


def kernel_eigh(kernel: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Decompose XX'; without the constant direction where the rows of X are centred."""
    if not centred:
        return eigh(kernel)
    # The constant direction is lifted above all others and dropped, so that what remains is
    # orthogonal to it even where X has further null directions.
    size = torch.linalg.norm(kernel)
    lifted = kernel + torch.where(size > 0, size, 1.0) * 2 / len(kernel)
    values, vectors = eigh(lifted)
    return values[:-1], vectors[:, :-1]


def squaring_costs(X: Tensor, values: Tensor, least: Tensor | float | None) -> bool:
    """Whether the rounding of the Gram matrix with these eigenvalues counts; see `SQUARING`."""
    if X.dtype != torch.float64 or least is None or not len(values):
        return False
    return float(values.max()) * torch.finfo(torch.float64).eps > SQUARING * float(least)


def singular(X: Tensor, primal: bool, centred: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Squared singular values, ascending, and vectors in a form of `Factors`, without squaring X.

    The last is X'U in kernel form. There the constant direction is dropped if X is centred.
    """
    if centred and not primal:  # see `kernel_eigh`
        lift = X.new_full((len(X), 1), 2 * float(torch.linalg.norm(X)) or 1.0)
        left, size, right = torch.linalg.svd(torch.cat([X, lift], dim=1), full_matrices=False)
        left, size, right = left[:, 1:], size[1:], right[1:, :-1]
    else:
        left, size, right = torch.linalg.svd(X, full_matrices=False)
    left, size, right = left.flip(1), size.flip(0), right.T.flip(1)
    return (size.square(), right, None) if primal else (size.square(), left, right * size)


def target_batches(
    n_targets: int, rows: int, batch: int | None, device: torch.device
) -> Iterator[slice]:
    """Yield slices over the targets, `batch` at a time or as many as `BATCH_ELEMENTS` allow."""
    if batch is not None and batch < 1:
        raise ConfigError(f"target_batch is {batch}; expected at least 1, or None to choose.")
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
    f = factors or factorise(X, fit_intercept=fit_intercept, least=alpha.min())
    coef = X.new_empty((Y.shape[1], X.shape[1]))
    intercept = X.new_zeros(Y.shape[1])
    alpha = alpha.double()
    for t in target_batches(Y.shape[1], sum(X.shape), target_batch, X.device):
        y_mean = mean_rows(Y[:, t]) if f.centred else Y.new_zeros(Y[:, t].shape[1])
        weights = f.weights(f.rotate(Y[:, t] - y_mean), alpha[t])
        coef[t] = f.coefficients(weights)
        intercept[t] = y_mean - coef[t] @ f.mean
    return coef, intercept


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


def split_indices(
    split: tuple[Any, Any], n_samples: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a (train, test) pair of row numbers or masks as tensors of row numbers.

    Row numbers below 0 count from the end. Raise `ConfigError` for rows that are not there, masks
    of another length, or no training rows.
    """
    found = []
    for name, part in zip(("training", "validation"), split, strict=True):
        rows = np.asarray(part)
        if rows.dtype == bool and rows.shape == (n_samples,):
            rows = np.flatnonzero(rows)
        whole = rows.ndim == 1 and (rows.dtype.kind in "iu" or rows.size == 0)
        if not whole or ((rows < -n_samples) | (rows >= n_samples)).any():
            raise ConfigError(
                f"The {name} rows of a fold are {rows.dtype} of shape {rows.shape}; expected row "
                f"numbers below n_samples={n_samples}, or a mask of shape ({n_samples},)."
            )
        found.append(torch.as_tensor(rows.astype(np.int64) % n_samples, device=device))
    if not len(found[0]):
        raise ConfigError("A fold has no training rows.", "Use other folds.")
    return found[0], found[1]


def mean_rows(y: Tensor) -> Tensor:
    """Mean over the rows, summed in float64, in the dtype of `y`."""
    return y.mean(dim=0, dtype=torch.float64).to(y.dtype)


def sum_squares(y: Tensor) -> Tensor:
    """Sum of squares over the rows, in float64."""
    return y.square().sum(dim=0, dtype=torch.float64)


def constant_columns(y: Tensor) -> Tensor:
    """Which columns hold one value."""
    return (y == y[:1]).all(dim=0)


def _accelerated(matrix: Tensor) -> bool:
    return matrix.is_cuda


def _wrong(matrix: Tensor, values: Tensor, vectors: Tensor) -> str:
    """Say what is wrong with an eigendecomposition, tried on one vector; empty if nothing is."""
    if not bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        return "not finite"
    probe = torch.linspace(-1, 1, len(matrix), dtype=matrix.dtype, device=matrix.device).cos()
    error = torch.linalg.norm(matrix @ probe - vectors @ (values * (vectors.T @ probe)))
    size = torch.linalg.norm(matrix) * torch.linalg.norm(probe)
    return f"relative error {float(error / size):.1e}" if bool(error > 1e-9 * size) else ""
