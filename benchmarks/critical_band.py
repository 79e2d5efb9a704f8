"""Octave noise: pyramids beside pyrtools, and stimuli beside a ResNet-50 that looks at them.

    OMP_NUM_THREADS=1 python benchmarks/critical_band.py [--size small]

A full experiment is 1,050 pictures in 35 conditions. `--size small` makes and shows a sample of
it, in every condition alike; the share of time is that of the whole. The pyramid of a peer that is
not installed is left out.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

import torch
from harness import arguments, checked, median_times, record, relative, row

from brainalign.psychophysics import laplacian_pyramid, mask
from brainalign.psychophysics.stimuli import n_bands

#: Pictures of the experiment: every one in all conditions.
PICTURES = {"full": 1050, "small": 2}
PYRAMIDS = {"full": 64, "small": 16}
SIDE = 224
SDS = (0.0, 0.02, 0.04, 0.08, 0.16)
REQUIRED_PYRAMID = 5.0
LARGEST_SHARE = 0.10


def pyramids(n: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    import pyrtools

    images = torch.randn(n, SIDE, SIDE, dtype=dtype)
    arrays = images.numpy()

    def theirs() -> list[Any]:
        return [pyrtools.pyramids.LaplacianPyramid(image) for image in arrays]

    ours = laplacian_pyramid(images)
    error = max(
        relative(level[0], torch.as_tensor(theirs()[0].pyr_coeffs[(k, 0)]))
        for k, level in enumerate(ours)
    )
    times = median_times({"ours": lambda: laplacian_pyramid(images), "pyrtools": theirs}, repeats)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    return row(
        f"pyramids of {n} images of {SIDE} x {SIDE}, {dtype}".replace("torch.", ""),
        times,
        peer="pyrtools",
        required=REQUIRED_PYRAMID,
        accuracy={"largest relative difference": (error, "<=", bound)},
        work={"images": n, "side": SIDE, "levels": n_bands(SIDE, SIDE), "dtype": str(dtype)},
    )


def stimuli(n: int) -> dict[str, Any]:
    import timm

    network = timm.create_model("resnet50", pretrained=False).eval()
    bands = n_bands(SIDE, SIDE)
    cells = [(sd, band) for sd in SDS for band in range(bands)]
    picture = torch.rand(1, SIDE, SIDE)
    seconds = {"stimuli": 0.0, "ResNet-50": 0.0}
    with torch.inference_mode():
        for i in range(-1, n):
            began = time.process_time()
            shown = mask(
                picture.expand(len(cells), -1, -1), [c[0] for c in cells], [c[1] for c in cells],
                [len(cells) * (i + 1) + k for k in range(len(cells))],
            )  # fmt: skip
            made = time.process_time()
            network(shown[:, None].expand(-1, 3, -1, -1))
            if i >= 0:  # the first round warms up
                seconds["stimuli"] += made - began
                seconds["ResNet-50"] += time.process_time() - made
    share = seconds["stimuli"] / seconds["ResNet-50"]
    checks = checked({"share of the network's time": (share, "<=", LARGEST_SHARE)})
    return {
        "case": f"{n:,} pictures x {len(cells)} conditions, and a ResNet-50 on them, float32",
        "work": {"pictures": n, "conditions": len(cells), "batch": len(cells), "side": SIDE,
                 "clock": "processor time, in turn batch by batch"},
        "times": {k: {"median_s": s / n, "all_s": [round(s, 3)]} for k, s in seconds.items()},
        "accuracy": checks,
        "accurate": all(c["holds"] for c in checks.values()),
        "passed": all(c["holds"] for c in checks.values()),
    }  # fmt: skip


def main() -> int:
    args = arguments(__doc__ or "")
    rows = []
    if importlib.util.find_spec("pyrtools") is not None:
        for dtype in (torch.float32, torch.float64):
            rows.append(pyramids(PYRAMIDS[args.size], dtype, args.repeats))
    rows.append(stimuli(PICTURES[args.size]))
    ok = record("critical_band", [r for r in rows if args.only in r["case"]], args.out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
