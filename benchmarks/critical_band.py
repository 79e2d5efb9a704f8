"""Octave noise: pyramids beside pyrtools, and stimuli beside a ResNet-50 that looks at them.

    OMP_NUM_THREADS=1 python benchmarks/critical_band.py --threads 1 [--size small]

pyrtools works on one thread in float64, whatever it is given; without it its rows are left out.
Stimuli are made in float32, many at once: those rows carry the claim, and single images and float64
are measured beside them. The clock is that of the process, so that other work on the core counts
for little. A full experiment is 1,050 pictures in 35 conditions, hours of a ResNet-50 on a core: a
sample of the pictures is made and shown in every condition alike, so that its share of time is that
of the whole; the record says how many, and what they make of the whole by the rule of three.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from harness import arguments, checked, median_times, record, relative, row

from brainalign.psychophysics import laplacian_pyramid, mask, octave_noise
from brainalign.psychophysics.pyramid import n_bands

#: Pictures of the experiment, and those of them that are timed.
EXPERIMENT = 1050
SAMPLE = {"full": 2, "small": 1}
BATCHES = {"full": (1, 35), "small": (1, 8)}
SIDES = (224, 256)
#: How much faster than pyrtools float32 in batches is, which is what stimuli are made in.
REQUIRED = 5.0
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
SIDE = 224
SDS = (0.0, 0.02, 0.04, 0.08, 0.16)
LARGEST_SHARE = 0.10


def pyramids(n: int, side: int, dtype: torch.dtype, repeats: int) -> Iterator[dict[str, Any]]:
    """Compare building pyramids, and making noise of one octave: build, one level back, its RMS."""
    from pyrtools.pyramids import LaplacianPyramid

    images = torch.randn(n, side, side, dtype=dtype)
    arrays = images.numpy()
    band = n_bands(side, side) // 2
    level = n_bands(side, side) - 1 - band

    def built() -> list[Any]:
        return [LaplacianPyramid(image) for image in arrays]

    def noise() -> list[Any]:
        out = []
        for pyramid in built():
            alone, top = (pyramid.recon_pyr(levels=k) for k in (level, 0))
            out.append(alone * np.sqrt((top**2).mean() / (alone**2).mean()))
        return out

    theirs = built()[0].pyr_coeffs
    errors = {
        "pyramids": max(
            relative(ours[0], torch.as_tensor(theirs[(k, 0)]))
            for k, ours in enumerate(laplacian_pyramid(images))
        ),
        "octaves of noise": relative(octave_noise(images, band)[0], torch.as_tensor(noise()[0])),
    }
    works = {
        "pyramids": (lambda: laplacian_pyramid(images), built),
        "octaves of noise": (lambda: octave_noise(images, band), noise),
    }
    claimed = n > 1 and dtype == torch.float32
    for name, (ours, peer) in works.items():
        yield row(
            f"{name} of {n} x {side} x {side}, {dtype}".replace("torch.", ""),
            # One image takes a millisecond, which a single round would not measure.
            median_times(
                {"ours": ours, "pyrtools": peer}, repeats * (2 if n > 1 else 16),
                clock=time.process_time,
            ),
            peer="pyrtools",
            required=REQUIRED if claimed else None,
            accuracy={"largest relative difference": (errors[name], "<=", BOUNDS[dtype])},
            work={"images": n, "side": side, "levels": n_bands(side, side), "dtype": str(dtype),
                  "peer's dtype": "float64, on one thread", "clock": "processor time",
                  "carries_the_claim": claimed},
        )  # fmt: skip


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
    whole = {k: round(s * EXPERIMENT / n, 1) for k, s in seconds.items()}
    return {
        "case": f"stimuli of {EXPERIMENT:,} pictures x {len(cells)} conditions and a ResNet-50 on "
                f"them, float32, from {n} of the pictures",
        "peer": "ResNet-50",
        "work": {"pictures": EXPERIMENT, "conditions": len(cells), "batch": len(cells),
                 "side": SIDE, "clock": "processor time, in turn batch by batch",
                 "carries_the_claim": True,
                 "pictures_timed": n, "extrapolated": n < EXPERIMENT,
                 "timed_s": {k: round(s, 3) for k, s in seconds.items()}},
        "times": {"ours" if k == "stimuli" else k: {"median_s": s, "all_s": [s]}
                  for k, s in whole.items()},
        "accuracy": checks,
        "accurate": all(c["holds"] for c in checks.values()),
        "passed": all(c["holds"] for c in checks.values()),
    }  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    # The network takes by far the longest: --only pyramids, or octaves, leaves it out.
    network = not args.only or "stimuli" in args.only
    if importlib.util.find_spec("pyrtools") is not None and (not network or not args.only):
        cases = itertools.product((torch.float32, torch.float64), SIDES, BATCHES[args.size])
        for dtype, side, n in cases:
            yield from pyramids(n, side, dtype, args.repeats)
    if network:
        yield stimuli(SAMPLE[args.size])


def main() -> int:
    args = arguments(__doc__ or "")
    chosen = (r for r in rows(args) if args.only in r["case"])
    return 0 if record("critical_band", chosen, args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
