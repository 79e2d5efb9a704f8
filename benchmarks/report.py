"""Write docs/benchmarks.md and its pictures from the JSON records, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: Title of a section: the records that it shows.
SECTIONS = {
    "Ridge, one alpha per target": ("ridge_kfold", "ridge_alphas", "ridge_wide", "ridge_closed"),
    "Banded ridge": ("banded",),
    "Temporal response functions": ("trf",),
    "Representational similarity": ("rsa",),
    "Permutation test and bootstrap": ("significance",),
    "Voxel weights on a library of embeddings": ("scuba",),
    "One subject of the size of NSD, from disk to disk": ("nsd",),
    "Octave noise and its pyramids": ("critical_band",),
    "On a GPU": ("gpu",),
    "Brain-guided sampling, Stable Diffusion 2.1 in size": (
        "braindive_cpu",
        "braindive_cuda",
    ),
    "Images for the regions of a simulated subject": ("braindive_truth",),
    "Encoders by gradient descent and by ridge": ("probe",),
}
#: Sections on attention, whose rows tell several peers and the memory of each.
ATTENTION = {
    "Attention on the CPU": ("attention_lightning", "attention_neighborhood"),
    "Attention on a GPU": ("attention_gpu",),
}
#: Entries of a row's work that the table tells, with the word for their unit.
SIZES = {
    "targets": "targets", "n_targets": "targets", "channels": "channels", "alphas": "alphas",
    "n_alphas": "alphas", "n_gammas": "gammas", "penalties": "penalties", "folds": "folds",
    "n_folds": "folds", "samples": "samples", "trials": "trials", "dtype": "",
}  # fmt: skip
INTRO = """# Benchmarks

Each row runs ours and a peer on the same arrays, folds, type and threads, in one process, in
turn, once to warm up and then several times; the times are medians. A row whose accuracy check
fails counts as failed, however fast it was. The scripts are in `benchmarks/`, what they wrote in
`benchmarks/results/`, and this page is made from those files by `python benchmarks/report.py`.
Ratios travel between machines better than times do: run the scripts on yours.

```bash
make setup                                        # or: pip install himalaya mtrf
OMP_NUM_THREADS=2 python benchmarks/ridge.py     # and banded.py, trf.py, rsa.py, nsd.py, scaling.py
OMP_NUM_THREADS=2 python benchmarks/scuba.py     # embeddings of 2 GB on disk, some minutes
OMP_NUM_THREADS=1 python benchmarks/critical_band.py --threads 1    # with pyrtools installed
OMP_NUM_THREADS=2 python benchmarks/attention_lightning.py    # and attention_neighborhood.py
python benchmarks/gpu.py                         # on a machine with a CUDA device; attention_gpu.py
OMP_NUM_THREADS=2 python benchmarks/braindive.py # on a CPU 11 GiB and a quarter of an hour
python benchmarks/braindive_truth.py --workers 2 # pictures for a simulated subject: no times
python benchmarks/probe.py                       # held-out correlations: no times
python benchmarks/report.py
```
"""


def records() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(harness.RESULTS.glob("*.json")):
        made = json.loads(path.read_text())
        found[made["benchmark"]] = made
    return found


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Write what was measured; columns that no row has anything in are left out."""
    heads = ("work", "ours (s)", "peer (s)", "ratio", "claimed", "accuracy")
    marks = ("---", "---:", "---:", "---:", "---:", "---")
    lines = []
    for row in rows:
        times, peer = row.get("times", {}), row.get("peer", "")
        ours = times.get("ours", {}).get("median_s")
        theirs = times.get(peer, {}).get("median_s")
        checks = [
            f"{name} {c['value']:.3g} ({'≤' if c['relation'] == '<=' else '≥'} {c['bound']:g})"
            + ("" if c["holds"] else " **fails**")
            for name, c in row.get("accuracy", {}).items()
        ]
        made = {k: row.get("generated", {}).get(k) for k in ("activation", "labelled")}
        told = row.get("measured", {} if checks else made)
        checks += [f"{name} {value:.3g}" for name, value in told.items() if value is not None]
        lines.append(
            (
                row["case"] + sizes(row) + ("" if row.get("passed", True) else " **(failed)**"),
                "" if ours is None else seconds(ours),
                "" if theirs is None else f"{seconds(theirs)} {peer}",
                f"{row['ratio']:.1f}" if "ratio" in row else "",
                f"{row['required']:.2g}" if "required" in row else "",
                "; ".join(checks),
            )
        )
    columns = [c for c in zip(heads, marks, *lines, strict=True) if any(c[2:])]
    head, mark, *body = zip(*columns, strict=True)
    written = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return "\n".join([written[0], "|" + "|".join(mark) + "|", *written[1:]])


def attention_table(rows: list[dict[str, Any]]) -> str:
    """Time and peak memory of ours and of each peer; on a GPU the shares of the card's limits."""
    rows = [row for row in rows if "times" in row]
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        # A case is stored once for each peer, with the times of all.
        known = merged.setdefault(row["case"], {**row, "passed": True})
        known["passed"] &= row.get("passed", True)
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    heads = [f"{name} (s; MiB)" for name in names]
    lines = [
        f"| work | {' | '.join(heads)} | share of the limit | accuracy |",
        "|---|" + "---:|" * (len(names) + 1) + "---|",
    ]
    for case, row in merged.items():
        memory = row["work"].get("peak_mib") or row["work"].get("peak_device_mib") or {}
        cells = [case + ("" if row["passed"] else " **(failed)**")]
        for name in names:
            time, peak = row["times"].get(name), memory.get(name)
            told = "" if time is None else seconds(time["median_s"])
            cells.append(told + (f"; {peak:,.0f}" if told and peak is not None else ""))
        shares = [row["work"].get(f"share_of_{x}") for x in ("matrix_rate", "bandwidth")]
        cells.append("" if None in shares else f"{max(shares):.0%}")
        errors = [c["value"] for n, c in row["accuracy"].items() if n.startswith("error")]
        worst = max(errors, default=None)
        cells.append("" if worst is None else f"largest error {worst:.1g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_attention(records: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of a forward and backward pass against the number of tokens."""
    plt.rcParams["svg.hashsalt"] = "brainalign"
    figure, axes = plt.subplots(2, len(records), figsize=(9.5, 5.4), squeeze=False)
    colours = {"ours": "#20639b", "softmax (PyTorch)": "#b4552d", "SDPA, dense mask": "#b4552d",
               "FlexAttention": "#5b8c5a"}  # fmt: skip
    for column, made in zip(axes.T, records, strict=True):
        for name, colour in colours.items():
            for kind, style in (("forward,", "--"), ("forward and backward", "-")):
                rows = [r for r in made["rows"] if kind in r["case"] and name in r["times"]]
                points = {r["work"]["tokens"]: r for r in rows}
                x = sorted(points)
                if not x:
                    continue
                time = [points[n]["times"][name]["median_s"] for n in x]
                memory = [points[n]["work"]["peak_mib"][name] or float("nan") for n in x]
                label = f"{name}, {kind.rstrip(',')}"
                for ax, y in zip(column, (time, memory), strict=True):
                    ax.plot(x, y, style, color=colour, marker="o", markersize=3, label=label)
        for ax, unit in zip(column, ("seconds", "peak MiB"), strict=True):
            ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        column[0].set_title(made["benchmark"].removeprefix("attention_"), fontsize=10)
        column[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def sizes(row: dict[str, Any]) -> str:
    """What the name of the case does not say of the work."""
    words = []
    for key, word in SIZES.items():
        value = row["work"].get(key)
        text = value if isinstance(value, str) else f"{value:,} {word}" if value else ""
        if text and text not in row["case"]:
            words.append(text)
    return f" ({', '.join(words)})" if words else ""


def machine(records: list[dict[str, Any]]) -> str:
    """Say what the records were measured on; their rates of matrix products as a range."""
    lines: dict[str, list[float]] = {}
    for made in records:
        m = made["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in m["libraries"].items() if v != "not installed")
        device = f", {m['accelerator']}" if "accelerator" in m else ""
        line = (
            f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']:g} GiB"
            f"{device}; Python {m['python']}, {versions}. Measured {made['date']}"
        )
        lines.setdefault(line, []).append(m["matmul_float32_gflops"])
    return "\n\n".join(
        f"{line}; float32 matrix products {_span(rates)} Gflop/s." for line, rates in lines.items()
    )


def _span(rates: list[float]) -> str:
    low, high = (f"{x:.0f}" for x in (min(rates), max(rates)))
    return low if low == high else f"{low} to {high}"


def plot_scaling(made: dict[str, Any], path: Path) -> None:
    axes_names = list(dict.fromkeys(r["axis"] for r in made["rows"]))
    plt.rcParams["svg.hashsalt"] = "brainalign"
    figure, axes = plt.subplots(1, len(axes_names), figsize=(9.5, 3.1), sharey=True)
    for ax, name in zip(axes, axes_names, strict=True):
        rows = [r for r in made["rows"] if r["axis"] == name]
        x = [r["value"] for r in rows]
        for who, colour, mark in (("himalaya", "#b4552d", "s"), ("ours", "#20639b", "o")):
            y = [r["times"][who]["median_s"] for r in rows]
            ax.plot(x, y, color=colour, marker=mark, markersize=4, label=who)
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(x, [f"{v:,}" for v in x], fontsize=8)
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    found = records()
    parts = [INTRO]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        here = [found[name] for name in names if name in found]
        if not here:
            parts.append("Not measured yet.\n")
            continue
        parts.append(table([row for made in here for row in made["rows"]]) + "\n")
        parts.append(machine(here) + "\n")
    for title, names in ATTENTION.items():
        parts.append(f"## {title}\n")
        here = [found[name] for name in names if name in found]
        if not here:
            parts.append("Not measured yet.\n")
            continue
        for made in here:
            parts.append(attention_table(made["rows"]) + "\n")
        parts.append(machine(here) + "\n")
        if "peak_mib" in here[0]["rows"][0]["work"]:
            plot_attention(here, DOCS / "images" / "attention_cpu.svg")
            parts.append(
                "![Seconds and peak memory against tokens, for ours and PyTorch's attentions]"
                "(images/attention_cpu.svg)\n"
            )
    if "scaling" in found:
        plot_scaling(found["scaling"], DOCS / "images" / "scaling.svg")
        work = found["scaling"]["rows"][0]["work"]
        parts.append("## How time grows\n")
        parts.append(
            "![Seconds against targets, features and alphas, for ours and himalaya]"
            "(images/scaling.svg)\n"
        )
        parts.append(
            f"k-fold ridge, {work['n']:,} rows, {work['folds']} folds; where an axis does not "
            "vary: 2,000 targets, 500 features, 20 alphas. Both axes are logarithmic.\n"
        )
        parts.append(machine([found["scaling"]]) + "\n")
    (DOCS / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
