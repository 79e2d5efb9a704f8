"""One pass of a model, in which every attention layer is looked at as it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from brainalign_kernels._checks import accumulation_dtype, default_scale, expand_heads
from brainalign_kernels.adapters import Attend, parse
from brainalign_kernels.adapters.sites import Site
from brainalign_kernels.adapters.swap import swap_sites
from brainalign_kernels.errors import UnsupportedError
from brainalign_kernels.patterns import effective_attention
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["BLOCK", "Captured", "observe", "require_grid"]

Result = TypeVar("Result")
#: Queries whose attention weights are formed at once.
BLOCK = 256


@dataclass
class Captured:
    """What an attention layer was given and what it gave, in one call.

    Parameters
    ----------
    layer : str
        The module's name.
    q : Tensor, shape (B, H, N, D)
    k : Tensor, shape (B, G, S, D)
    v : Tensor, shape (B, G, S, E)
    out : Tensor, shape (B, H, N, E)
        Before the output projection.
    shape : tuple of int, optional
        The grid of the last tokens.
    mask : Tensor, optional
    is_causal : bool
    scale : float, optional
    attention : str
        The mechanism.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    shape: tuple[int, ...] | None
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    attention: Any

    @property
    def prefix(self) -> int:
        """How many tokens come before the grid."""
        return self.k.shape[2] - (math.prod(self.shape) if self.shape else self.k.shape[2])

    def weights(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the attention weights (B, H, stop - start, S) of queries from start to stop.

        For a mechanism that is not softmax attention: its effective matrix.
        """
        stop = self.q.shape[2] if stop is None else min(stop, self.q.shape[2])
        if str(self.attention) != "softmax":
            return self._effective()[:, :, start:stop]
        q, wide = self.q[:, :, start:stop], accumulation_dtype(self.q.dtype)
        k, _ = expand_heads(self.q, self.k, self.v)
        scale = default_scale(self.scale, q.shape[-1])
        logits = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
        allowed = None
        if self.mask is not None:
            rows = self.mask if self.mask.shape[-2] == 1 else self.mask[:, :, start:stop]
            if rows.dtype == torch.bool:
                allowed = rows
            else:
                logits = logits + rows.to(wide)
        if self.is_causal:
            query = torch.arange(start, stop, device=q.device)[:, None]
            past = torch.arange(k.shape[2], device=q.device) <= query
            allowed = past if allowed is None else allowed & past
        return masked_softmax(logits, allowed)

    def blocks(self) -> list[tuple[int, int]]:
        """Return the first and last query of blocks small enough to form their weights."""
        size = BLOCK if str(self.attention) == "softmax" else max(self.q.shape[2], 1)
        total = self.q.shape[2]
        return [(start, min(start + size, total)) for start in range(0, total, size)]

    def _effective(self) -> Tensor:
        options = {
            "shape": self.shape,
            "mask": self.mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }
        return effective_attention(lambda v: self.attention(self.q, self.k, v, **options), self.v)


def observe(
    model: nn.Module,
    run: Callable[[], Any],
    reduce: Callable[[Captured], Result],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
) -> dict[str, list[Result]]:
    """Call `reduce` with each attention layer as the model computes it, and keep only its results.

    Parameters
    ----------
    model : torch.nn.Module
        Of transformers, diffusers, timm or open_clip, or with ``nn.MultiheadAttention``.
    run : callable
        Does the forward pass, for example ``lambda: model(images)``; without gradients.
    reduce : callable
        Takes a `Captured`.
    layers : int, str or sequence of them, optional
        See `brainalign_kernels.swap_attention`; by default all.
    attention : str or callable
        What the layers compute; by default their own, softmax attention.

    Returns
    -------
    dict of str to list
        By layer, in the order of their first calls, one result per call; several if the model
        runs a layer several times, as in generation.

    Raises
    ------
    UnsupportedError
        If no layer was called.
    """
    chosen = parse(attention)
    results: dict[str, list[Result]] = {}

    def at(site: Site) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            out = chosen(q, k, v, **options)
            captured = Captured(site.name, q, k, v, out, attention=chosen, **options)
            results.setdefault(site.name, []).append(reduce(captured))
            return out

        return attend

    with swap_sites(model, chosen, at, layers=layers), torch.no_grad():
        run()
    if not results:
        raise UnsupportedError("run() called none of the attention layers.")
    return results


def require_grid(captured: Captured) -> tuple[int, int, int]:
    """Rows, columns and the number of tokens before them."""
    if captured.shape is None or len(captured.shape) != 2:
        raise UnsupportedError(
            f"{captured.layer!r} has no grid of image tokens: name layers that have one."
        )
    return captured.shape[0], captured.shape[1], captured.prefix
