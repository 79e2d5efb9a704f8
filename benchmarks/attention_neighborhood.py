"""2-D neighborhood attention on the CPU beside PyTorch's attentions: time and memory by tokens.

Peers: scaled_dot_product_attention with the dense mask, and FlexAttention, which has no backward
pass on the CPU. Masks are made before the clock starts. Claimed: from 1,024 tokens on, ours takes
less time and less memory than the dense mask. A peer is left out where it would take
much longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from brainalign_kernels import neighborhood_attention, neighborhood_mask, neighborhood_mask_mod

HEADS, CHANNELS, KERNEL = 4, 64, 7
#: Tokens along each of the two axes.
SIDES = {"full": (16, 32, 45, 64, 90, 128), "small": (16, 32)}
BETTER_FROM = 1024
DENSE, FLEX = "SDPA, dense mask", "FlexAttention"
#: Most tokens at which the dense mask runs, forwards and backwards.
LIMIT = {False: 8192, True: 4096}
#: FlexAttention is compiled anew for each size, which takes longer than it runs.
FLEX_SIDES = (32, 64, 90)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, side: int) -> tuple[Tensor, ...]:
    """Some rows of the output and of dq by the definition, in float64; and which rows."""
    n = side * side
    rows = torch.arange(n - 1, -1, -max(1, n // 64))
    seen = neighborhood_mask_mod((side, side), kernel_size=KERNEL)
    token = torch.arange(n)
    mask = seen(token, token, rows[:, None], token[None])
    some = q[:, :, rows].detach().double().requires_grad_()
    logits = some @ k.detach().double().transpose(-1, -2) * CHANNELS**-0.5
    out = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v.detach().double()
    (dq,) = torch.autograd.grad(out, some, grad[:, :, rows].double())
    return out.detach(), dq, rows


def attentions(side: int, *, backward: bool) -> dict[str, Callable[..., Tensor]]:
    """Ours, and the peers that can do this size."""
    n = side * side
    options = {"shape": (side, side), "kernel_size": KERNEL}
    found = {"ours": lambda *x: neighborhood_attention(*x, **options)}
    if n <= LIMIT[backward]:
        mask = neighborhood_mask(**options)
        found[DENSE] = lambda *x: scaled_dot_product_attention(*x, attn_mask=mask)
    if not backward and side in FLEX_SIDES:
        block_mask = create_block_mask(
            neighborhood_mask_mod(**options), None, None, n, n, device="cpu"
        )
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        found[FLEX] = lambda *x: compiled(*x, block_mask=block_mask)
    return found


def case(side: int, repeats: int, *, backward: bool) -> list[dict[str, Any]]:
    n = side * side
    source = torch.Generator().manual_seed(0)
    *inputs, cotangent = torch.randn((4, 1, HEADS, n, CHANNELS), generator=source).unbind(0)
    leaves = [x.clone().requires_grad_(backward) for x in inputs]

    def run(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = attend(*leaves)
        if not backward:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))

    works = {
        name: lambda attend=attend: run(attend)
        for name, attend in attentions(side, backward=backward).items()
    }
    made = works["ours"]()
    out, dq, rows = exact_rows(*leaves, cotangent, side)
    errors = {"output": harness.relative(made[0][:, :, rows], out)}
    if backward:
        errors["dq"] = harness.relative(made[1][:, :, rows], dq)
    if backward and DENSE in works:
        theirs = works[DENSE]()
        errors |= {
            f"{name} beside the dense mask's": harness.relative(made[i], theirs[i])
            for i, name in ((2, "dk"), (3, "dv"))
        }
        del theirs
    del made
    memory = {name: harness.peak_mib(work) for name, work in works.items()}
    times = harness.median_times(works, repeats)
    accuracy = {f"error of {name} (relative)": (e, "<=", 1e-4) for name, e in errors.items()}
    work = {"batch": 1, "heads": HEADS, "tokens": n, "channels": CHANNELS, "kernel_size": KERNEL,
            "dtype": "float32", "microseconds_per_token": times["ours"]["median_s"] / n * 1e6,
            "peak_mib": memory}  # fmt: skip
    name = f"neighborhood attention, {'forward and backward' if backward else 'forward'}, {n:,}"
    found = []
    for peer in (DENSE, FLEX):
        if peer not in times:
            continue
        claimed = peer == DENSE and n >= BETTER_FROM
        checks = dict(accuracy)
        if claimed and None not in (memory["ours"], memory[peer]):
            checks["memory of ours over the peer's"] = (memory["ours"] / memory[peer], "<=", 1.0)
        found.append(
            harness.row(
                f"{name} tokens", times, peer=peer, required=float(claimed), accuracy=checks,
                work=work,
            )
        )  # fmt: skip
    return found or [_alone(f"{name} tokens, no peer", times, accuracy, work)]


def _alone(
    name: str, times: dict[str, Any], accuracy: dict[str, Any], work: dict[str, Any]
) -> dict[str, Any]:
    """Return a row of ours beside itself, whose ratio is left out."""
    row = harness.row(name, times, peer="ours", required=0.0, accuracy=accuracy, work=work)
    return {key: value for key, value in row.items() if key not in ("peer", "ratio", "required")}


def main() -> None:
    args = harness.arguments(__doc__ or "")
    rows = []
    for backward in (False, True):
        for side in SIDES[args.size]:
            if args.only in f"{'backward' if backward else 'forward'} {side * side}":
                rows += case(side, args.repeats, backward=backward)
    raise SystemExit(not harness.record("attention_neighborhood", rows, args.out))


if __name__ == "__main__":
    main()
