"""Linear-time attention on a GPU: time, peak memory and share of what the card can do.

Needs torch, triton and numpy alone. flash-linear-attention and NATTEN are measured beside where
they import. Every row is checked against float64 before it is timed: some rows of the outputs at
full length, the gradients on a short input. Cases that do not fit into the time are left out and
named. For a trial without a GPU: ``TRITON_INTERPRET=1 ... --size small --device cpu``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

import harness  # noqa: E402

from brainalign_kernels import (  # noqa: E402
    count_calls,
    lightnet_attention,
    lightning_attention,
    lightning_slopes,
    neighborhood_attention,
    neighborhood_mask_mod,
)

HEADS, CHANNELS, CHUNK = 16, 64, 64
LENGTHS = {"full": (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072), "small": (96,)}
GRIDS = {"full": (((64, 64), 7), ((128, 128), 7), ((128, 128), 13)), "small": (((8, 8), 3),)}
PEAK = "peak_device_mib"
Work = Callable[[], Any]


class Card:
    """The device, the type that is measured, and its rates."""

    def __init__(self, name: str, repeats: int) -> None:
        self.device, self.repeats = torch.device(name), repeats
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.bound = 2e-2 if self.cuda else 1e-4
        self.heads = HEADS if self.cuda else 1
        self.flops = harness.matmul_rate(self.dtype, 8192 if self.cuda else 500, name)
        source = torch.empty((2**29 if self.cuda else 2**20), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copies = harness.median_times({"copy": lambda: target.copy_(source)}, 5, self.device)
        self.bytes = 2 * source.numel() / copies["copy"]["median_s"]

    def draw(self, count: int, *shape: int) -> list[Tensor]:
        source = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(shape, generator=source, device=self.device).to(self.dtype)
            for _ in range(count)
        ]

    def measure(self, works: dict[str, Work]) -> tuple[dict[str, Any], dict[str, float]]:
        """Times, and peak memory beyond what is held before."""
        peaks = {}
        if self.cuda:
            for name, work in works.items():
                gc.collect()
                torch.cuda.reset_peak_memory_stats(self.device)
                held = torch.cuda.memory_allocated(self.device)
                work()
                torch.cuda.synchronize(self.device)
                peaks[name] = (torch.cuda.max_memory_allocated(self.device) - held) / 2**20
        return harness.median_times(works, self.repeats, self.device), peaks

    def row(
        self,
        case: str,
        works: dict[str, Work],
        missing: dict[str, str],
        errors: dict[str, float],
        *,
        flops: float,
        moved: float,
    ) -> dict[str, Any]:
        """One record; accuracy alone decides whether it passes."""
        with count_calls() as calls:
            works["ours"]()
        usable = {}
        for name, work in works.items():
            try:
                work()
                usable[name] = work
            except Exception as error:  # A peer that fails is reported; ours must not fail.
                if name == "ours":
                    raise
                missing[name] = f"{type(error).__name__}: {str(error)[:200]}"
        times, peaks = self.measure(usable)
        seconds = times["ours"]["median_s"]
        checks = harness.checked(
            {f"error of {name} (relative)": (e, "<=", self.bound) for name, e in errors.items()}
        )
        for name, t in times.items():
            print(f"   {case}: {name} {t['median_s'] * 1e3:.3f} ms", flush=True)
        return {
            "case": case,
            "work": {
                "dtype": str(self.dtype).removeprefix("torch."),
                "path": sorted({path for _, path in calls}),
                "required_gflop": flops / 1e9,
                "required_gbyte": moved / 1e9,
                "share_of_matrix_rate": flops / seconds / self.flops,
                "share_of_bandwidth": moved / seconds / self.bytes,
                PEAK: peaks,
                "peers_missing": missing,
            },
            "times": times,
            "ratios": {n: t["median_s"] / seconds for n, t in times.items() if n != "ours"},
            "accuracy": checks,
            "passed": all(c["holds"] for c in checks.values()),
        }


def training(attend: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> Work:
    """Forward and backward pass."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def work() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, cotangent)

    return work


def gradient_errors(
    attend: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor
) -> dict[str, float]:
    """Gradients of ``attend(*inputs, impl=...)`` against the reference in float64."""
    got = training(lambda *x: attend(*x, impl=_ours(inputs[0])), inputs, cotangent)()
    exact = [x.double() for x in inputs]
    expected = training(lambda *x: attend(*x, impl="reference"), exact, cotangent.double())()
    return {f"d{n}": harness.relative(a, b) for n, a, b in zip("qkv", got, expected, strict=True)}


def _ours(x: Tensor) -> str:
    """On a GPU what a user gets; in a trial the kernel, interpreted."""
    return "auto" if x.is_cuda else "triton"


def some(n: int, device: torch.device) -> Tensor:
    """Rows that are checked: from the last one on, spread over the sequence."""
    return torch.arange(n - 1, -1, -max(1, n // 12), device=device)


def lightning(card: Card, n: int, *, backward: bool) -> dict[str, Any]:
    q, k, v, cotangent = card.draw(4, 1, card.heads, n, CHANNELS)
    rates = -lightning_slopes(card.heads).to(card.device)

    def ours(*x: Tensor, impl: str = _ours(q)) -> Tensor:
        return lightning_attention(*x, rates[: x[0].shape[1]], impl=impl)

    def softmax(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, is_causal=True)

    peers: dict[str, Callable[..., Tensor]] = {"ours": ours, "softmax (PyTorch)": softmax}
    missing: dict[str, str] = {}
    peers |= _fla(rates, missing)
    rows = some(n, card.device)
    past = rows[:, None] - torch.arange(n, device=card.device)
    decay = (rates[0].double() * past).masked_fill(past < 0, -torch.inf).exp()
    scores = (q[0, 0, rows].double() @ k[0, 0].double().T) * decay
    errors = {"output": harness.relative(ours(q, k, v)[0, 0, rows], scores @ v[0, 0].double())}
    tokens = card.heads * n
    inner = 2 * (2 * CHUNK * CHANNELS + 2 * CHANNELS**2)
    if backward:
        short = [x[:, :1, :300] for x in (q, k, v, cotangent)]
        errors |= gradient_errors(ours, short[:3], short[3])
        works = {name: training(f, [q, k, v], cotangent) for name, f in peers.items()}
    else:
        works = {name: _forward(f, q, k, v) for name, f in peers.items()}
    size = CHANNELS * q.element_size() * tokens
    return card.row(
        f"lightning, {_kind(backward)}, {n:,} tokens", works, missing, errors,
        flops=inner * tokens * (3.0 if backward else 1.0),
        moved=size * (11.0 if backward else 4.0),
    )  # fmt: skip


def _fla(rates: Tensor, missing: dict[str, str]) -> dict[str, Callable[..., Tensor]]:
    name = "flash-linear-attention"
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as error:
        missing[name] = f"{type(error).__name__}: {str(error)[:200]}"
        return {}

    def attend(*x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in x)
        out: Tensor = chunk_simple_gla(q, k, v, g_gamma=rates, scale=1.0)[0]
        return out.transpose(1, 2)

    return {name: attend}


def neighborhood(
    card: Card, grid: tuple[int, int], kernel: int, *, backward: bool
) -> dict[str, Any]:
    n = grid[0] * grid[1]
    q, k, v, cotangent = card.draw(4, 1, card.heads, n, CHANNELS)

    def ours(*x: Tensor, impl: str = _ours(q), shape: tuple[int, int] = grid) -> Tensor:
        return neighborhood_attention(*x, shape=shape, kernel_size=kernel, impl=impl)

    missing: dict[str, str] = {}
    mask_mod = neighborhood_mask_mod(grid, kernel_size=kernel)
    peers: dict[str, Callable[..., Tensor]] = {"ours": ours}
    peers |= _flex(card, mask_mod, n, missing)
    peers |= _natten(grid, kernel, missing)
    rows = some(n, card.device)
    zero = torch.zeros((), dtype=torch.int64, device=card.device)
    mask = mask_mod(zero, zero, rows[:, None], torch.arange(n, device=card.device)[None])
    logits = q[0, 0, rows].double() @ k[0, 0].double().T * CHANNELS**-0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    errors = {"output": harness.relative(ours(q, k, v)[0, 0, rows], weights @ v[0, 0].double())}
    if backward:
        short = (kernel + 3, max(kernel, 6))
        cut = [x[:, :1, : short[0] * short[1]] for x in (q, k, v, cotangent)]
        errors |= gradient_errors(
            lambda *x, impl: ours(*x, impl=impl, shape=short), cut[:3], cut[3]
        )
        works = {name: training(f, [q, k, v], cotangent) for name, f in peers.items()}
    else:
        works = {name: _forward(f, q, k, v) for name, f in peers.items()}
    tokens = card.heads * n
    return card.row(
        f"neighborhood, {_kind(backward)}, {grid[0]} x {grid[1]}, kernel {kernel}",
        works, missing, errors,
        flops=4.0 * kernel**2 * CHANNELS * tokens * (3.5 if backward else 1.0),
        moved=CHANNELS * q.element_size() * tokens * (11.0 if backward else 4.0),
    )  # fmt: skip


def _flex(
    card: Card, mask_mod: Callable[..., Tensor], n: int, missing: dict[str, str]
) -> dict[str, Callable[..., Tensor]]:
    name = "FlexAttention, compiled"
    if not card.cuda:
        missing[name] = "measured on a GPU only"
        return {}
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        make = torch.compile(create_block_mask) if n > 20_000 else create_block_mask
        block_mask = make(mask_mod, None, None, n, n, device=card.device)
        compiled = torch.compile(flex_attention, dynamic=False)
    except Exception as error:
        missing[name] = f"{type(error).__name__}: {str(error)[:200]}"
        return {}

    def attend(*x: Tensor) -> Tensor:
        out: Tensor = compiled(*x, block_mask=block_mask)
        return out

    return {name: attend}


def _natten(
    grid: tuple[int, int], kernel: int, missing: dict[str, str]
) -> dict[str, Callable[..., Tensor]]:
    try:
        from natten.functional import na2d
    except Exception as error:
        missing["NATTEN"] = f"{type(error).__name__}: {str(error)[:200]}"
        return {}

    def attend(*x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2).unflatten(1, grid) for y in x)
        out: Tensor = na2d(q, k, v, kernel_size=kernel)
        return out.flatten(1, 2).transpose(1, 2)

    return {"NATTEN": attend}


def lightnet(card: Card, n: int, *, backward: bool) -> dict[str, Any]:
    q, k, v, cotangent = card.draw(4, 1, card.heads, n, CHANNELS)

    def ours(*x: Tensor, impl: str = _ours(q)) -> Tensor:
        out = lightnet_attention(*x, impl=impl)
        assert isinstance(out, Tensor)
        return out

    def softmax(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, is_causal=True)

    rows = some(n, card.device)
    exact = []
    for row in rows.tolist():
        weights = k[0, 0, : row + 1].double().softmax(0)
        exact.append(q[0, 0, row].double() @ (weights.T @ v[0, 0, : row + 1].double()))
    errors = {"output": harness.relative(ours(q, k, v)[0, 0, rows], torch.stack(exact))}
    peers: dict[str, Callable[..., Tensor]] = {"ours": ours, "softmax (PyTorch)": softmax}
    if backward:
        short = [x[:, :1, :100] for x in (q, k, v, cotangent)]
        errors |= gradient_errors(ours, short[:3], short[3])
        works = {name: training(f, [q, k, v], cotangent) for name, f in peers.items()}
    else:
        works = {name: _forward(f, q, k, v) for name, f in peers.items()}
    tokens = card.heads * n
    inner = 2 * (2 * CHUNK * CHANNELS + 2 * CHANNELS**2)
    return card.row(
        f"lightnet, {_kind(backward)}, {n:,} tokens", works, {}, errors,
        flops=inner * tokens * (3.0 if backward else 1.0),
        moved=CHANNELS * q.element_size() * tokens * (11.0 if backward else 4.0),
    )  # fmt: skip


def _forward(attend: Callable[..., Tensor], *x: Tensor) -> Work:
    def work() -> Tensor:
        with torch.no_grad():
            return attend(*x)

    return work


def _kind(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=LENGTHS, default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after these")
    parser.add_argument("--only", default="", help="run only the mechanism of this name")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    started = time.monotonic()
    card = Card(args.device, args.repeats)
    cases: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for backward in (False, True):
        for n in LENGTHS[args.size]:
            cases.append(("lightning", lambda n=n, b=backward: lightning(card, n, backward=b)))
        for grid, size in GRIDS[args.size]:
            cases.append((
                "neighborhood",
                lambda g=grid, s=size, b=backward: neighborhood(card, g, s, backward=b),
            ))  # fmt: skip
        for n in LENGTHS[args.size]:
            cases.append(("lightnet", lambda n=n, b=backward: lightnet(card, n, backward=b)))
    rows, left_out = [], 0
    for name, case in cases:
        if args.only not in name:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            left_out += 1
            continue
        try:
            rows.append(case())
        except Exception as error:  # One case must not take the others' records along.
            what = f"{name}: {type(error).__name__}: {str(error)[:500]}"
            rows.append({"case": what, "passed": False})
    rows.append({
        "case": f"the card: {card.bytes / 1e9:.1f} GB/s copied, {card.flops / 1e12:.2f} TFLOP/s",
        "work": {"bytes_per_second": card.bytes, "flops_per_second": card.flops,
                 "cases_left_out_for_time": left_out},
    })  # fmt: skip
    passed = harness.record("attention_gpu", rows, args.out, device=args.device)
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
