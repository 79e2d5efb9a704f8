"""Lightning attention on the CPU beside PyTorch's softmax attention: time and memory by length.

The two compute different things; what is compared is what a causal token mixer costs. Claimed: from
4,096 tokens on, lightning attention is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from brainalign_kernels import lightning_attention, lightning_slopes

HEADS, CHANNELS = 4, 64
LENGTHS = {"full": (256, 1024, 2048, 4096, 8192, 16384), "small": (256, 512)}
FASTER_FROM = 4096


def exact_rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rows: Tensor) -> Tensor:
    """Some rows of lightning attention by its formula, in float64."""
    q, k, v, rate = q[:, :, rows].double(), k.double(), v.double(), log_decay.double()
    past = rows[:, None] - torch.arange(k.shape[2], device=k.device)
    decay = (rate[:, None, None] * past).masked_fill(past < 0, -torch.inf).exp()
    return ((q @ k.transpose(-1, -2)) * decay) @ v


def case(n: int, repeats: int, *, backward: bool) -> dict[str, Any]:
    source = torch.Generator().manual_seed(0)
    q, k, v, cotangent = torch.randn((4, 1, HEADS, n, CHANNELS), generator=source).unbind(0)
    rates = -lightning_slopes(HEADS)
    leaves = [x.clone().requires_grad_(backward) for x in (q, k, v)]

    def run(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = attend(*leaves)
        if not backward:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))

    works = {
        "ours": lambda: run(lambda *x: lightning_attention(*x, rates)),
        "softmax (PyTorch)": lambda: run(
            lambda *x: scaled_dot_product_attention(*x, is_causal=True)
        ),
    }
    rows = torch.arange(n - 1, -1, -max(1, n // 16))
    made = works["ours"]()
    errors = {"output": harness.relative(made[0][:, :, rows], exact_rows(q, k, v, rates, rows))}
    if backward:
        # dq attends from the cotangent over v to k; dk and dv do so with time reversed.
        back = [x.flip(2) for x in (q, k, v, cotangent)]
        made_back = (made[1], made[2].flip(2), made[3].flip(2))
        operands = ((cotangent, v, k), (back[2], back[3], back[0]), (back[1], back[0], back[3]))
        for name, got, x in zip(("dq", "dk", "dv"), made_back, operands, strict=True):
            expected = exact_rows(*x, rates, rows)
            errors[name] = harness.relative(got[:, :, rows], expected)
    del made
    memory = {name: harness.peak_mib(work) for name, work in works.items()}
    times = harness.median_times(works, repeats)
    kind = "forward and backward" if backward else "forward"
    return harness.row(
        f"lightning attention, {kind}, {n:,} tokens",
        times,
        peer="softmax (PyTorch)",
        required=1.0 if n >= FASTER_FROM else 0.0,
        accuracy={f"error of {name} (relative)": (e, "<=", 1e-4) for name, e in errors.items()},
        work={"batch": 1, "heads": HEADS, "tokens": n, "channels": CHANNELS, "dtype": "float32",
              "microseconds_per_token": times["ours"]["median_s"] / n * 1e6,
              "peak_mib": memory},
    )  # fmt: skip


def main() -> None:
    args = harness.arguments(__doc__ or "")
    rows = []
    for backward in (False, True):
        for n in LENGTHS[args.size]:
            name = f"{'backward' if backward else 'forward'} {n}"
            if args.only in name:
                rows.append(case(n, args.repeats, backward=backward))
    raise SystemExit(not harness.record("attention_lightning", rows, args.out))


if __name__ == "__main__":
    main()
