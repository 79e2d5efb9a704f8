"""Colours: tables for maps and matrices, and names that the page turns into its theme's colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["QUALITATIVE", "colour_limits", "colour_table", "colourscale", "series_colour"]

#: Okabe and Ito's colours, which differ for every kind of colour vision.
QUALITATIVE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63b8", "#6f7d1c",
)  # fmt: skip

_MAPS = {"sequential": "viridis", "diverging": "RdBu_r", "matrix": "cividis"}


def series_colour(i: int) -> str:
    """Return the name of the i-th series' colour; the page has one for light and one for dark."""
    return f"$c{i % len(QUALITATIVE)}"


def colour_table(hint: str, n: int = 256) -> np.ndarray:
    """Return n colours, (n, 3) uint8, of the map for a hint; viridis for an unknown one."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if hint == "categorical":
        cycle = np.array([to_rgb(c) for c in QUALITATIVE])
        colours = cycle[np.arange(n) % len(cycle)]
        # A second and third round is lighter, then darker, so that neighbours stay apart.
        for turn in range(1, n // len(cycle) + 1):
            part = slice(turn * len(cycle), (turn + 1) * len(cycle))
            colours[part] = colours[part] * 0.55 + (0.45 if turn % 2 else 0.0)
    else:
        colours = colormaps[_MAPS.get(hint, "viridis")](np.linspace(0, 1, n))[:, :3]
    return np.round(colours * 255).astype(np.uint8)


def colourscale(hint: str) -> list[list[Any]]:
    """Return plotly's form of a colour map."""
    table = colour_table(hint, 17)
    return [[i / 16, f"rgb({r},{g},{b})"] for i, (r, g, b) in enumerate(table.tolist())]


def colour_limits(
    values: np.ndarray, hint: str, attrs: Mapping[str, Any], trim: float = 0.5
) -> tuple[float, float]:
    """Return the values at the ends of the colour map.

    ``vmin`` and ``vmax`` of `attrs` where given; else the range without the outermost `trim` per
    cent, symmetric about zero for a diverging map, from zero for a sequential map that starts
    near it.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        low, high = 0.0, 1.0
    else:
        low, high = (float(v) for v in np.percentile(finite, [trim, 100 - trim]))
    if hint == "diverging":
        high = max(abs(low), abs(high))
        low = -high
    elif high > 0 and abs(low) < 0.35 * high:
        low = 0.0
    low, high = float(attrs.get("vmin", low)), float(attrs.get("vmax", high))
    return (low, high) if high > low else (low, low + 1.0)
