r"""Scores of a whole grid of alphas at the cost of a few, as pure functions on torch tensors.

In the eigenbasis of X the prediction for one alpha is :math:`P (\phi_\alpha \circ z)` with
:math:`\phi_\alpha = 1 / (\lambda + \alpha)`. The vectors :math:`\phi_\alpha` of a whole grid lie,
to a tolerance, in a space of few dimensions: an SVD of the grid gives vectors u_a with
:math:`\phi_\alpha = \sum_a c_{\alpha a} u_a`. So one product per dimension, and not per alpha,
gives :math:`S_a = P (u_a \circ z)`, and each alpha's squared error follows from the small matrix
:math:`M = S S'` of a target:

.. math:: \|y - P (\phi_\alpha \circ z)\|^2
          = \|y\|^2 - 2 \sum_i \phi_{\alpha i} z_i (P' y)_i + c_\alpha' M c_\alpha
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from brainalign.errors import ConfigError
from brainalign.linear.solvers import (
    Design,
    Factors,
    choose_alpha,
    constant_columns,
    eigh,
    factorise,
    gram,
    kernel_eigh,
    mean_rows,
    singular,
    split_indices,
    squaring_costs,
    sum_squares,
    target_batches,
)

__all__ = [
    "TOLERANCE",
    "RidgeSolver",
    "Solution",
    "compress",
    "ridge_gcv",
    "ridge_kfold",
    "ridge_loo",
    "score_alphas",
]

logger = logging.getLogger(__name__)

#: Largest error of a prediction by the compressed grid, as a share of the norm of the responses.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
#: Elements of the scaled copies of the targets in flight: what stays in a CPU's cache.
COPIES = {"cpu": 2**21, "cuda": 2**27}
#: Leave-one-out divides residuals by what each row keeps of itself. Where the
#: square of that is this many times smaller than usual, rounding decides: float64 is used.
UNEVEN = 10.0
#: Rows of the triangle that are multiplied at once.
BLOCK = 256


@dataclass(frozen=True)
class Solution:
    """Targets with their scores and the alphas chosen by them.

    Parameters
    ----------
    scores : Tensor, shape (n_alphas, n_targets), float64
        R^2 of each alpha; empty along the first axis if the grid holds one alpha.
    index : Tensor of int, shape (n_targets,)
        Place of the chosen alpha in the grid.
    rotated : Tensor, shape (n_components, n_targets)
        The centred targets in the eigenbasis of the whole training data.
    mean : Tensor, shape (n_targets,)
        Mean of the targets; zeros without an intercept.
    """

    scores: Tensor
    index: Tensor
    rotated: Tensor
    mean: Tensor


class _Scorer(Protocol):
    def __call__(self, y: Tensor, y_raw: Tensor) -> tuple[Tensor, Tensor | None]: ...


class RidgeSolver:
    r"""Ridge regression of any number of targets on one X: all that targets share is done once.

    .. math:: \min_{w, b} \|y_t - X w_t - b_t\|^2 + \alpha_t \|w_t\|^2

    Parameters
    ----------
    X : Tensor, shape (n_samples, n_features)
        Training data, on the device of the computation.
    alphas : Tensor, shape (n_alphas,)
        The grid, all above 0. One value is used as it is.
    cv : "loo", "gcv" or sequence of (train, test)
        How alphas are scored.
    fit_intercept : bool
        Fit ``b``, inside each training fold too.
    tolerance : float, optional
        See `TOLERANCE`, which it replaces.

    Attributes
    ----------
    factors : Factors
        Of all of X.

    Raises
    ------
    ConfigError
        For folds or a number of samples that cannot be scored.
    """

    def __init__(
        self,
        X: Tensor,
        alphas: Tensor,
        cv: str | Sequence[tuple[Any, Any]],
        *,
        fit_intercept: bool = True,
        tolerance: float | None = None,
    ) -> None:
        design = Design(X, fit_intercept=fit_intercept)
        self.alphas = alphas.to(X.device, torch.float64)
        self.factors = design.factors(self.alphas.min())
        self._score = (
            _scorer(design, self.factors, self.alphas, cv, tolerance) if len(alphas) > 1 else None
        )

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        """Yield slices over the targets, of a size that suits the device."""
        return target_batches(n_targets, sum(self.factors.X.shape), batch, self.factors.X.device)

    def solve(self, Y: Tensor, *, index: Tensor | None = None) -> Solution:
        """Score the grid on some targets, choose, and rotate them for `Factors.weights`.

        Parameters
        ----------
        Y : Tensor, shape (n_samples, n_targets)
            A batch of targets.
        index : Tensor of int, shape (n_targets,), optional
            Alphas chosen elsewhere: no scores are computed.
        """
        f = self.factors
        y, mean = _centred(Y, f.centred)
        rotated: Tensor | None = None
        if self._score is None or index is not None:
            scores = torch.empty((0, Y.shape[1]), dtype=torch.float64, device=Y.device)
            if index is None:
                index = torch.zeros(Y.shape[1], dtype=torch.int64, device=Y.device)
        else:
            scores, rotated = self._score(y, Y)
            index = choose_alpha(scores, self.alphas)
        if rotated is None:
            rotated = f.rotate(y)
        return Solution(scores, index, rotated, mean)

    def weights(self, solution: Solution) -> Tensor:
        """Coefficients in the eigenbasis (n_components, n_targets) at the chosen alphas."""
        return self.factors.weights(solution.rotated, self.alphas[solution.index])

    def coefficients(self, solution: Solution) -> tuple[Tensor, Tensor]:
        """Coefficients (n_targets, n_features) and intercepts (n_targets,)."""
        coef = self.factors.coefficients(self.weights(solution))
        return coef, solution.mean - coef @ self.factors.mean


def compress(profile: Tensor, weight: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    r"""Basis of few vectors for the columns of a matrix, to a tolerance.

    .. math:: \max_{ij} \; weight_i \; |profile_{ij} - \sum_a basis_{ai} \, mix_{ja}|
              \le tolerance

    Parameters
    ----------
    profile : Tensor, shape (n_components, n_columns), float64
        One column per alpha.
    weight : Tensor, shape (n_components,), float64
        At least 0: how much an error at each component matters.
    tolerance : float
        Absolute.

    Returns
    -------
    basis : Tensor, shape (n_basis, n_components), float64
    mix : Tensor, shape (n_columns, n_basis), float64
        The identity, with the columns themselves as basis, if no smaller basis will do.
    """
    whole = profile.T.contiguous(), torch.eye(profile.shape[1]).to(profile)
    weighted = weight[:, None] * profile
    left, size, right = torch.linalg.svd(weighted.cpu(), full_matrices=False)
    left, mix = left.to(profile), (size[:, None] * right).T.to(profile)
    rest = weighted.clone()
    inverse = torch.where(weight > 0, 1 / weight, 0.0)
    for r in range(min(left.shape[1], profile.shape[1] - 1)):
        rest -= left[:, r, None] * mix[None, :, r]
        if bool(rest.abs().max() <= tolerance):
            return left[:, : r + 1].T * inverse, mix[:, : r + 1].contiguous()
    return whole


def ridge_kfold(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    splits: Sequence[tuple[Any, Any]],
    *,
    fit_intercept: bool = True,
    target_batch: int | None = None,
    tolerance: float | None = None,
) -> Tensor:
    r"""Score a grid of alphas by cross-validation.

    .. math:: R^2_{\alpha t} = \frac1K \sum_k 1 -
              \frac{\|y_{kt} - \hat y_{kt}(\alpha)\|^2}{\|y_{kt} - \bar y_{kt}\|^2}

    The intercept is fitted inside each training fold. A target that is constant in a validation
    fold is scored over the other folds; NaN if it is constant in all of them. The Gram matrix of a
    training fold is the whole one minus that of the rows left out.

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
    tolerance : float, optional
        Of the predictions, as a share of the norm of the responses; by default `TOLERANCE`.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
        Mean R^2 over the folds.

    Raises
    ------
    ConfigError
        If a validation fold has fewer than two rows.
    """
    design = Design(X, fit_intercept=fit_intercept)
    scorer = _KFold(design, alphas.to(X.device, torch.float64), splits, tolerance)
    return _all_scores(scorer, Y, len(alphas), fit_intercept, sum(X.shape), target_batch)


def ridge_loo(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    *,
    fit_intercept: bool = True,
    factors: Factors | None = None,
    target_batch: int | None = None,
    tolerance: float | None = None,
) -> Tensor:
    r"""Score a grid of alphas by exact leave-one-out, from one fit.

    .. math:: e_i = \frac{y_i - \hat y_i}{1 - h_{ii}}, \qquad
              R^2 = 1 - \frac{\sum_i e_i^2}{\sum_i (y_i - \bar y)^2}

    with ``h`` the hat matrix, the intercept included.

    Parameters
    ----------
    X, Y, alphas, fit_intercept, target_batch, tolerance
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
    f = factors or factorise(X, fit_intercept=fit_intercept, least=alphas.min())
    scorer = _LeaveOneOut(f, alphas.to(X.device, torch.float64), tolerance)
    return _all_scores(scorer, Y, len(alphas), fit_intercept, sum(X.shape), target_batch)


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
    f = factors or factorise(X, fit_intercept=fit_intercept, least=alphas.min())
    scorer = _Generalised(f, alphas.to(X.device, torch.float64))
    return _all_scores(scorer, Y, len(alphas), fit_intercept, sum(X.shape), target_batch)


def score_alphas(
    X: Tensor,
    Y: Tensor,
    alphas: Tensor,
    cv: str | Sequence[tuple[Any, Any]],
    *,
    fit_intercept: bool = True,
    target_batch: int | None = None,
) -> Tensor:
    """Score a grid of alphas by `ridge_loo` ("loo"), `ridge_gcv` ("gcv") or `ridge_kfold` (splits).

    Parameters
    ----------
    X, Y, alphas, fit_intercept, target_batch
        As in `ridge_kfold`.
    cv : "loo", "gcv" or sequence of (train, test)
        How to score.

    Returns
    -------
    Tensor, shape (n_alphas, n_targets), float64
    """
    options: dict[str, Any] = {"fit_intercept": fit_intercept, "target_batch": target_batch}
    if isinstance(cv, str):
        closed = {"loo": ridge_loo, "gcv": ridge_gcv}
        _check_closed(cv, len(X))
        return closed[cv](X, Y, alphas, **options)
    return ridge_kfold(X, Y, alphas, cv, **options)


class _KFold:
    """R^2 of every alpha, averaged over folds."""

    def __init__(
        self,
        design: Design,
        alphas: Tensor,
        splits: Sequence[tuple[Any, Any]],
        tolerance: float | None,
        factors: Factors | None = None,
    ) -> None:
        X = design.X
        pairs = [split_indices(s, len(X), X.device) for s in splits]
        if not pairs:
            raise ConfigError("cv makes no folds.", "Give at least one (train, test) pair.")
        for k, (_, test) in enumerate(pairs):
            if len(test) < 2:
                raise ConfigError(
                    f"Validation fold {k} has {len(test)} row(s); R^2 needs at least two.",
                    'Use fewer folds, or cv="loo" for leave-one-out.',
                )
        if tolerance is None:
            tolerance = TOLERANCE[X.dtype] * _varying(design)
        self.folds = [_Fold(design, train, test, alphas, tolerance) for train, test in pairs]
        self.X = X
        self.factors = factors
        self.n_alphas = len(alphas)
        removed = [f.removed for f in self.folds if f.primal and f.removed is not None]
        self.any_primal = any(f.primal for f in self.folds)
        self.partition = (
            len(removed) == len(self.folds)
            and sum(map(len, removed)) == len(X)
            and len(torch.cat(removed).unique()) == len(X)
        )

    def __call__(self, y: Tensor, y_raw: Tensor) -> tuple[Tensor, Tensor | None]:
        total = None
        crosses = [
            _take(y, f.removed).T @ _take(self.X, f.removed)
            if f.primal and f.removed is not None
            else None
            for f in self.folds
        ]
        if self.partition:
            total = torch.stack([c for c in crosses if c is not None]).sum(dim=0)
        elif self.any_primal:
            total = y.T @ self.X
        score = torch.zeros((self.n_alphas, y.shape[1]), dtype=torch.float64, device=y.device)
        count = torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
        for f, cross in zip(self.folds, crosses, strict=True):
            r2, defined = f.score(self.X, y, y_raw, total, cross)
            score += torch.where(defined, r2, 0.0)
            count += defined
        rotated = None
        if total is not None and self.factors is not None and self.factors.primal:
            rotated = (total @ self.factors.vectors).T
        return torch.where(count > 0, score / count.clamp(min=1), torch.nan), rotated


def _varying(design: Design) -> float:
    """How much of X varies over the rows, at least a hundredth: 1 if it is centred.

    Where it is little, so may be that of the responses which X predicts, and a tolerance that is a
    share of their norm is large beside what they differ by.
    """
    total = float(sum_squares(design.X).sum())
    if design.centred or not total:
        return 1.0
    mean = design.X.mean(dim=0, dtype=torch.float64)
    varying = 1 - len(design.X) * float(mean.square().sum()) / total
    return max(varying, 1e-4) ** 0.5


class _Fold:
    """One validation fold: what all targets share."""

    def __init__(
        self, design: Design, train: Tensor, test: Tensor, alphas: Tensor, tolerance: float
    ) -> None:
        X, self.centred = design.X, design.centred
        n, p = X.shape
        self.train, self.test = train, test
        inside = torch.zeros(n, dtype=torch.bool, device=X.device)
        inside[train] = True
        removed = torch.nonzero(~inside)[:, 0]
        #: Rows to subtract from the whole; None if adding up the training rows is cheaper, or if
        #: some of them stand there more than once.
        whole = len(train) + len(removed) == n
        self.removed = removed if whole and len(removed) <= len(train) else None
        self.same = self.removed is not None and torch.equal(self.removed, test.sort().values)
        self.primal = len(train) > p + int(self.centred)
        n_train, n_test = len(train), len(test)
        mean = mean_rows(X[train]) if self.centred else X.new_zeros(p)
        self.mean = mean
        if self.primal:
            g = gram(X[train]) if self.removed is None else design.gram - gram(X[self.removed])
            if self.centred:
                m = X[train].mean(dim=0, dtype=torch.float64)
                g = g - n_train * torch.outer(m, m)
            values, vectors = eigh(g)
        else:
            k = design.kernel[train][:, train]
            across = design.kernel[test][:, train]
            if self.centred:
                means = k.mean(dim=0)
                across = across - across.mean(dim=1, keepdim=True) - means + means.mean()
                k = k - means - means[:, None] + means.mean()
            values, vectors = kernel_eigh(k, self.centred)
        right = None
        if squaring_costs(X, values, alphas.min()):
            values, vectors, right = singular(X[train] - mean, self.primal, self.centred)
        self.vectors = vectors.to(X.dtype)
        if self.primal:
            projected = (X[test] - mean) @ self.vectors
            size = values.sqrt()
        else:
            projected = (
                (across @ vectors).to(X.dtype) if right is None else (X[test] - mean) @ right
            )
            size = torch.ones_like(values)
        norm = projected.double().square().sum(dim=0).sqrt()
        profile = 1 / (values[:, None] + alphas)
        # The rotated targets are at most size * |y|, so this is the effect on a prediction.
        weight = norm * size * (n_train / n_test) ** 0.5
        basis, mix = compress(profile, weight, tolerance)
        self.profile = profile.to(X.dtype)
        self.basis = basis.to(X.dtype)
        self.mixes = (mix[:, :, None] * mix[:, None, :]).flatten(1).T.contiguous()
        self.triangle = _triangle(projected)
        #: In primal form with many test rows, P'y comes cheaper from X'y.
        self.from_cross = self.primal and self.same and n_test >= p
        self.test_sum = X[test].sum(dim=0) if self.from_cross else None
        self.projected = None if self.from_cross else projected

    def score(
        self, X: Tensor, y: Tensor, y_raw: Tensor, total: Tensor | None, cross: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """R^2 (n_alphas, n_targets) and where it is defined.

        `y` is centred by its whole mean; `cross` is y'X of the removed rows, `total` of all.
        """
        y_test = _take(y, self.test)
        n_train = len(self.train)
        if not self.centred:
            mean = y.new_zeros(y.shape[1])
        elif self.removed is None:
            mean = mean_rows(_take(y, self.train))
        else:
            left_out = y_test if self.same else _take(y, self.removed)
            summed = y.sum(dim=0, dtype=torch.float64) - left_out.sum(dim=0, dtype=torch.float64)
            mean = (summed / n_train).to(y.dtype)
        if not self.primal:
            z = _take(y, self.train).T @ self.vectors
        else:
            if cross is None or total is None:
                inside = _take(y, self.train).T @ _take(X, self.train)
            else:
                inside = total - cross
            if self.centred:
                inside = inside.addr(mean, self.mean, alpha=-n_train)
            z = inside @ self.vectors
        target = y_test - mean if self.centred else y_test
        if self.from_cross and cross is not None and self.test_sum is not None:
            if self.centred:
                outside = cross.addr(mean, self.test_sum, alpha=-1)
                outside = outside.addr(target.sum(dim=0), self.mean, alpha=-1)
            else:
                outside = cross
            c = outside @ self.vectors
        elif self.projected is not None:
            c = target.T @ self.projected
        quadratic = self._quadratic(z)
        linear = (c.mul_(z) @ self.profile).double().T
        error = (sum_squares(target) - 2 * linear + quadratic).clamp(min=0)
        spread = sum_squares(y_test - mean_rows(y_test))
        return 1 - error / spread, ~constant_columns(_take(y_raw, self.test))

    def _quadratic(self, z: Tensor) -> Tensor:
        """Squared norm of the prediction (n_alphas, n_targets), float64."""
        r, q = self.basis.shape
        out = torch.empty((self.mixes.shape[1], len(z)), dtype=torch.float64, device=z.device)
        step = _copies(r * q, z.device)
        for start in range(0, len(z), step):
            part = z[start : start + step]
            copies = (part[:, None, :] * self.basis).view(-1, q)
            small = z.new_zeros((len(part), r, r))
            for first, rows in self.triangle:
                product = (copies[:, first:] @ rows.T).view(len(part), r, -1)
                small.baddbmm_(product, product.transpose(1, 2))
            out[:, start : start + step] = (small.double().flatten(1) @ self.mixes).T
        return out


class _LeaveOneOut:
    r"""Exact leave-one-out R^2 of every alpha.

    With :math:`\bar w_\alpha` the mean over the rows of :math:`1 / (1 - h_{ii})^2`,

    .. math:: \sum_i e_i^2 = \bar w_\alpha \Big( \|r\|^2
              + \sum_i \delta_{\alpha i} r_i^2 \Big)

    where r are the residuals of the fit to all rows. Their norm follows from the rotated targets
    without forming them, as in generalised cross-validation; they are formed, in a compressed
    grid, only for what sets the rows apart.
    """

    def __init__(self, f: Factors, alphas: Tensor, tolerance: float | None) -> None:
        X, left, values = f.X, f.left, f.eigenvalues[:, None]
        tolerance = TOLERANCE[X.dtype] if tolerance is None else tolerance
        self.primal, self.left = f.primal, left
        self.exact: _LeaveOneOut | None = None
        squared = left.double().square()
        if f.primal:
            constant = 1 / len(X) if f.centred else 0.0
            kept = 1 - constant - squared @ (1 / (values + alphas))
            floor = len(X) * torch.finfo(torch.float64).eps
            kept = kept.clamp(min=floor)
        else:
            kept = squared @ (alphas / (values + alphas))
        division = kept.reciprocal().square()
        mean = division.mean(dim=0)
        rounding = torch.finfo(X.dtype).eps
        uneven = float((division / kept.mean(dim=0).reciprocal().square()).max())
        if X.dtype == torch.float32 and (
            uneven > UNEVEN or (f.primal and float(mean.max()) * rounding > TOLERANCE[X.dtype])
        ):
            logger.info("Leave-one-out in float64: some rows decide their own prediction.")
            wide = Design(X.double(), fit_intercept=f.centred).factors()
            self.exact = _LeaveOneOut(wide, alphas, None)
            return
        # In primal form the norm of the residuals is a difference: it is used where no digits
        # that count are lost.
        safe = mean * rounding < tolerance / 10 if f.primal else torch.ones_like(mean).bool()
        known = torch.where(safe, 1.0, 0.0)
        self.known = known * mean
        apart = division / mean - known
        if f.primal:
            self.shrunk = ((values + 2 * alphas) / (values + alphas).square()).to(X.dtype)
            profile, size = 1 / (values + alphas), f.eigenvalues
        else:
            self.shrunk = (alphas / (values + alphas)).square().to(X.dtype)
            profile, size = alphas / (values + alphas), torch.ones_like(f.eigenvalues)
        even = torch.ones(len(X), dtype=torch.float64, device=X.device)
        row_basis, row_mix = compress(apart, even, tolerance)
        # An error e of the residuals adds at most 2 |apart r| |e| to the sum: the less the rows
        # differ, the less it counts. The norm is that of residuals with Gaussian tails.
        matters = float(2 * (3 * apart.square().mean(dim=0)).sqrt().max())
        basis, mix = compress(profile * mean.sqrt(), size, tolerance / max(matters, tolerance))
        if f.primal:
            mix = torch.cat([mean.sqrt()[:, None], -mix], dim=1)
        self.basis, self.row_basis = basis.to(X.dtype), row_basis.to(X.dtype)
        outer = (mix[:, :, None] * mix[:, None, :]).flatten(1)
        self.mixes = (row_mix[:, :, None] * outer[:, None, :]).flatten(1).T.contiguous()

    def __call__(self, y: Tensor, y_raw: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.exact is not None:
            return self.exact(y.double(), y_raw)[0], None
        z = y.T @ self.left
        error = (z.square() @ self.shrunk).double().T
        if self.primal:
            error = sum_squares(y) - error
        error = error * self.known[:, None]
        (q, n), own = (self.left.shape[1], len(self.left)), int(self.primal)
        r, b = len(self.basis) + own, len(self.row_basis)
        step = _copies(r * (b + 1) * n // 2, z.device)
        for start in range(0, len(z), step):
            part = z[start : start + step]
            residual = z.new_empty((len(part), r, n))
            if self.primal:
                residual[:, 0] = y[:, start : start + step].T
            copies = (part[:, None, :] * self.basis).view(-1, q)
            residual[:, own:] = (copies @ self.left.T).view(len(part), -1, n)
            small = torch.stack(
                [(residual * w) @ residual.transpose(1, 2) for w in self.row_basis], dim=1
            )
            error[:, start : start + step] += (small.double().flatten(1) @ self.mixes).T
        return _closed_form(error, y, y_raw), z.T


class _Generalised:
    """Generalised cross-validation of every alpha, from squared rotated targets alone."""

    def __init__(self, f: Factors, alphas: Tensor) -> None:
        U, values = f.orthonormal()
        shrink = alphas / (values[:, None] + alphas)
        self.outside = f.primal
        free = len(U) - int(f.centred) - len(values) if f.primal else 0
        trace = (free + shrink.sum(dim=0)) / len(U)
        self.left, self.skipped = f.left, len(f.eigenvalues) - len(values)
        size = values if f.primal else torch.ones_like(values)
        self.size = size.to(U.dtype)
        self.penalty = (shrink / trace).square().to(U.dtype)
        self.trace = trace

    def __call__(self, y: Tensor, y_raw: Tensor) -> tuple[Tensor, Tensor | None]:
        rotated = y.T @ self.left
        energy = rotated[:, self.skipped :].square() / self.size
        error = (energy @ self.penalty).double().T
        if self.outside:
            rest = sum_squares(y) - energy.sum(dim=1, dtype=torch.float64)
            error = error + rest.clamp(min=0) / self.trace.square()[:, None]
        return _closed_form(error, y, y_raw), rotated.T


def _scorer(
    design: Design,
    factors: Factors,
    alphas: Tensor,
    cv: str | Sequence[tuple[Any, Any]],
    tolerance: float | None,
) -> _Scorer:
    if not isinstance(cv, str):
        return _KFold(design, alphas, cv, tolerance, factors)
    _check_closed(cv, len(design.X))
    if cv == "loo":
        return _LeaveOneOut(factors, alphas, tolerance)
    return _Generalised(factors, alphas)


def _check_closed(cv: str, n: int) -> None:
    if cv not in ("loo", "gcv"):
        raise ConfigError(
            f"cv is {cv!r}; expected a number of folds, a splitter, a list of (train, test), "
            '"loo" or "gcv".'
        )
    if n < 3:
        raise ConfigError(f"cv={cv!r} needs at least 3 samples; n_samples={n}.")


def _all_scores(
    scorer: _Scorer,
    Y: Tensor,
    n_alphas: int,
    fit_intercept: bool,
    rows: int,
    target_batch: int | None,
) -> Tensor:
    out = torch.empty((n_alphas, Y.shape[1]), dtype=torch.float64, device=Y.device)
    for t in target_batches(Y.shape[1], rows, target_batch, Y.device):
        out[:, t], _ = scorer(_centred(Y[:, t], fit_intercept)[0], Y[:, t])
    return out


def _closed_form(error: Tensor, y: Tensor, y_raw: Tensor) -> Tensor:
    """R^2 from squared errors; `y` is centred or there is no intercept."""
    spread = sum_squares(y - mean_rows(y))
    return torch.where(constant_columns(y_raw), torch.nan, 1 - error.clamp(min=0) / spread)


def _centred(Y: Tensor, fit_intercept: bool) -> tuple[Tensor, Tensor]:
    if not fit_intercept:
        return Y, Y.new_zeros(Y.shape[1])
    mean = mean_rows(Y)
    return Y - mean, mean


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a matrix; a view where they are neighbours."""
    if rows is None:
        return x
    first, n = int(rows[0]) if len(rows) else 0, len(rows)
    if n and int(rows[-1]) - first == n - 1 and bool((rows[1:] > rows[:-1]).all()):
        return x[first : first + n]
    return x[rows]


def _copies(elements: int, device: torch.device) -> int:
    return max(1, COPIES.get(device.type, COPIES["cuda"]) // max(1, elements))


def _triangle(projected: Tensor) -> list[tuple[int, Tensor]]:
    """Blocks of rows of R, with P = QR, from each block's first column that is not zero.

    The norm of P w is that of R w, at half the cost where there are as many rows as columns.
    """
    n, q = projected.shape
    if 4 * n < q:
        return [(0, projected)]
    R = torch.linalg.qr(projected, mode="r").R
    return [(i, R[i : i + BLOCK, i:].contiguous()) for i in range(0, len(R), BLOCK)]
