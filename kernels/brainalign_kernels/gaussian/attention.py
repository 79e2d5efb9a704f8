"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.gaussian import merged, reference

__all__ = ["gaussian_adaptive_attention", "gaussian_weights"]

OPERATION = Operation(
    "gaussian_adaptive_attention",
    reference.gaussian_adaptive_attention,
    compiled=Path(merged.gaussian_adaptive_attention),
)


def gaussian_adaptive_attention(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    axis: int = 1,
    padding_value: float | None = None,
    eps: float = 1e-8,
    impl: str = "auto",
) -> Tensor:
    r"""Weigh the entries along an axis by a learned product of Gaussians of their values.

    .. math:: w_i \propto \prod_g \frac{1}{\sqrt{2 \pi c_g^2}}
              \exp\Big(-\frac{(x_i - \mu - \delta_g)^2}{2 c_g^2 \sigma^2}\Big), \quad
              o_i = x_i w_i, \quad \sum_i w_i = 1

    with mean and unbiased variance of x along the axis, epsilon being added to the variance. With
    several heads the axis is cut into that many parts, the last one taking the remainder, and each
    has its own mean, variance, Gaussians and weights.

    Parameters
    ----------
    x : Tensor, any shape
        Input.
    mean_offsets : Tensor, shape (G,) or (heads, G)
        Delta, in units of x.
    c : Tensor, shape of `mean_offsets`
        Widths in units of sigma; only the square matters, and it must not be zero.
    axis : int
        Along which is weighed. An axis of size 1 has variance 0.
    padding_value : float, optional
        Entries equal to it count as zeros in mean and variance, take part in the normalisation, and
        are copied to the output.
    eps : float
        Added to the variance, and the smallest sum that the weights are divided by: where the
        Gaussians are narrower than that, the weights sum to less than one.
    impl : {"auto", "reference", "compiled"}
        "compiled" merges the Gaussians of a head into one.

    Returns
    -------
    Tensor, shape of `x`

    Raises
    ------
    ShapeError
        For parameters, types or an axis that do not fit.

    References
    ----------
    Ioannides et al. (2024), Gaussian adaptive attention is all you need.
    """
    return gaussian_weights(
        x, mean_offsets, c, axis=axis, padding_value=padding_value, eps=eps, impl=impl
    )[0]


def gaussian_weights(
    x: Tensor,
    mean_offsets: Tensor,
    c: Tensor,
    *,
    axis: int = 1,
    padding_value: float | None = None,
    eps: float = 1e-8,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Give the output of `gaussian_adaptive_attention`, and its weights."""
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"axis is {axis}; x has shape {tuple(x.shape)}.")
    if mean_offsets.ndim not in (1, 2) or mean_offsets.shape != c.shape or 0 in c.shape:
        raise ShapeError(
            "mean_offsets and c must have one shape, (G,) or (heads, G), without zeros; got "
            f"{tuple(mean_offsets.shape)} and {tuple(c.shape)}."
        )
    if not x.is_floating_point() or x.device != c.device:
        raise ShapeError(
            f"Expected floating-point x beside its parameters; got {x.dtype} on {x.device} and "
            f"{c.dtype} on {c.device}."
        )
    if c.ndim == 1:
        mean_offsets, c = mean_offsets[None], c[None]
    options = {"axis": axis % x.ndim, "padding_value": padding_value, "eps": eps}
    out, weights = OPERATION(impl, x, mean_offsets, c, **options)
    return out, weights
