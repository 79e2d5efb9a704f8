"""What every benchmark shares: the machine's description, timing, gates and the JSON record.

A row compares ours with a peer on the same arrays, threads and type, in one process. It passes when
it is accurate and as fast as was claimed; an inaccurate row fails whatever its speed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "zarr", "himalaya", "mtrf", "rsatoolbox",
             "pyrtools")  # fmt: skip


def arguments(description: str) -> argparse.Namespace:
    """Options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", default="", help="run only the cases whose name holds this")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a trial")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def median_times(
    works: Mapping[str, Callable[[], Any]],
    repeats: int = REPEATS,
    device: torch.device | None = None,
    *,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Run each work once to warm up, then `repeats` times in turn, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    # Going through all that was imported takes a quarter of a second, more than many works do.
    gc.freeze()
    for round_ in range(0 if warm else 1, repeats + 1):
        for name, work in works.items():
            gc.collect()
            start = clock()
            result = work()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                times[name].append(clock() - start)
            del result
    gc.unfreeze()
    return {
        name: {"median_s": statistics.median(t), "all_s": [round(x, 5) for x in t]}
        for name, t in times.items()
    }


def peak_mib(work: Callable[[], Any]) -> float | None:
    """Resident memory that `work` needs at most beyond what is held before; None if not told."""
    try:
        gc.collect()
        # What the allocator kept from earlier work would hide what this work takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        work()
        return (_resident("VmHWM") - before) / 1024
    except (AttributeError, OSError):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; infinite if a value is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def checked(accuracy: Mapping[str, tuple[float, str, float]]) -> dict[str, dict[str, Any]]:
    """Entries of a record from ``name: (value, "<=" or ">=", bound)``, each with its verdict."""
    return {
        name: {"value": value, "relation": relation, "bound": bound,
               "holds": bool(value <= bound if relation == "<=" else value >= bound)}
        for name, (value, relation, bound) in accuracy.items()
    }  # fmt: skip


def row(
    case: str,
    times: Mapping[str, Mapping[str, Any]],
    *,
    peer: str,
    required: float | None,
    accuracy: Mapping[str, tuple[float, str, float]],
    work: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare `times` of "ours" and `peer`; `accuracy` maps a name to (value, "<=", bound).

    Without a `required` ratio the row claims none, and passes if it is accurate.
    """
    checks = checked(accuracy)
    ratio = times[peer]["median_s"] / times["ours"]["median_s"]
    accurate = all(c["holds"] for c in checks.values())
    return {
        "case": case,
        "peer": peer,
        "work": dict(work),
        "times": {k: dict(v) for k, v in times.items()},
        "ratio": ratio,
        **({} if required is None else {"required": required}),
        "accuracy": checks,
        "accurate": accurate,
        "passed": accurate and (required is None or ratio >= required),
    }


def matmul_rate(
    dtype: torch.dtype = torch.float32, n: int = 3000, device: str = "cpu", repeats: int = 5
) -> float:
    """Measured rate of a square matrix product, in floating-point operations a second."""
    a = torch.randn(n, n, dtype=dtype, device=device)
    b = torch.randn(n, n, dtype=dtype, device=device)
    times = median_times({"matmul": lambda: a @ b}, repeats, torch.device(device))
    return 2 * n**3 / times["matmul"]["median_s"]


def ridge_products(solver: Any) -> float:
    """Floating-point operations of a k-fold solver's matrix products, for one target.

    Per fold X'y, the rotation, P'y and the products by the compressed grid; and the refit.
    """
    p = solver.factors.X.shape[1]
    total = 2.0 * 2 * p * p
    for fold in solver._score.folds:
        r, q = fold.basis.shape
        total += 2.0 * len(fold.removed) * p + 2.0 * p * q
        total += 2.0 * q * (p if fold.from_cross else len(fold.test))
        total += sum(2.0 * r * len(rows) * (q - first) for first, rows in fold.triangle)
        total += 2.0 * q * fold.profile.shape[1]
    return total


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": _versions(),
        "matmul_float32_gflops": round(matmul_rate(torch.float32) / 1e9, 1),
        "matmul_float64_gflops": round(matmul_rate(torch.float64) / 1e9, 1),
    }
    if device != "cpu":
        about["accelerator"] = torch.cuda.get_device_name(device)
        about["cuda"] = torch.version.cuda
        about["accelerator_matmul_float32_gflops"] = round(
            matmul_rate(torch.float32, 8192, device) / 1e9, 1
        )
    return about


def record(
    name: str, rows: Iterable[dict[str, Any]], out: Path = RESULTS, *, device: str = "cpu"
) -> bool:
    """Print each row as it comes, write them as ``NAME.json``, and say whether all passed."""
    out.mkdir(parents=True, exist_ok=True)
    kept = []
    for r in rows:
        kept.append(r)
        verdict = "ok  " if r.get("passed", True) else "FAIL"
        if "ratio" in r:
            claim = f" (claimed {r['required']}x)" if "required" in r else ""
            print(f"{verdict} {r['case']}: {r['ratio']:.1f}x {r['peer']}{claim}")
        else:
            print(f"{verdict} {r['case']}")
        for check, c in r.get("accuracy", {}).items():
            word = "" if c["holds"] else "   <-- does not hold"
            print(
                f"       {check}: {c['value']:.3g} {c['relation']} {c['bound']:g}{word}", flush=True
            )
        for what, value in r.get("measured", {}).items():
            print(f"       {what}: {value:.3g}", flush=True)
    made = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "rows": kept,
    }
    (out / f"{name}.json").write_text(json.dumps(made, indent=1, default=_plain) + "\n")
    return all(r.get("passed", True) for r in kept)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value)} does not belong into a record")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
