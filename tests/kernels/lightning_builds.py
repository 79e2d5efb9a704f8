"""Build the kernels of lightning attention for cards that need not be there.

Run as a program, without Triton's interpreter: ``lightning_builds.py CAPABILITY [all]``. With
"all", every launch with every flag; otherwise every launch, with the flags in turn.
"""

from __future__ import annotations

import sys
from itertools import cycle, product

import torch

from brainalign_kernels._triton import compile_for
from brainalign_kernels.lightning import kernel

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
INTEGERS = dict.fromkeys(
    "a_b a_h a_n b_b b_h b_n c_b c_h c_n z_b z_h z_n s_d s_e n heads chunks rows size".split(),
    "i32",
)
FLOATS = dict.fromkeys(("scale", "scale_scores", "scale_state"), "fp32")
WIDE = dict.fromkeys(("S", "G", "Rows", "Sums", "First", "Last"), "*fp32")
#: Channels are walked over in blocks: these are one block filled up, two, and three not quite.
CHANNELS = ((36, 36), (128, 128), (130, 160))
FLAGS = tuple(product((False, True), repeat=3))


def build(function, known, constants, capability, **launch):
    """Shared memory of one block."""
    signature = {n: known[n] for n in function.arg_names if n not in constants}
    return compile_for(function, signature, constants, capability, **launch)


def matrix_kernels(card, dtype, how, flags, channels):
    """Build the two kernels that multiply matrices."""
    reverse, rows, stepwise = flags
    known = dict.fromkeys(("A", "B", "C", "Z"), TYPES[dtype]) | WIDE | INTEGERS | FLOATS
    common = {
        "D": channels[0], "E": channels[1], "CHUNK": how.chunk, "BLOCK": how.block,
        "REVERSE": reverse, "STEPWISE": stepwise, "PRECISION": how.precision,
    }  # fmt: skip
    launch = {"num_warps": how.warps, "num_stages": how.stages}
    for function, out, constants in (
        (kernel.chunk_sums, "*fp32", common),
        (kernel.apply, TYPES[dtype], common | {"ROWS": rows, "WIDEN": False}),
    ):
        yield function, build(function, known | {"Out": out}, constants, card, **launch)


def scans(card, flags):
    """Build the kernel between them."""
    reverse, first, stepwise = flags
    constants = {"CHUNK": 64, "BLOCK": kernel.SCAN_BLOCK, "REVERSE": reverse,
                 "STEPWISE": stepwise, "FIRST": first}  # fmt: skip
    yield kernel.scan, build(kernel.scan, WIDE | INTEGERS, constants, card)


def builds(card, every):
    """All that is asked for, one after the other."""
    if every:
        for (dtype, how), flags, channels in product(kernel.launches(), FLAGS, CHANNELS):
            yield from matrix_kernels(card, dtype, how, flags, channels)
    else:
        turns = zip(cycle(FLAGS if card == 80 else FLAGS[::-1]), cycle(CHANNELS))
        for (dtype, how), (flags, channels) in zip(kernel.launches(), turns, strict=False):
            yield from matrix_kernels(card, dtype, how, flags, channels)
    for flags in FLAGS if every else ((card == 90, card == 90, card == 80),):
        yield from scans(card, flags)


if __name__ == "__main__":
    for function, shared in builds(int(sys.argv[1]), "all" in sys.argv):
        sys.stdout.write(f"built {function.fn.__name__} {shared}\n")
        sys.stdout.flush()
