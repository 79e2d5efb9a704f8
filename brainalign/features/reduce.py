"""Fewer features: PCA and sparse random projection, fitted on training stimuli only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import xarray as xr
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from brainalign.data.schema import validate
from brainalign.errors import ConfigError, LeakError, SchemaError, near

__all__ = ["PCA", "SparseRandomProjection"]

FLOATS_IN_MEMORY = 2**26
LARGEST_GRAM = 20_000


def _training_rows(
    features: xr.Dataset, train_ids: Sequence[str], test_ids: Sequence[str]
) -> np.ndarray:
    validate(features, "features")
    if "stimulus" not in features["features"].dims:
        raise SchemaError("features: reduction needs dimension 'stimulus'.")
    train, test = [str(s) for s in train_ids], {str(s) for s in test_ids}
    both = [s for s in train if s in test]
    if both:
        raise LeakError(
            f"{len(both)} stimuli stand in both train_ids and test_ids, such as {both[0]!r}.",
            "Fit on training stimuli only.",
        )
    row = {str(s): i for i, s in enumerate(features["stimulus_id"].values)}
    unknown = [s for s in train if s not in row]
    if unknown:
        raise SchemaError(
            f"{len(unknown)} training stimuli have no features, such as {unknown[0]!r}."
            f"{near(unknown[0], row)}"
        )
    if len(set(train)) < 2:
        raise SchemaError(f"Fitting needs at least 2 training stimuli; {len(set(train))} came.")
    return np.array(sorted({row[s] for s in train}))


def _columns(x: xr.DataArray, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of columns of the chosen rows, each of bounded size, in float64."""
    width = max(1, FLOATS_IN_MEMORY // max(x.sizes["stimulus"], 1))
    for start in range(0, x.sizes["feature"], width):
        part = slice(start, min(start + width, x.sizes["feature"]))
        yield part, x[:, part].values[rows].astype(np.float64)


def _rows(x: xr.DataArray, rows: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of rows, each of bounded size."""
    n = x.sizes["stimulus"] if rows is None else len(rows)
    height = max(1, FLOATS_IN_MEMORY // max(x.sizes["feature"], 1))
    for start in range(0, n, height):
        part = slice(start, min(start + height, n))
        yield part, x[part if rows is None else rows[part]].values


class _Reduction(BaseEstimator):
    """What both reductions share: the mapping of a Dataset, stimuli streamed."""

    n_features_in_: int

    def _map(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _n_out(self) -> int:
        raise NotImplementedError

    def transform(self, features: xr.Dataset) -> xr.Dataset:
        """Return the reduced features of any stimuli, in the ``features`` schema.

        Parameters
        ----------
        features : xarray.Dataset
            Of the layer that was fitted; stimulus x feature.

        Raises
        ------
        SchemaError
            If it has another number of features than was fitted.
        """
        if not hasattr(self, "n_features_in_"):
            raise NotFittedError(f"{type(self).__name__} is not fitted yet: call fit first.")
        validate(features, "features")
        x = features["features"]
        if x.sizes["feature"] != self.n_features_in_:
            raise SchemaError(
                f"features: dimension 'feature' has length {x.sizes['feature']}; "
                f"the reduction was fitted on {self.n_features_in_}."
            )
        out = np.empty((x.sizes["stimulus"], self._n_out()), np.float32)
        for part, values in _rows(x):
            out[part] = self._map(values)
        settings = {"method": type(self).__name__, **self.get_params()}
        reduced = features.drop_vars("features").drop_dims("feature", errors="ignore")
        return validate(
            reduced.assign(features=(("stimulus", "feature"), out, x.attrs)).assign_attrs(
                reduction=json.dumps(settings, sort_keys=True)
            ),
            "features",
        )

    def fit_transform(
        self, features: xr.Dataset, train_ids: Sequence[str], *, test_ids: Sequence[str] = ()
    ) -> xr.Dataset:
        """Fit on the training stimuli and return the reduced features of all."""
        return self.fit(features, train_ids, test_ids=test_ids).transform(features)

    def fit(
        self, features: xr.Dataset, train_ids: Sequence[str], *, test_ids: Sequence[str] = ()
    ) -> Self:
        """Fit on the training stimuli."""
        raise NotImplementedError


class PCA(_Reduction):
    r"""Principal components, exact and streamed.

    With :math:`X_c` the centred training features (n x p) the components are the leading
    eigenvectors of :math:`X_c^\top X_c`, taken from whichever of :math:`X_c^\top X_c` and
    :math:`X_c X_c^\top` is smaller; either is summed over chunks in float64, so a layer may be
    wider than memory.

    Parameters
    ----------
    n_components : int or float
        How many, at most as many as the rank; or the fraction of variance to keep, in (0, 1).
    whiten : bool
        Scale each score to unit variance over the training stimuli.

    Attributes
    ----------
    components_ : ndarray, shape (component, feature)
    mean_ : ndarray, shape (feature,)
    explained_variance_, explained_variance_ratio_ : ndarray, shape (component,)
    n_features_in_ : int
    """

    def __init__(self, n_components: int | float = 100, *, whiten: bool = False) -> None:
        self.n_components = n_components
        self.whiten = whiten

    def fit(
        self, features: xr.Dataset, train_ids: Sequence[str], *, test_ids: Sequence[str] = ()
    ) -> Self:
        """Fit on the training stimuli.

        Parameters
        ----------
        features : xarray.Dataset
            ``features`` schema; may be lazy.
        train_ids : sequence of str
            The stimuli to fit on.
        test_ids : sequence of str
            Stimuli that must not be among them.

        Raises
        ------
        LeakError
            If a stimulus stands in both.
        SchemaError
            If a training stimulus has no features.
        ConfigError
            If `n_components` is out of range, or the layer needs a random projection first.
        """
        wanted = self.n_components
        if not (wanted >= 1 and wanted == int(wanted)) and not 0 < wanted < 1:
            raise ConfigError(
                f"n_components is {wanted}; expected a whole number from 1, or a fraction."
            )
        rows = _training_rows(features, train_ids, test_ids)
        x = features["features"]
        n, p = len(rows), x.sizes["feature"]
        if min(n, p) > LARGEST_GRAM:
            raise ConfigError(
                f"PCA of {n} stimuli x {p} features needs more than {LARGEST_GRAM} of neither.",
                "Apply SparseRandomProjection first.",
            )
        mean = np.concatenate([values.mean(0) for _, values in _columns(x, rows)])
        gram = np.zeros((min(n, p),) * 2)
        if p <= n:
            for _, values in _rows(x, rows):
                centred = values - mean
                gram += centred.T @ centred
        else:
            for part, values in _columns(x, rows):
                values -= mean[part]
                gram += values @ values.T
        eigenvalues, vectors = np.linalg.eigh(gram)
        eigenvalues, vectors = eigenvalues[::-1].clip(0), vectors[:, ::-1]
        rank = int((eigenvalues > eigenvalues[0] * max(n, p) * np.finfo(np.float64).eps).sum())
        if rank == 0:
            raise SchemaError("features: every feature is constant over the training stimuli.")
        ratio = eigenvalues / eigenvalues.sum()
        k = int(np.searchsorted(np.cumsum(ratio), wanted)) + 1 if wanted < 1 else int(wanted)
        k = min(k, rank)
        if p <= n:
            components = vectors[:, :k].T
        else:
            scaled = vectors[:, :k].T / np.sqrt(eigenvalues[:k, None])
            components = np.empty((k, p))
            for part, values in _columns(x, rows):
                components[:, part] = scaled @ (values - mean[part])
        # The sign of an eigenvector is arbitrary: its largest entry is made positive.
        largest = np.abs(components).argmax(1)
        components *= np.sign(components[np.arange(k), largest])[:, None]
        self.mean_, self.components_, self.n_features_in_ = mean, components, p
        self.explained_variance_ = eigenvalues[:k] / (n - 1)
        self.explained_variance_ratio_ = ratio[:k]
        return self

    def _n_out(self) -> int:
        return len(self.components_)

    def _map(self, x: np.ndarray) -> np.ndarray:
        scores = (x - self.mean_) @ self.components_.T
        return scores / np.sqrt(self.explained_variance_) if self.whiten else scores

    def expand(
        self, weights: np.ndarray, intercept: np.ndarray | float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return weights on the features themselves from weights on the components.

        Parameters
        ----------
        weights : ndarray, shape (neuroid, component)
        intercept : ndarray, shape (neuroid,)

        Returns
        -------
        weights : ndarray, shape (neuroid, feature)
        intercept : ndarray, shape (neuroid,)
        """
        scale = np.sqrt(self.explained_variance_) if self.whiten else 1.0
        full = (weights / scale) @ self.components_
        return full, np.asarray(intercept - full @ self.mean_)


class SparseRandomProjection(_Reduction):
    """Sparse random projection (Li, Hastie & Church 2006) through scikit-learn's.

    Parameters
    ----------
    n_components : int or "auto"
        How many; ``"auto"`` keeps distances within `eps` for the number of training stimuli
        (Johnson & Lindenstrauss).
    eps : float
        The distortion that ``"auto"`` allows.
    seed : int
        Of the random matrix.

    Attributes
    ----------
    components_ : sparse matrix, shape (component, feature)
    n_features_in_ : int
    """

    def __init__(
        self, n_components: int | str = "auto", *, eps: float = 0.1, seed: int = 0
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.seed = seed

    def fit(
        self, features: xr.Dataset, train_ids: Sequence[str], *, test_ids: Sequence[str] = ()
    ) -> Self:
        """Draw the matrix for the shape of the training features; see `PCA.fit`."""
        from sklearn import random_projection

        rows = _training_rows(features, train_ids, test_ids)
        shape = (len(rows), features.sizes["feature"])
        inner = random_projection.SparseRandomProjection(
            self.n_components, eps=self.eps, random_state=self.seed
        )
        try:
            # Only the shape is looked at; this one takes no memory.
            inner.fit(np.broadcast_to(np.float32(0), shape))
        except ValueError as error:
            raise ConfigError(
                f"A random projection of {shape[0]} stimuli x {shape[1]} features cannot have "
                f"n_components={self.n_components!r} and eps={self.eps}: {error}.",
                "Give n_components as a number.",
            ) from error
        self.components_: Any = inner.components_
        self.n_features_in_ = shape[1]
        return self

    def _n_out(self) -> int:
        return int(self.components_.shape[0])

    def _map(self, x: np.ndarray) -> np.ndarray:
        return np.asarray((self.components_ @ x.T).T)
