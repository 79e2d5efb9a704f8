"""Which keys a query sees: the windows of one axis, and their product over the axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels.errors import ShapeError

__all__ = [
    "Axis",
    "bias_entries",
    "bias_index",
    "dense_mask",
    "make_axes",
    "neighborhood_mask",
    "neighborhood_mask_mod",
    "window",
]


class Axis(NamedTuple):
    """One axis of the grid of tokens.

    Parameters
    ----------
    length, kernel, dilation, stride : int
        Tokens on the axis, keys of a window, step between them, queries that share a window.
    causal : bool
        No key lies after its query.
    """

    length: int
    kernel: int
    dilation: int
    stride: int
    causal: bool


def make_axes(
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """Return the axes that the options describe.

    Raises
    ------
    ShapeError
        If their numbers differ, or a window does not fit on its axis.
    """
    lengths = tuple(int(length) for length in shape)
    if not 1 <= len(lengths) <= 3:
        raise ShapeError(f"shape must have 1, 2 or 3 axes; got {lengths}.")
    options = {
        "kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal
    }  # fmt: skip
    columns = []
    for name, value in options.items():
        column = tuple(value) if isinstance(value, Sequence) else (value,) * len(lengths)
        if len(column) != len(lengths):
            raise ShapeError(f"{name} must be one value or one per axis of {lengths}; got {value}.")
        if name != "is_causal" and not all(int(x) == x and x >= 1 for x in column):
            raise ShapeError(f"{name} must be 1 or more on every axis; got {value}.")
        columns.append(column)
    axes = tuple(
        Axis(length, int(k), int(d), int(s), bool(c))
        for length, k, d, s, c in zip(lengths, *columns, strict=True)
    )
    for axis in axes:
        if axis.kernel * axis.dilation > axis.length:
            raise ShapeError(
                f"kernel_size * dilation must not exceed the axis: "
                f"{axis.kernel} * {axis.dilation} > {axis.length}."
            )
        if axis.stride > axis.kernel:
            raise ShapeError(
                f"stride must not exceed kernel_size; got {axis.stride} > {axis.kernel}."
            )
    return axes


def window(position: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """First and last key of the queries at `position`, counted within their dilation group."""
    index, size = position // axis.dilation, _group_size(position % axis.dilation, axis)
    block = index // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(block + axis.stride - 1, size - 1)
        return (leader - axis.kernel + 1).clamp(min=0), index
    leader = torch.minimum(block + axis.stride // 2, size - 1)
    first = torch.minimum((leader - axis.kernel // 2).clamp(min=0), size - axis.kernel)
    return first, first + axis.kernel - 1


def _group_size(group: Tensor, axis: Axis) -> Tensor:
    return (axis.length - group + axis.dilation - 1) // axis.dilation


def neighborhood_mask(
    shape: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Mask of the keys that each query of `neighborhood_attention` sees.

    Parameters
    ----------
    shape : sequence of int
        Tokens along each of 1 to 3 axes.
    kernel_size, dilation, stride, is_causal
        As for `neighborhood_attention`.
    device : torch.device or str, optional
        Where to make it.

    Returns
    -------
    Tensor of bool, shape (N, N)
        N = prod(shape), tokens in row-major order; True: query (row) sees key (column).

    Raises
    ------
    ShapeError
        If the options do not fit `shape`.
    """
    return dense_mask(make_axes(shape, kernel_size, dilation, stride, is_causal), device)


def dense_mask(axes: tuple[Axis, ...], device: torch.device | str | None = None) -> Tensor:
    """See `neighborhood_mask`."""
    mask = torch.ones((1, 1), dtype=torch.bool, device=device)
    for axis in axes:
        position = torch.arange(axis.length, device=device)
        first, last = (x[:, None] for x in window(position, axis))
        index, group = position // axis.dilation, position % axis.dilation
        own = (group[:, None] == group) & (index >= first) & (index <= last)
        rows = mask.shape[0] * axis.length
        mask = (mask[:, None, :, None] & own[None, :, None, :]).reshape(rows, rows)
    return mask


def neighborhood_mask_mod(
    shape: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the same mask as a ``mask_mod`` of PyTorch's FlexAttention.

    Parameters
    ----------
    shape : sequence of int
        Tokens along each of 1 to 3 axes.
    kernel_size, dilation, stride, is_causal
        As for `neighborhood_attention`.

    Returns
    -------
    callable
        Of batch, head, query and key indices; for
        ``torch.nn.attention.flex_attention.create_block_mask``.

    Raises
    ------
    ShapeError
        If the options do not fit `shape`.
    """
    axes = make_axes(shape, kernel_size, dilation, stride, is_causal)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query >= 0) & (key >= 0)
        for axis in reversed(axes):
            q, k = query % axis.length, key % axis.length
            query, key = query // axis.length, key // axis.length
            first, last = window(q, axis)
            index = k // axis.dilation
            same = q % axis.dilation == k % axis.dilation
            allowed = allowed & same & (index >= first) & (index <= last)
        return allowed

    return mask_mod


def bias_index(axes: tuple[Axis, ...], device: torch.device | str | None = None) -> Tensor:
    """Row-major index (N, N) of each pair in a table of prod(2K - 1) entries; 0 off the windows.

    An axis counts (key - query) / dilation + K - 1.
    """
    index = torch.zeros((1, 1), dtype=torch.long, device=device)
    for axis in axes:
        place = torch.arange(axis.length, device=device) // axis.dilation
        offset = (place[None, :] - place[:, None] + axis.kernel - 1) % (2 * axis.kernel - 1)
        rows = index.shape[0] * axis.length
        index = index[:, None, :, None] * (2 * axis.kernel - 1) + offset[None, :, None, :]
        index = index.reshape(rows, rows)
    return index.masked_fill(~dense_mask(axes, device), 0)


def bias_entries(axes: tuple[Axis, ...]) -> int:
    """Entries of a head's relative position bias."""
    return math.prod([2 * axis.kernel - 1 for axis in axes])
