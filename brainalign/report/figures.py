"""From the data of a figure to what the page draws, what its table shows and what its CSV holds.

Colours whose name begins with ``$`` are the page's own: it has one set for light and one for dark.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from brainalign.data.section import Figure
from brainalign.errors import SchemaError
from brainalign.report import surface
from brainalign.report.colours import (
    colour_limits,
    colour_table,
    colourscale,
    series_colour,
)
from brainalign.report.text import clean, format_number, plot_text

__all__ = ["Drawn", "draw", "frame"]

#: Points of a logarithmic axis that are all named.
_MAX_TICKS = 10
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
_MAX_CELLS_WITH_TEXT = 400
_MAX_POINTS = 4000
_MAX_RDM = 300
#: Rows that a table shows as they are; longer ones are searched and sorted in the page.
ROWS_OF_TABLE = 200


@dataclass
class Drawn:
    """What one figure needs on the page.

    Parameters
    ----------
    spec : dict or None
        What the script draws; None for a figure that is HTML alone.
    table : pandas.DataFrame
        The data, or a summary of them, for readers who do not see the plot.
    table_note : str
        What the table is, when it is not the whole data.
    note : str
        Anything the drawing leaves out.
    pictures : dict of str to bytes
        Files beside the page, by their name (WebP).
    maps : list of dict
        For a surface: name, picture, text for readers who do not see it.
    wide : bool
        Whether it needs the page's full width.
    """

    spec: dict[str, Any] | None
    table: pd.DataFrame
    table_note: str = ""
    note: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    maps: list[dict[str, Any]] = field(default_factory=list)
    wide: bool = False


def _text(values: Any) -> list[str]:
    return [plot_text(v) for v in np.asarray(values).ravel().tolist()]


def _values(data: xr.Dataset, name: str) -> np.ndarray:
    return np.asarray(data[name].values, dtype=float)


def _label(data: xr.Dataset, name: str, fallback: str = "") -> str:
    """Return ``long name (unit)`` of a variable."""
    attrs = data[name].attrs
    title = str(attrs.get("long_name", fallback))
    units = str(attrs.get("units", ""))
    return f"{title} ({units})" if units and units != "1" and title else title or units


def _hint(figure: Figure, attrs: Mapping[str, Any], fallback: str) -> str:
    return str(figure.options.get("cmap", attrs.get("cmap", fallback)))


def _reordered(values: xr.DataArray, *dims: str) -> np.ndarray:
    return np.asarray(values.transpose(*dims).values, dtype=float)


def _shown(value: float, low: float | None, high: float | None) -> str:
    text = format_number(value)
    if low is not None and high is not None and np.isfinite([low, high]).all():
        text += f" [{format_number(low)}, {format_number(high)}]"
    return text


def _references(figure: Figure, span: tuple[float, float], upright: bool) -> list[dict[str, Any]]:
    """Return reference lines and bands as traces, so that they stand in the legend.

    Parameters
    ----------
    figure : Figure
        Options ``reference_lines`` [{label, value}] and ``reference_bands`` [{label, low, high}].
    span : pair of float
        Where the lines begin and end on the axis of items.
    upright : bool
        Whether values run along the horizontal axis, so that the lines stand upright.
    """
    traces: list[dict[str, Any]] = []
    across = [span[0], span[1], span[1], span[0], span[0]]
    for i, band in enumerate(figure.options.get("reference_bands", [])):
        low, high = float(band["low"]), float(band["high"])
        along = [low, low, high, high, low]
        name = f"{plot_text(band['label'])}: {_shown_range(low, high)}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": along if upright else across,
                "y": across if upright else along,
                "fill": "toself",
                "fillcolor": f"$muted/{0.26 - 0.08 * (i % 2)}",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "name": name,
            }
        )
    for i, line in enumerate(figure.options.get("reference_lines", [])):
        value = float(line["value"])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [value, value] if upright else list(span),
                "y": list(span) if upright else [value, value],
                "line": {
                    "color": "$text",
                    "width": 1.6,
                    "dash": ("dash", "dot", "dashdot", "longdash")[i % 4],
                },
                "hoverinfo": "skip",
                "name": f"{plot_text(line['label'])}: {format_number(value)}",
            }
        )
    return traces


def _shown_range(low: float, high: float) -> str:
    return f"{format_number(low)} to {format_number(high)}"


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": plot_text(title)}, **more}


def _items_axis(labels: Sequence[str], title: str = "") -> dict[str, Any]:
    return _axis(
        title,
        tickmode="array",
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
        range=[-0.6, len(labels) - 0.4],
        showgrid=False,
        zeroline=False,
    )


def _plot(
    data: list[dict[str, Any]], layout: dict[str, Any], height: int, **more: Any
) -> dict[str, Any]:
    return {"type": "plot", "data": data, "layout": layout, "height": height, **more}


def _draw_items(figure: Figure) -> Drawn:
    """Draw values by item with their intervals: kinds points and bars."""
    ds, bars = figure.data, figure.kind == "bars"
    items = _text(ds["item"].values)
    if "series" in ds["value"].dims:
        names = _text(ds["series"].values) if "series" in ds.variables else []
        names = names or [str(i + 1) for i in range(ds.sizes["series"])]
        dims: tuple[str, ...] = ("series", "item")
    else:
        names, dims = [""], ("item",)
    n, k = len(items), len(names)
    arrays = {
        v: _reordered(ds[v], *dims).reshape(k, n) for v in ("value", "low", "high") if v in ds
    }
    longest = max((len(i) for i in items), default=0)
    lying = figure.options.get("orientation", "h" if longest > 14 or n > 14 else "v") == "h"
    slot = 0.78 / k if bars else min(0.8 / k, 0.24)
    traces = []
    # Lying items are read from the top, but plotly counts from below.
    position = np.arange(n)[::-1] if lying else np.arange(n)
    for s, name in enumerate(names):
        shift = (s - (k - 1) / 2) * slot * (-1 if lying else 1)
        value = arrays["value"][s]
        low = arrays["low"][s] if "low" in arrays else np.full(n, np.nan)
        high = arrays["high"][s] if "high" in arrays else np.full(n, np.nan)
        known = np.isfinite(low) & np.isfinite(high) & np.isfinite(value)
        error = {
            "type": "data",
            "symmetric": False,
            "array": np.where(known, high - value, 0.0),
            "arrayminus": np.where(known, value - low, 0.0),
            "color": "$text" if bars else series_colour(s),
            "thickness": 1.4,
            "width": 3 if bars else 0,
            "visible": bool(known.any()),
        }
        if not bars:
            error["thickness"] = 2.2
        trace: dict[str, Any] = {
            "type": "bar" if bars else "scatter",
            "x": value if lying else position + shift,
            "y": position + shift if lying else value,
            ("error_x" if lying else "error_y"): error,
            "name": name,
            "showlegend": k > 1,
            "customdata": [
                f"<b>{item}</b>{'<br>' + name if name else ''}<br>{_shown(v, lo, hi)}"
                for item, v, lo, hi in zip(items, value, low, high, strict=True)
            ],
            "hovertemplate": "%{customdata}<extra></extra>",
        }
        if bars:
            trace |= {
                "orientation": "h" if lying else "v",
                "width": slot * 0.92,
                "marker": {"color": series_colour(s)},
            }
        else:
            connect = n > 2 and bool(figure.options.get("connect", False))
            trace |= {
                "mode": "lines+markers" if connect else "markers",
                "line": {"color": series_colour(s) + "/0.5", "width": 1.2},
                "marker": {
                    "color": series_colour(s),
                    "size": 9,
                    "symbol": _SYMBOLS[s % len(_SYMBOLS)],
                    "line": {"color": "$paper", "width": 1},
                },
            }
        traces.append(trace)
    span = (-0.5, n - 0.5)
    traces = _references(figure, span, lying) + traces
    value_title = str(figure.options.get("y_label") or _label(ds, "value"))
    item_title = str(figure.options.get("x_label", ""))
    value_axis = _axis(value_title, rangemode="tozero" if bars else "normal")
    if "y_range" in figure.options:
        value_axis["range"] = list(figure.options["y_range"])
    ticks = items[::-1] if lying else items
    layout: dict[str, Any] = {"barmode": "overlay"} if bars else {}
    layout |= {
        "xaxis": value_axis if lying else _items_axis(ticks, item_title),
        "yaxis": _items_axis(ticks, item_title) if lying else value_axis,
    }
    height = int(np.clip(90 + n * (20 + 14 * min(k, 4)), 280, 1400)) if lying else 380
    wide = (not lying and n * k > 24) or height > 700
    return Drawn(_plot(traces, layout, height), frame(figure), wide=wide)


def _draw_curve(figure: Figure) -> Drawn:
    ds = figure.data
    x = _values(ds, "x")
    many = "series" in ds["value"].dims
    names = _text(ds["series"].values) if many and "series" in ds.variables else [""]
    if many and len(names) != ds.sizes["series"]:
        names = [str(i + 1) for i in range(ds.sizes["series"])]
    dims = ("series", "x") if many else ("x",)
    k = len(names)
    arrays = {
        v: _reordered(ds[v], *dims).reshape(k, x.size) for v in ("value", "low", "high") if v in ds
    }
    traces = _references(figure, (float(np.nanmin(x)), float(np.nanmax(x))), False)
    for s, name in enumerate(names):
        value, colour = arrays["value"][s], series_colour(s)
        low = arrays.get("low", np.full((k, x.size), np.nan))[s]
        high = arrays.get("high", np.full((k, x.size), np.nan))[s]
        known = np.isfinite(low) & np.isfinite(high)
        if known.any():
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": np.r_[x[known], x[known][::-1]],
                    "y": np.r_[low[known], high[known][::-1]],
                    "fill": "toself",
                    "fillcolor": colour + "/0.18",
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                    "legendgroup": str(s),
                }
            )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if x.size <= 40 else "lines",
                "x": x,
                "y": value,
                "name": name,
                "showlegend": k > 1,
                "legendgroup": str(s),
                "line": {
                    "color": colour,
                    "width": 2.2,
                    "dash": ("solid", "dash", "dot")[s // 8 % 3],
                },
                "marker": {"color": colour, "size": 7, "symbol": _SYMBOLS[s % len(_SYMBOLS)]},
                "customdata": [
                    (f"<b>{name}</b><br>" if name else "")
                    + f"{format_number(a)}: {_shown(v, lo, hi)}"
                    for a, v, lo, hi in zip(x, value, low, high, strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    layout = {
        "xaxis": _axis(str(figure.options.get("x_label") or _label(ds, "x"))),
        "yaxis": _axis(str(figure.options.get("y_label") or _label(ds, "value"))),
    }
    if figure.options.get("x_log"):
        layout["xaxis"]["type"] = "log"
        if x.size <= _MAX_TICKS:
            # By itself the page would write only the first digit between decades.
            layout["xaxis"] |= {"tickvals": x, "ticktext": [format_number(v) for v in x]}
    if figure.options.get("y_log"):
        shown = np.concatenate([a[np.isfinite(a) & (a > 0)] for a in arrays.values()])
        ends = np.log10([shown.min(), shown.max()]) if shown.size else np.zeros(2)
        decades = 10.0 ** np.arange(np.floor(ends[0]), np.ceil(ends[1]) + 1)
        ticks = np.outer(decades, [1, 2, 5]).ravel()
        layout["yaxis"] |= {
            "type": "log",
            "tickvals": ticks,
            "ticktext": [format_number(v) for v in ticks],
        }
    return Drawn(_plot(traces, layout, 380), frame(figure))


def _draw_scatter(figure: Figure) -> Drawn:
    ds = figure.data
    x, y = _values(ds, "x"), _values(ds, "y")
    groups = np.array(_text(ds["group"].values)) if "group" in ds.variables else np.full(x.size, "")
    labels = np.array(_text(ds["label"].values)) if "label" in ds.variables else np.full(x.size, "")
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    note = ""
    if finite.size > _MAX_POINTS:
        note = f"Drawn: a random {_MAX_POINTS:,} of {finite.size:,} points; the CSV has all."
        finite = np.sort(np.random.default_rng(0).choice(finite, _MAX_POINTS, replace=False))
    names = list(dict.fromkeys(groups[finite].tolist()))
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(map(float, line["x"])),
            "y": list(map(float, line["y"])),
            "line": {"color": "$muted", "width": 1.4},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for line in figure.options.get("outlines", [])
    ]
    coloured: dict[str, Any] = {}
    value = _values(ds, "value") if "value" in ds.variables else None
    if value is not None:
        hint = _hint(figure, ds["value"].attrs, "sequential")
        low, high = colour_limits(value, hint, {**ds["value"].attrs, **figure.options}, trim=0.0)
        coloured = {
            "cmin": low,
            "cmax": high,
            "colorscale": colourscale(hint),
            "colorbar": {
                "title": {"text": plot_text(_label(ds, "value")), "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
        }
    if figure.options.get("identity_line") and finite.size:
        ends = [
            float(max(x[finite].min(), y[finite].min())),
            float(min(x[finite].max(), y[finite].max())),
        ]
        if ends[0] < ends[1]:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": ends,
                    "y": ends,
                    "line": {"color": "$text", "width": 1.4, "dash": "dash"},
                    "name": "equal",
                    "hoverinfo": "skip",
                }
            )
    for s, name in enumerate(names):
        chosen = finite[groups[finite] == name]
        dense = finite.size > 800
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": x[chosen],
                "y": y[chosen],
                "name": name,
                "showlegend": len(names) > 1,
                "marker": {
                    "color": series_colour(s) + ("/0.45" if dense else "/0.8"),
                    "size": 4 if dense else 8,
                    "symbol": _SYMBOLS[s % len(_SYMBOLS)],
                    "line": {"color": "$paper", "width": 0 if dense else 0.8},
                }
                if value is None
                else {
                    "color": value[chosen],
                    **coloured,
                    "showscale": s == 0,
                    "size": 6 if dense else 13,
                    "symbol": _SYMBOLS[s % len(_SYMBOLS)],
                    "line": {"color": "$text", "width": 0 if dense else 0.6},
                },
                "customdata": [
                    "<br>".join(
                        p
                        for p in (
                            f"<b>{labels[i]}</b>" if labels[i] else "",
                            name,
                            f"{format_number(x[i])}, {format_number(y[i])}"
                            if value is None
                            else format_number(value[i]),
                        )
                        if p
                    )
                    for i in chosen.tolist()
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    layout = {
        "xaxis": _axis(str(figure.options.get("x_label") or _label(ds, "x", "x"))),
        "yaxis": _axis(str(figure.options.get("y_label") or _label(ds, "y", "y"))),
    }
    layout["legend"] = {"itemsizing": "constant"}
    square = bool(figure.options.get("equal_axes", False))
    if square:
        layout["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
        layout["xaxis"]["constrain"] = "domain"
    return Drawn(_plot(traces, layout, 420, square=square), frame(figure), note=note)


def _draw_cells(figure: Figure) -> Drawn:
    """Draw values by row and column: kinds heatmap and matrix."""
    ds, square = figure.data, figure.kind == "matrix"
    z = _reordered(ds["value"], "row", "column")
    rows, columns = (
        _text(ds[d].values) if d in ds.variables else [str(i + 1) for i in range(ds.sizes[d])]
        for d in ("row", "column")
    )
    hint = _hint(figure, ds["value"].attrs, "matrix" if square else "sequential")
    low, high = colour_limits(z, hint, {**ds["value"].attrs, **figure.options}, trim=0.0)
    bounds = [_reordered(ds[v], "row", "column") if v in ds else None for v in ("low", "high")]
    lows, highs = bounds
    hover = [
        [
            f"<b>{r}</b> · <b>{c}</b><br>"
            + _shown(
                z[i, j],
                None if lows is None else lows[i, j],
                None if highs is None else highs[i, j],
            )
            for j, c in enumerate(columns)
        ]
        for i, r in enumerate(rows)
    ]
    title = str(figure.options.get("label") or _label(ds, "value"))
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": z,
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "zmin": low,
        "zmax": high,
        "colorscale": colourscale(hint),
        "xgap": 1 if z.size < 2500 else 0,
        "ygap": 1 if z.size < 2500 else 0,
        "customdata": hover,
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorbar": {
            "title": {"text": plot_text(title), "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    }
    traces = [trace]
    if z.size <= _MAX_CELLS_WITH_TEXT:
        traces.append(_numbers_in_cells(z, hint, low, high))
    shapes = []
    best = figure.options.get("best_in")
    if best is not None and best not in ("row", "column"):
        raise SchemaError(
            f"Figure {figure.id!r}: option best_in is {best!r}; it may be 'row' or 'column'."
        )
    for i, j in _best_cells(z, best):
        shapes.append(
            {
                "type": "rect",
                "x0": j - 0.47,
                "x1": j + 0.47,
                "y0": i - 0.45,
                "y1": i + 0.45,
                "line": {"color": "$mark", "width": 2.4},
            }
        )
    layout: dict[str, Any] = {
        "xaxis": _items_axis(columns, str(figure.options.get("x_label", ""))),
        "yaxis": _items_axis(rows, str(figure.options.get("y_label", ""))),
        "shapes": shapes,
    }
    layout["xaxis"]["range"] = [-0.5, len(columns) - 0.5]
    layout["yaxis"]["range"] = [len(rows) - 0.5, -0.5]
    if square:
        layout["yaxis"] |= {"scaleanchor": "x", "constrain": "domain"}
        layout["xaxis"]["constrain"] = "domain"
    height = int(np.clip(130 + len(rows) * (44 if square else 32), 300, 1200))
    note = f"Outlined: the highest value of each {best}." if best else ""
    wide = not square and (len(columns) > 9 or height > 700)
    spec = _plot(
        traces,
        layout,
        460 if square and len(rows) < 12 else height,
        columns=len(columns),
        square=square,
    )
    return Drawn(spec, frame(figure), note=note, wide=wide)


def _numbers_in_cells(z: np.ndarray, hint: str, low: float, high: float) -> dict[str, Any]:
    """Return the numbers as text, black or white by the luminance of the colour they stand on."""
    size = float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 1.0
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    table = colour_table(hint) / 255.0
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    rows, columns = np.nonzero(np.isfinite(z))
    values = z[rows, columns]
    place = np.clip((values - low) / (high - low), 0, 1) * (len(table) - 1)
    # 0.179 is where black and white stand out equally (WCAG's contrast).
    dark = luminance[place.round().astype(int)] > 0.179
    text = [f"{v:.{decimals}f}".replace("-", "−") for v in values]
    return {
        "type": "scatter",
        "mode": "text",
        "x": columns,
        "y": rows,
        "text": [t.replace("0.", ".", 1) if size <= 1 else t for t in text],
        "textfont": {"color": np.where(dark, "#101010", "#ffffff").tolist()},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _best_cells(z: np.ndarray, best: str | None) -> list[tuple[int, int]]:
    if best == "column":
        return [(int(np.nanargmax(c)), j) for j, c in enumerate(z.T) if np.isfinite(c).any()]
    if best == "row":
        return [(i, int(np.nanargmax(r))) for i, r in enumerate(z) if np.isfinite(r).any()]
    return []


def _density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return a smoothed histogram on the centres of `edges`, its peak 1."""
    from scipy.ndimage import gaussian_filter1d

    counts = np.histogram(values, edges)[0].astype(float)
    spread = min(float(np.std(values)), float(np.subtract(*np.percentile(values, [75, 25]))) / 1.34)
    width = 0.9 * (spread or float(np.std(values))) * values.size**-0.2 / (edges[1] - edges[0])
    smooth = gaussian_filter1d(counts, max(width, 0.8), mode="constant")
    return smooth / smooth.max()


def _draw_distribution(figure: Figure) -> Drawn:
    ds = figure.data
    value = _values(ds, "value")
    group = np.array(_text(ds["group"].values))
    ceiling = _values(ds, "ceiling") if "ceiling" in ds.variables else None
    names = list(dict.fromkeys(group.tolist()))
    every = value if ceiling is None else np.concatenate([value, np.atleast_1d(ceiling)])
    every = every[np.isfinite(every)]
    if every.size == 0:
        raise SchemaError(f"Figure {figure.id!r} has no finite value to draw.")
    low, high = float(every.min()), float(every.max())
    pad = 0.12 * (high - low) or 0.5
    edges = np.linspace(low - pad, high + pad, 161)
    centres = (edges[1:] + edges[:-1]) / 2
    traces: list[dict[str, Any]] = []
    rows, first = [], True
    filled = "distribution" if ceiling is None else "scores"
    for g, name in enumerate(names):
        y0 = len(names) - 1 - g
        mine = value[(group == name) & np.isfinite(value)]
        tops = np.array([])
        if ceiling is not None:
            tops = (
                ceiling[(group == name) & np.isfinite(ceiling)] if ceiling.ndim else ceiling[None]
            )
        if mine.size:
            d = _density(mine, edges)
            on = np.flatnonzero(d > 0.004)
            on = np.arange(on[0], on[-1] + 1)
            q = np.percentile(mine, [25, 50, 75])
            traces.append(_ridge(centres[on], d[on], y0, first, "$c0", filled))
            text = (
                f"<b>{name}</b><br>n = {mine.size:,}<br>median {format_number(q[1])}"
                f"<br>quartiles {_shown_range(q[0], q[2])}"
            )
            traces += [
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [q[0], q[2]],
                    "y": [y0, y0],
                    "line": {"color": "$text", "width": 4},
                    "hoverinfo": "skip",
                    "name": "quartiles",
                    "legendgroup": "half",
                    "showlegend": first,
                },
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [q[1]],
                    "y": [y0],
                    "marker": {
                        "color": "$paper",
                        "size": 9,
                        "line": {"color": "$text", "width": 2},
                    },
                    "customdata": [text],
                    "hovertemplate": "%{customdata}<extra></extra>",
                    "name": "median",
                    "legendgroup": "median",
                    "showlegend": first,
                },
            ]
        if tops.size:
            middle = float(np.median(tops))
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [middle, middle],
                    "y": [y0 - 0.06, y0 + 0.8],
                    "line": {"color": "$c1", "width": 2.4},
                    "name": "median ceiling",
                    "legendgroup": "ceiling",
                    "showlegend": first,
                    "customdata": [f"<b>{name}</b><br>median ceiling {format_number(middle)}"] * 2,
                    "hovertemplate": "%{customdata}<extra></extra>",
                }
            )
            if np.ptp(tops) > 0:
                d = _density(tops, edges)
                on = np.flatnonzero(d > 0.004)
                on = np.arange(on[0], on[-1] + 1)
                traces.append(_ridge(centres[on], d[on], y0, first, "$c1", "ceilings", line=True))
        first = False
        record: dict[str, Any] = {"group": name, "n": mine.size}
        for label, p in (("lower quartile", 25), ("median", 50), ("upper quartile", 75)):
            record[label] = float(np.percentile(mine, p)) if mine.size else np.nan
        if ceiling is not None:
            record["median ceiling"] = float(np.median(tops)) if tops.size else np.nan
        rows.append(record)
    span = (-0.2, len(names) - 0.05)
    traces = _references(figure, span, True) + traces
    axis = _items_axis(names[::-1])
    axis |= {"range": [-0.35, len(names) + 0.05], "showgrid": True}
    layout = {
        "xaxis": _axis(str(figure.options.get("x_label") or _label(ds, "value"))),
        "yaxis": axis,
    }
    height = int(np.clip(130 + 58 * len(names), 300, 1400))
    table = pd.DataFrame(rows)
    table["group"] = [clean(g) for g in dict.fromkeys(map(str, ds["group"].values.tolist()))]
    return Drawn(
        _plot(traces, layout, height), table, table_note="Summary by group.", wide=height > 760
    )


def _ridge(
    x: np.ndarray,
    density: np.ndarray,
    base: float,
    legend: bool,
    colour: str,
    name: str,
    line: bool = False,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": np.r_[x[0], x, x[-1]],
        "y": base + 0.78 * np.r_[0, density, 0],
        "fill": "none" if line else "toself",
        "fillcolor": colour + "/0.35",
        "line": {"color": colour, "width": 1.6, "dash": "dot" if line else "solid"},
        "hoverinfo": "skip",
        "name": name,
        "legendgroup": name,
        "showlegend": legend,
    }


def _hex(colour: np.ndarray) -> str:
    return "#" + bytes(colour.tolist()).hex()


def _webp(picture: Any, quality: int = 88) -> bytes:
    stream = BytesIO()
    picture.save(stream, "WEBP", quality=quality, method=5)
    return stream.getvalue()


def _thumbnail(source: Any, side: int) -> Any:
    """Return a picture (an image or a path) whose longer side is at most `side` pixels."""
    from PIL import Image, ImageOps

    if not isinstance(source, Image.Image):
        with Image.open(source) as opened:
            opened.load()
            source = opened
    mode = "RGBA" if "A" in source.mode or "transparency" in source.info else "RGB"
    small = ImageOps.exif_transpose(source).convert(mode)
    small.thumbnail((side, side))
    return small


def _strip(pictures: list[Any], cell: int, rows: int, upright: bool) -> str:
    """Return thumbnails along an axis, staggered in `rows` rows, as a data address.

    A thumbnail is `rows` cells wide and centred on its own cell.
    """
    from PIL import Image, ImageOps

    side = cell * rows
    length = cell * (len(pictures) + rows - 1)
    canvas = Image.new("RGBA", (side * rows, length) if upright else (length, side * rows))
    for i, part in enumerate(pictures):
        if part is not None:
            fitted = ImageOps.pad(part.convert("RGBA"), (side, side), color=(0, 0, 0, 0))
            row = side * (rows - 1 - i % rows)
            canvas.alpha_composite(fitted, (row, i * cell) if upright else (i * cell, row))
    return "data:image/webp;base64," + base64.b64encode(_webp(canvas, 78)).decode()


def _block_means(rdm: np.ndarray, n: int) -> np.ndarray:
    """Return a matrix averaged over n x n blocks of nearly equal size."""
    ends = np.linspace(0, len(rdm), n + 1).round().astype(int)
    sums = np.add.reduceat(np.add.reduceat(rdm, ends[:-1], axis=0), ends[:-1], axis=1)
    counts = np.diff(ends)
    return sums / np.outer(counts, counts)


def _draw_rdm(figure: Figure, prefix: str) -> Drawn:
    from scipy.stats import rankdata

    ds = figure.data
    rdms = _reordered(ds["rdm"], "rdm_name", "stimulus", "stimulus_2")
    names = _text(ds["rdm_name"].values)
    identity = [str(s) for s in ds["stimulus_id"].values.tolist()]
    n = len(identity)
    raw = figure.options.get("scale", "rank") == "value"
    upper = np.triu_indices(n, 1)
    thumbs = {
        name: _thumbnail(figure.images[name], 112) for name in identity if name in figure.images
    }
    files = {name: f"{prefix}-{i:04d}.webp" for i, name in enumerate(thumbs)}
    note = ""
    if n > _MAX_RDM:
        note = f"Drawn: averages over {_MAX_RDM} blocks of stimuli; the CSV has all {n:,}."
    panels = []
    for name, rdm in zip(names, rdms, strict=True):
        shown = rdm.copy()
        if not raw:
            known = np.isfinite(rdm[upper])
            ranks = np.full(upper[0].size, np.nan)
            if known.sum() > 1:
                ranks[known] = (rankdata(rdm[upper][known]) - 1) / (known.sum() - 1) * 100
            shown[upper] = ranks
            shown.T[upper] = ranks
        np.fill_diagonal(shown, np.nan if n <= _MAX_RDM else 0.0)
        if n > _MAX_RDM:
            shown = _block_means(shown, _MAX_RDM)
        panel: dict[str, Any] = {"name": name, "z": _typed(shown)}
        if n <= _MAX_RDM:
            panel["values"] = _typed(rdm)
        panel["limits"] = [0, 100] if not raw else list(colour_limits(rdm[upper], "sequential", {}))
        panels.append(panel)
    spec: dict[str, Any] = {
        "type": "rdm",
        "panels": panels,
        "n": min(n, _MAX_RDM),
        "labels": [plot_text(s) for s in identity] if n <= _MAX_RDM else [],
        "colorscale": colourscale("matrix"),
        "title": "dissimilarity" if raw else "dissimilarity (percentile)",
        "files": [files.get(s, "") for s in identity] if n <= _MAX_RDM else [],
    }
    groups = _runs(ds)
    if groups:
        spec["groups"] = groups
    if thumbs and n <= _MAX_RDM:
        pictures = [thumbs.get(s) for s in identity]
        stagger = 1 if n <= 24 else 2 if n <= 56 else 3 if n <= 110 else 4
        cell = int(np.clip(1900 // n, 4, 40))
        spec["strip"] = {
            "rows": stagger,
            "x": _strip(pictures, cell, stagger, False),
            "y": _strip(pictures, cell, stagger, True),
        }
    rows = []
    for name, rdm in zip(ds["rdm_name"].values.tolist(), rdms, strict=True):
        v = rdm[upper][np.isfinite(rdm[upper])]
        q = np.percentile(v, [0, 50, 100]) if v.size else [np.nan] * 3
        rows.append(
            {
                "RDM": clean(name),
                "stimuli": n,
                "pairs": v.size,
                "lowest": q[0],
                "median": q[1],
                "highest": q[2],
            }
        )
    return Drawn(
        spec,
        pd.DataFrame(rows),
        table_note="Summary by matrix; the CSV has every pair.",
        note=note,
        pictures={files[name]: _webp(t, 80) for name, t in thumbs.items()},
        maps=[{"label": clean(s), "file": files[s]} for s in identity if s in files],
        wide=True,
    )


def _typed(matrix: np.ndarray) -> dict[str, Any]:
    """Return an array in plotly's packed form."""
    packed = base64.b64encode(np.ascontiguousarray(matrix, dtype="<f4").tobytes()).decode()
    return {"dtype": "f4", "bdata": packed, "shape": ", ".join(map(str, matrix.shape))}


def _runs(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return runs of equal category along the stimuli: label, first index, one past the last."""
    if "category" not in ds.variables or ds["category"].dims != ("stimulus",):
        return []
    category = _text(ds["category"].values)
    starts = [i for i, c in enumerate(category) if i == 0 or c != category[i - 1]]
    if len(starts) > 16:
        return []
    return [
        {"label": category[a], "from": a, "to": b}
        for a, b in zip(starts, [*starts[1:], len(category)], strict=True)
    ]


def _hemispheres(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by hemisphere, the rows of its vertices and their indices."""
    ds = figure.data
    side = np.array([str(h) for h in ds["hemisphere"].values.tolist()])
    vertex = np.asarray(ds["vertex"].values)
    unknown = set(side.tolist()) - {"L", "R"}
    if unknown:
        raise SchemaError(
            f"Figure {figure.id!r}: hemisphere must be 'L' or 'R', not {sorted(unknown)}."
        )
    if vertex.dtype.kind not in "iu" or (vertex < 0).any() or (vertex >= surface.N_VERTICES).any():
        raise SchemaError(
            f"Figure {figure.id!r}: vertex must hold integers from 0 to {surface.N_VERTICES - 1}, "
            "the vertices of fsaverage5.",
            "Resample the map to fsaverage5 first.",
        )
    return {h: (rows := np.flatnonzero(side == h), vertex[rows]) for h in "LR"}


def _draw_surface(figure: Figure, prefix: str) -> Drawn:
    ds = figure.data
    where = _hemispheres(figure)
    roi = _text(ds["roi"].values) if "roi" in ds.variables else []
    names = [
        str(v) for v in ds.data_vars if ds[v].dims == ("vertex",) and ds[v].dtype.kind in "fiub"
    ]
    names = [v for v in names if v not in ("hemisphere", "vertex", "roi")]
    if not names:
        raise SchemaError(f"Figure {figure.id!r} (surface) has no map: a number for every vertex.")
    meshes = surface.inflated()
    maps, listed, pictures = [], [], {}
    for m, name in enumerate(names):
        attrs = dict(ds[name].attrs)
        values = _values(ds, name)
        if "threshold" in attrs:
            values = np.where(np.abs(values) < float(attrs["threshold"]), np.nan, values)
        hint = str(attrs.get("cmap", "sequential"))
        labels: list[str] | None = None
        if hint == "categorical":
            given = attrs.get("labels", "[]")
            labels = [clean(x) for x in (json.loads(given) if isinstance(given, str) else given)]
            top = int(np.nanmax(values)) + 1 if np.isfinite(values).any() else 1
            labels += [str(i) for i in range(len(labels), top)]
            table = colour_table(hint, len(labels))
            low, high = 0.0, float(max(len(labels) - 1, 1))
            table = table if len(labels) > 1 else np.repeat(table, 2, axis=0)
        else:
            table = colour_table(hint)
            low, high = colour_limits(values, hint, attrs)
        finite = values[np.isfinite(values)]
        ends = (
            ("≤ " if finite.size and finite.min() < low else "") + format_number(low),
            ("≥ " if finite.size and finite.max() > high else "") + format_number(high),
        )
        title = _label(ds, name, name)
        full = {}
        for h, (rows, vertex) in where.items():
            full[h] = np.full(surface.N_VERTICES, np.nan)
            full[h][vertex] = values[rows]
        colours = {
            h: surface.colour_vertices(full[h], table, low, high, meshes[h].sulcus) for h in "LR"
        }
        drawn = surface.picture(
            colours, table=table, ends=None if labels else ends, title=clean(title), labels=labels
        )
        file = f"{prefix}-{m:02d}.webp"
        pictures[file] = _webp(drawn)
        maps.append(
            {
                "name": plot_text(title),
                "values": {h: surface.pack_values(full[h]) for h in "LR"},
                "low": low,
                "high": high,
                "table": base64.b64encode(table.tobytes()).decode(),
                "labels": [plot_text(x) for x in labels] if labels else None,
            }
        )
        listed.append(
            {
                "name": clean(title),
                "file": file,
                "width": drawn.width,
                "height": drawn.height,
                "ends": ends,
                "labels": [{"label": x, "colour": _hex(table[i])} for i, x in enumerate(labels)]
                if labels
                else [],
                "table": [_hex(c) for c in table[:: max(len(table) // 12, 1)]],
                "alt": _surface_alt(clean(title), values, labels),
            }
        )
    spec: dict[str, Any] = {"type": "surface", "maps": maps}
    if roi:
        known = sorted(set(roi) - {""})
        place = {r: i + 1 for i, r in enumerate(known)}
        spec["rois"] = known
        spec["roi"] = {}
        for h, (rows, vertex) in where.items():
            index = np.zeros(surface.N_VERTICES, dtype="<u2")
            index[vertex] = [place.get(roi[r], 0) for r in rows]
            spec["roi"][h] = base64.b64encode(index.tobytes()).decode()
    return Drawn(
        spec,
        _surface_table(figure, names),
        table_note="Means over vertices; the CSV has every vertex.",
        pictures=pictures,
        maps=listed,
        wide=True,
    )


def _surface_alt(title: str, values: np.ndarray, labels: list[str] | None) -> str:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return f"{title} on the inflated cortex: no vertex has a value."
    if labels:
        counts = np.bincount(finite.astype(int), minlength=len(labels))
        said = ", ".join(f"{x} {c}" for x, c in zip(labels, counts.tolist(), strict=True))
        return f"{title} on the inflated cortex, vertices per category: {said}."
    q = [format_number(v) for v in np.percentile(finite, [0, 50, 100])]
    return (
        f"{title} on the inflated cortex, {finite.size} vertices: "
        f"lowest {q[0]}, median {q[1]}, highest {q[2]}."
    )


def _surface_table(figure: Figure, names: list[str]) -> pd.DataFrame:
    data = frame(figure)
    by = ["hemisphere", "roi"] if "roi" in data else ["hemisphere"]
    if "roi" in data:
        data["roi"] = data["roi"].replace("", "(none)")
    numeric = [n for n in names if figure.data[n].attrs.get("cmap") != "categorical"]
    grouped = data.groupby(by, sort=True, dropna=False)
    table = grouped.size().rename("vertices").to_frame()
    if numeric:
        table = table.join(grouped[numeric].mean())
    return table.reset_index()


def _draw_images(figure: Figure, prefix: str) -> Drawn:
    ds = figure.data
    names = [str(f) for f in ds["filename"].values.tolist()]
    missing = [f for f in names if f not in figure.images]
    if missing:
        raise SchemaError(f"Figure {figure.id!r} has no image named {clean(missing[0])!r}.")
    label = [clean(x) for x in ds["label"].values.tolist()]
    group = (
        [clean(x) for x in ds["group"].values.tolist()]
        if "group" in ds.variables
        else [""] * len(names)
    )
    panel = (
        [clean(x) for x in ds["panel"].values.tolist()]
        if "panel" in ds.variables
        else [""] * len(names)
    )
    value = _values(ds, "value") if "value" in ds.variables else None
    files = {name: f"{prefix}-{i:04d}.webp" for i, name in enumerate(dict.fromkeys(names))}
    thumbs = {name: _thumbnail(figure.images[name], 240) for name in files}
    maps = [
        {
            "file": files[f],
            "label": x,
            "group": g,
            "panel": p,
            "value": "" if value is None else format_number(float(value[i])),
            "width": thumbs[f].width,
            "height": thumbs[f].height,
        }
        for i, (f, x, g, p) in enumerate(zip(names, label, group, panel, strict=True))
    ]
    return Drawn(
        None,
        frame(figure),
        pictures={files[n]: _webp(t, 82) for n, t in thumbs.items()},
        maps=maps,
        wide=True,
    )


def _searchable(table: pd.DataFrame) -> dict[str, Any]:
    """Return a table as the page searches and sorts it: typed numbers, text as words and codes."""
    columns: list[dict[str, Any]] = []
    for i, name in enumerate(table.columns):
        values, kind = table.iloc[:, i], table.dtypes.iloc[i]
        if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind):
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            exact = np.float32 if pd.api.types.is_float_dtype(kind) else np.float64
            columns.append({"name": clean(name), **_column(numbers.astype(exact))})
            continue
        texts = [said(v).replace("\n", " ") for v in values.tolist()]
        codes, words = pd.factorize(np.array(texts, dtype=object))
        size = np.uint8 if len(words) < 2**8 else np.uint16 if len(words) < 2**16 else np.uint32
        # One text for all words, a line each: a hundred thousand of them are one string to check.
        packed = clean("\n".join(words))
        columns.append({"name": clean(name), **_column(codes.astype(size)), "words": packed})
    return {"rows": len(table), "columns": columns}


def _column(values: np.ndarray) -> dict[str, str]:
    little = values.astype(values.dtype.newbyteorder("<"))
    packed = base64.b64encode(little.tobytes()).decode("ascii")
    return {"dtype": f"{values.dtype.kind}{values.dtype.itemsize}", "bdata": packed}


def said(value: Any) -> str:
    """Return a cell that is no number as it is read: yes or no, a dash for nothing, or its text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return "–" if value is None or value is pd.NA or value != value else str(value)


def draw(figure: Figure, prefix: str) -> Drawn:
    """Return what the page needs to show a figure.

    Parameters
    ----------
    figure : Figure
        Data and words.
    prefix : str
        With what its files' names begin.

    Raises
    ------
    SchemaError
        If the data cannot be drawn: a hemisphere, vertex, image or option at fault.
    """
    kind = figure.kind
    if kind == "surface":
        return _draw_surface(figure, prefix)
    if kind == "rdm":
        return _draw_rdm(figure, prefix)
    if kind == "image_grid":
        return _draw_images(figure, prefix)
    if kind == "table":
        table = frame(figure)
        spec = _searchable(table) if len(table) > ROWS_OF_TABLE else None
        return Drawn(spec, table, wide=len(table.columns) > 4 or spec is not None)
    if kind in ("points", "bars"):
        return _draw_items(figure)
    if kind in ("heatmap", "matrix"):
        return _draw_cells(figure)
    plain = {"curve": _draw_curve, "scatter": _draw_scatter, "distribution": _draw_distribution}
    if kind not in plain:
        raise SchemaError(
            f"Figure {figure.id!r} is of kind {kind!r}, which the report cannot draw."
        )
    return plain[kind](figure)


def frame(figure: Figure) -> pd.DataFrame:
    """Return the data of a figure as a table: what its CSV holds."""
    ds = figure.data
    if figure.kind == "rdm":
        identity = np.array(ds["stimulus_id"].values.tolist(), dtype=object)
        first, second = np.triu_indices(len(identity), 1)
        rdms = _reordered(ds["rdm"], "rdm_name", "stimulus", "stimulus_2")
        columns = {
            str(n): r[first, second]
            for n, r in zip(ds["rdm_name"].values.tolist(), rdms, strict=True)
        }
        return pd.DataFrame(
            {"stimulus": identity[first], "stimulus_2": identity[second], **columns}
        )
    if figure.kind == "surface":
        dims = [v for v in ds.variables if ds[v].dims == ("vertex",)]
        order = ["hemisphere", "vertex", *[v for v in dims if v not in ("hemisphere", "vertex")]]
        table = pd.DataFrame({str(v): np.asarray(ds[v].values) for v in order})
        maps = [v for v in table if v not in ("hemisphere", "vertex", "roi")]
        table = table[table[maps].notna().any(axis=1)] if maps else table
        return table.assign(hemisphere=table["hemisphere"].astype(str)).reset_index(drop=True)
    indexed = [str(d) for d in ds.dims if d in ds.variables]
    table = ds.to_dataframe(dim_order=[str(d) for d in ds.dims]).reset_index()
    unnamed = [str(d) for d in ds.dims if str(d) not in indexed and str(d) in table]
    return table.drop(columns=unnamed)
