"""The places of a model where attention is computed, and what is known about their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError

__all__ = ["Attend", "Grid", "Site", "find_grids", "read_grids"]


class Attend(Protocol):
    """Attention as the adapters call it."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shape: tuple[int, ...] | None,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """Return the output (B, H, N, E) of q (B, H, N, D), k (B, G, S, D) and v (B, G, S, E).

        `shape` is the grid (rows, columns) of the layer's image tokens, or None where there is
        none; with a grid, tokens number N - rows * columns are before it (class and register
        tokens, or text). `mask` is None, boolean (True: may be attended) or added to the logits.
        """


@dataclass
class Grid:
    """Rows and columns of the image tokens that pass through a part of a model.

    Parameters
    ----------
    module : nn.Module, optional
        Whose output (or input, if `before`) is a map (B, C, rows, columns) of these tokens.
    before : bool
        Whether the input is read.
    fixed : tuple of int, optional
        Given by the user.
    """

    module: nn.Module | None = None
    before: bool = False
    fixed: tuple[int, ...] | None = None
    seen: tuple[int, ...] | None = None

    def shape(self, tokens: int, where: str) -> tuple[int, ...]:
        """Return the grid of a layer with so many tokens: this one, or a halved one."""
        full = self.fixed or self.seen
        if full is None:
            raise ShapeError(f"The grid of image tokens at {where!r} is unknown; pass grid=(H, W).")
        if math.prod(full) <= tokens:
            return full
        for step in range(1, 7):
            shape = tuple(-(-length // 2**step) for length in full)
            if math.prod(shape) == tokens:
                return shape
        raise ShapeError(
            f"{tokens} tokens at {where!r} are no grid of {full}, halved or not; pass grid=(H, W)."
        )


@dataclass
class Site:
    """One attention layer.

    Parameters
    ----------
    name : str
        Of the module, as ``named_modules`` has it.
    module : nn.Module
    grid : Grid, optional
        Missing for text.
    cross : bool
        Whether queries and keys are different tokens.
    """

    name: str
    module: nn.Module
    grid: Grid | None = None
    cross: bool = False
    calls: int = field(default=0, compare=False)

    def attend(
        self,
        attention: Attend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Call `attention` the way PyTorch's own function would be called here."""
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            half = torch.get_autocast_dtype(kind)
            q, k, v = q.to(half), k.to(half), v.to(half)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        shape = None
        if self.grid is not None and not self.cross:
            shape = self.grid.shape(q.shape[2], self.name)
        self.calls += 1
        out = attention(q, k, v, shape=shape, mask=mask, is_causal=is_causal, scale=scale)
        expected = (*q.shape[:3], v.shape[3])
        if tuple(out.shape) != expected:
            raise ShapeError(
                f"The attention at {self.name!r} gave {tuple(out.shape)}; expected {expected}."
            )
        return out


def find_grids(model: nn.Module, names: Sequence[str]) -> dict[str, Grid]:
    """Return the grids of attention layers by name, read behind the model's patch embeddings.

    A patch embedding is a convolution whose stride is its kernel; its grid is that of all attention
    layers in the smallest part of the model that has the convolution and any such layer.
    """
    found: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if not _is_patch_embedding(module):
            continue
        parts = name.split(".")
        for depth in range(len(parts) - 1, -1, -1):
            prefix = ".".join(parts[:depth])
            inside = [n for n in names if not prefix or n.startswith(f"{prefix}.")]
            if inside:
                grid = Grid(module)
                for layer in inside:
                    found.setdefault(layer, grid)
                break
    return found


def _is_patch_embedding(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.stride) == tuple(module.kernel_size)
        and module.kernel_size[0] > 1
        and module.in_channels <= 4
    )


def read_grids(grids: Sequence[Grid]) -> list[Any]:
    """Let each grid see the map that passes its module; return the hooks' handles."""
    handles = []
    for grid in {id(g): g for g in grids if g.module is not None}.values():
        assert grid.module is not None
        if grid.before:
            hook = grid.module.register_forward_pre_hook(_reader_before(grid), with_kwargs=True)
        else:
            hook = grid.module.register_forward_hook(_reader_after(grid))
        handles.append(hook)
    return handles


def _reader_after(grid: Grid) -> Callable[..., None]:
    def read(module: nn.Module, args: Any, output: Any) -> None:
        grid.seen = tuple(output.shape[-2:])

    return read


def _reader_before(grid: Grid) -> Callable[..., None]:
    def read(module: nn.Module, args: Any, kwargs: Any) -> None:
        for value in [*args, *kwargs.values()]:
            if isinstance(value, Tensor):
                grid.seen = tuple(value.shape[-2:]) if value.ndim == 4 else None
                return

    return read
