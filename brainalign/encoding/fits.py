"""Regressions of many targets on one set of training rows: ridge, banded, stacked, lagged.

Each has the same face, so that choice of layers, folds, permutation and blocks are those of
`nested_cv` whatever the regression.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainalign.data.splits import Split, by_group
from brainalign.errors import ConfigError
from brainalign.linear.banded import banded_fit, banded_kfold, sample_gammas
from brainalign.linear.lagged import LaggedRidge, TimeBlocks, lagged_predict
from brainalign.linear.search import RidgeSolver, Solution
from brainalign.linear.solvers import Factors
from brainalign.linear.stacking import Stacking

__all__ = ["REGRESSIONS", "Chosen", "Fit", "Regression", "make_fit"]

REGRESSIONS = ("ridge", "banded", "stacking")


@dataclass(frozen=True)
class Regression:
    """How responses are regressed on features.

    Parameters
    ----------
    kind : {"ridge", "banded", "stacking"}
        "ridge" fits every layer on its own; the others fit all feature spaces together.
    spaces : mapping of str to sequence of str, optional
        Layers of each feature space; by default every layer is a space of its own.
    models : mapping of str to sequence of str, optional
        Feature spaces of each model; by default every space is a model of its own.
    eligible : sequence of str, optional
        Models that the final one is chosen from; by default all.
    n_iter : int
        Candidate weights of the spaces, for banded ridge.
    delays : tuple of float, optional
        First and last delay in seconds: rows are samples of time, and features are delayed.
    sampling_rate : float, optional
        Samples per second.
    direction : {"forward", "backward"}
        As in `brainalign.linear.LaggedRidge`.
    """

    kind: str = "ridge"
    spaces: Mapping[str, Sequence[str]] | None = None
    models: Mapping[str, Sequence[str]] | None = None
    eligible: Sequence[str] | None = None
    n_iter: int = 50
    delays: tuple[float, float] | None = None
    sampling_rate: float | None = None
    direction: str = "forward"

    @property
    def lags(self) -> NDArray[np.int64]:
        """Delays of every feature in samples."""
        return np.zeros(1, dtype=np.int64) if self.delays is None else self.lagged()._lags()

    def lagged(self, **options: Any) -> LaggedRidge:
        """Return the model of delayed features."""
        first, last = self.delays or (0.0, 0.0)
        return LaggedRidge(first, last, self.sampling_rate, direction=self.direction, **options)


@dataclass(frozen=True)
class Chosen:
    """What was chosen for some targets by validation in the training rows.

    Parameters
    ----------
    penalties : Tensor, shape (n_spaces, n_targets), float64
        Penalty of each feature space; infinite where it is left out.
    score : Tensor, shape (n_targets,), float64
        Validated R^2.
    weights : Tensor, shape (n_spaces, n_targets), float64
        For stacking, of the spaces' predictions; for banded ridge, the candidate that the penalties
        were refined from; else ones.
    """

    penalties: Tensor
    score: Tensor
    weights: Tensor


class Fit(Protocol):
    """What all targets share of one model and one set of training rows.

    Attributes
    ----------
    mean, scale : Tensor, shape (n_features,)
        Of the training rows, by which features are z-scored.
    """

    mean: Tensor
    scale: Tensor

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        """Yield slices over the targets, of a size that suits the regression and the device."""
        ...

    def predict(self, Y: Tensor, *, parts: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict the test rows of some targets from their training rows.

        Parameters
        ----------
        Y : Tensor, shape (n_training_rows, n_targets)
            Targets.
        parts : bool
            Return what each space contributes.

        Returns
        -------
        deviation : Tensor, shape (n_test, n_targets)
            Predictions, less the mean of the training rows.
        score : Tensor, shape (n_targets,), float64
            Validated R^2 in the training rows.
        parts : Tensor, shape (n_spaces, n_test, n_targets), or None
            They sum to the deviation.
        """
        ...

    def choose(self, Y: Tensor) -> Chosen:
        """Choose penalties for some targets."""
        ...

    def coefficients(self, Y: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """Fit: coefficients (n_targets, n_columns) of z-scored features, and intercepts.

        Columns are features, or delays of each feature in turn.
        """
        ...

    def spanned(self) -> tuple[int, int] | None:
        """Directions that the features span, and how many they could; None if not known."""
        ...


def make_fit(
    regression: Regression,
    model: Mapping[str, NDArray[np.float32]],
    split: Split,
    inner: str | list[Split],
    alphas: NDArray[np.float64],
    groups: NDArray[Any],
    *,
    trials: NDArray[np.intp] | None = None,
    n_inner: int = 5,
    seed: int = 0,
    device: torch.device,
) -> Fit:
    """Return the fit of one model (features by space) to the training rows of one split.

    Parameters
    ----------
    regression : Regression
        How.
    model : mapping of str to ndarray, shape (n_rows, n_features)
        Features of each space.
    split : (train, test)
        Rows.
    inner : "loo", "gcv" or list of (train, test)
        How choices are scored: positions among the training rows. Not used with delays.
    alphas : ndarray, shape (n_alphas,)
        Grid.
    groups : array, shape (n_rows,)
        Rows that inner folds keep whole.
    trials : ndarray of int, shape (n_rows,), optional
        Trial of each row, for lagged models.
    n_inner : int
        Inner folds of lagged models.
    seed : int
        Seed of candidates and of inner folds.
    device : torch.device
        Where.
    """
    values = np.concatenate(list(model.values()), axis=1)
    X, X_test = (torch.as_tensor(values[rows], device=device) for rows in split)
    mean = X.mean(dim=0, dtype=torch.float64)
    scale = (X.double() - mean).square().mean(dim=0).sqrt()
    varies = scale > 1e-6 * mean.abs().clamp(min=1e-30)
    scale = torch.where(varies, scale, torch.ones_like(scale))
    mean, scale = mean.to(X.dtype), scale.to(X.dtype)
    edges = np.cumsum([0, *(x.shape[1] for x in model.values())])
    spaces = {
        name: np.arange(a, b) for name, a, b in zip(model, edges[:-1], edges[1:], strict=True)
    }
    if regression.delays is not None:
        if trials is None:
            raise ConfigError("A lagged model needs the trial of each row.")
        whole = (torch.as_tensor(values, device=device) - mean) / scale
        return _Lagged(
            regression, whole, mean, scale, spaces, split, alphas, groups, trials, n_inner, seed
        )
    X, X_test = (X - mean) / scale, (X_test - mean) / scale
    if regression.kind == "ridge":
        return _Ridge(X, X_test, mean, scale, alphas, inner)
    if isinstance(inner, str):
        raise ConfigError(
            f"inner_cv is {inner!r}; {regression.kind} is validated in folds.",
            "Give a number of folds.",
        )
    if regression.kind == "banded":
        return _Banded(X, X_test, mean, scale, spaces, alphas, inner, regression.n_iter, seed)
    return _Stacking(X, X_test, mean, scale, spaces, alphas, inner, groups[split[0]])


class _Ridge:
    """One penalty per target."""

    def __init__(
        self,
        X: Tensor,
        X_test: Tensor,
        mean: Tensor,
        scale: Tensor,
        alphas: NDArray[np.float64],
        inner: str | list[Split],
    ) -> None:
        self.mean, self.scale = mean, scale
        # A single alpha stands there twice, so that it is scored: layers are compared by it.
        grid = alphas if len(alphas) > 1 else np.repeat(alphas, 2)
        self.solver = RidgeSolver(X, torch.as_tensor(grid), inner)
        self.projected = self.solver.factors.project(X_test)

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        return self.solver.batches(n_targets, batch)

    def predict(self, Y: Tensor, *, parts: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        solution = self.solver.solve(Y)
        deviation = self.projected @ self.solver.weights(solution)
        return deviation, _best(solution), deviation[None] if parts else None

    def choose(self, Y: Tensor) -> Chosen:
        solution = self.solver.solve(Y)
        penalties = self.solver.alphas[solution.index][None]
        return Chosen(penalties, _best(solution), torch.ones_like(penalties))

    def coefficients(self, Y: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        return _at(self.solver, Y, chosen.penalties[0])

    def spanned(self) -> tuple[int, int]:
        return _spanned(self.solver.factors)


class _Banded:
    """One penalty per space and target."""

    def __init__(
        self,
        X: Tensor,
        X_test: Tensor,
        mean: Tensor,
        scale: Tensor,
        spaces: Mapping[str, NDArray[np.intp]],
        alphas: NDArray[np.float64],
        inner: list[Split],
        n_iter: int,
        seed: int,
    ) -> None:
        self.X, self.X_test, self.mean, self.scale, self.inner = X, X_test, mean, scale, inner
        self.columns = [torch.as_tensor(c, device=X.device) for c in spaces.values()]
        gammas = sample_gammas(n_iter, len(spaces), seed=seed)
        self.alphas, self.gammas = (torch.as_tensor(a, device=X.device) for a in (alphas, gammas))

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        # A candidate is factorised once for all targets of a call, which batches them itself.
        yield slice(0, n_targets)

    def predict(self, Y: Tensor, *, parts: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        chosen = self.choose(Y)
        coef = self.coefficients(Y, chosen)[0]
        if not parts:
            return self.X_test @ coef.T, chosen.score, None
        each = torch.stack([self.X_test[:, c] @ coef[:, c].T for c in self.columns])
        return each.sum(dim=0), chosen.score, each

    def choose(self, Y: Tensor) -> Chosen:
        found = banded_kfold(
            self.X, Y, self.columns, self.gammas, self.alphas, self.inner,
            refine=len(self.alphas) * len(self.gammas) > 1,
        )  # fmt: skip
        return Chosen(found.penalties, found.score, self.gammas[found.gamma].T)

    def coefficients(self, Y: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        return banded_fit(self.X, Y, self.columns, chosen.penalties, centres=chosen.weights)

    def spanned(self) -> None:
        return None


class _Stacking:
    """A ridge model per space, mixed."""

    def __init__(
        self,
        X: Tensor,
        X_test: Tensor,
        mean: Tensor,
        scale: Tensor,
        spaces: Mapping[str, NDArray[np.intp]],
        alphas: NDArray[np.float64],
        inner: list[Split],
        groups: NDArray[Any],
    ) -> None:
        self.mean, self.scale, self.spaces, self.alphas = mean, scale, dict(spaces), alphas
        self.X, self.X_test = X, X_test
        self.groups = groups if len(np.unique(groups)) < len(groups) else None
        self.model = Stacking(self.spaces, alphas=alphas.tolist(), cv=inner, device=str(X.device))

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        yield slice(0, n_targets)

    def _fitted(self, Y: Tensor) -> Stacking:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of single folds; the result says it of the whole
            return self.model.fit(self.X.cpu().numpy(), Y.cpu().numpy(), self.groups)

    def predict(self, Y: Tensor, *, parts: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        model = self._fitted(Y)
        each = torch.as_tensor(model.predict(self.X_test.cpu().numpy(), split=True)).to(Y)
        score = torch.as_tensor(model.best_score_, device=Y.device)
        return each.sum(dim=0), score, each if parts else None

    def choose(self, Y: Tensor) -> Chosen:
        model = self._fitted(Y)
        return Chosen(
            *(
                torch.as_tensor(np.asarray(a, dtype=np.float64), device=Y.device)
                for a in (model.alphas_, model.best_score_, model.weights_)
            )
        )

    def coefficients(self, Y: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        coef = Y.new_empty((Y.shape[1], self.X.shape[1]))
        intercept = Y.new_zeros(Y.shape[1])
        grid = torch.as_tensor(self.alphas)
        for columns, penalty, weight in zip(
            self.spaces.values(), chosen.penalties, chosen.weights.to(Y.dtype), strict=True
        ):
            solver = RidgeSolver(self.X[:, columns], grid, "gcv")
            own, constant = _at(solver, Y, penalty)
            coef[:, columns] = weight[:, None] * own
            intercept += weight * constant
        return coef, intercept

    def spanned(self) -> None:
        return None


class _Lagged:
    """Ridge or banded ridge on delayed features."""

    def __init__(
        self,
        regression: Regression,
        X: Tensor,
        mean: Tensor,
        scale: Tensor,
        spaces: Mapping[str, NDArray[np.intp]],
        split: Split,
        alphas: NDArray[np.float64],
        groups: NDArray[Any],
        trials: NDArray[np.intp],
        n_inner: int,
        seed: int,
    ) -> None:
        self.mean, self.scale, self.spaces = mean, scale, dict(spaces)
        self.device = X.device
        place = [np.flatnonzero(trials == t) for t in np.unique(trials)]
        self.X = [X[torch.as_tensor(rows, device=X.device)] for rows in place]
        train = np.zeros(len(X), dtype=bool)
        train[split[0]] = True
        self.train, self.test = train, np.asarray(split[1])
        self.place = place
        self.rows = [train[rows] for rows in place]
        cv: Any = TimeBlocks(n_inner)
        inside = [i for i, rows in enumerate(self.rows) if rows.any()]
        label = np.array([groups[place[i][0]] for i in inside])
        if all(self.rows[i].all() for i in inside) and len(np.unique(label)) > 1:
            folds = by_group(label, min(n_inner, len(np.unique(label))), seed)
            cv = [tuple(np.asarray(inside)[side] for side in fold) for fold in folds]
        self.model = regression.lagged(
            alphas=alphas, cv=cv, spaces=self.spaces, n_iter=regression.n_iter, seed=seed,
            device=str(X.device),
        )  # fmt: skip

    def batches(self, n_targets: int, batch: int | None = None) -> Iterator[slice]:
        yield slice(0, n_targets)

    def _fitted(self, Y: Tensor) -> LaggedRidge:
        whole = Y.new_zeros((len(self.train), Y.shape[1]))
        whole[torch.as_tensor(np.flatnonzero(self.train), device=Y.device)] = Y
        values = whole.cpu().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of single folds; the result says it of the whole
            return self.model.fit(
                [x.cpu().numpy() for x in self.X], [values[rows] for rows in self.place], self.rows
            )

    def predict(self, Y: Tensor, *, parts: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        model = self._fitted(Y)
        coef = torch.as_tensor(model.coef_, device=self.device)
        score = torch.as_tensor(self._score(model), device=self.device)
        if not parts:
            intercept = torch.as_tensor(model.intercept_, device=self.device)
            return self._at_test(coef, model.lags_, intercept) - Y.mean(dim=0), score, None
        each = []
        for columns in self.spaces.values():
            own = torch.zeros_like(coef)
            own[:, columns] = coef[:, columns]
            each.append(self._at_test(own, model.lags_, None))
        together = torch.stack(each)
        return together.sum(dim=0), score, together

    def _at_test(self, coef: Tensor, lags: NDArray[np.int64], intercept: Tensor | None) -> Tensor:
        """Predictions of the test rows; without an intercept, less their mean in training rows."""
        constant = coef.new_zeros(len(coef)) if intercept is None else intercept
        out = coef.new_empty((len(self.train), len(coef)))
        for x, rows in zip(self.X, self.place, strict=True):
            out[torch.as_tensor(rows, device=out.device)] = lagged_predict(x, coef, lags, constant)
        test = out[torch.as_tensor(self.test, device=out.device)]
        if intercept is not None:
            return test
        inside = torch.as_tensor(np.flatnonzero(self.train), device=out.device)
        return test - out[inside].mean(dim=0, dtype=torch.float64).to(out.dtype)

    def _score(self, model: LaggedRidge) -> NDArray[np.float64]:
        found = getattr(model, "best_score_", None)
        return np.full(len(model.alpha_), np.nan) if found is None else np.asarray(found)

    def choose(self, Y: Tensor) -> Chosen:
        model = self._fitted(Y)
        penalties = torch.as_tensor(model.alphas_, device=self.device)
        score = torch.as_tensor(self._score(model), device=self.device)
        return Chosen(penalties, score, torch.ones_like(penalties))

    def coefficients(self, Y: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor]:
        # Each target's choice is its own: it is made again, and the same.
        model = self._fitted(Y)
        coef, intercept = (
            torch.as_tensor(a, device=Y.device) for a in (model.coef_, model.intercept_)
        )
        return coef.flatten(1), intercept

    def spanned(self) -> None:
        return None


def _best(solution: Solution) -> Tensor:
    """Return the validated R^2 of each target at its alpha."""
    return solution.scores.gather(0, solution.index[None])[0]


def _at(solver: RidgeSolver, Y: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and intercepts at penalties of the solver's grid."""
    index = (solver.alphas[:, None] - penalty).abs().argmin(dim=0)
    return solver.coefficients(solver.solve(Y, index=index))


def _spanned(factors: Factors) -> tuple[int, int]:
    n, p = factors.X.shape
    return factors.rank, min(n - int(factors.centred), p)
