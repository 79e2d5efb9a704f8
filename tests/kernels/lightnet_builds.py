"""Build every kernel of LightNet for cards that need not be there.

Run as a program, without Triton's interpreter: ``lightnet_builds.py CAPABILITY TYPE...``.
"""

from __future__ import annotations

import sys

import torch

from brainalign_kernels._triton import compile_for
from brainalign_kernels.lightnet import kernel

NUMBERS = {"tokens", "channels", "values", "chunks", "blocks"}
#: Arguments in the type of the queries; all other tensors are in float32.
TYPED = {"k", "q", "v", "out", "grad_out", "grad_q", "grad_v"}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def build(function, dtype, capability):
    """Shared memory of one block."""
    options = kernel.configuration(getattr(torch, dtype))
    options |= kernel.SIZES | {"FLOOR": kernel.FLOOR}
    names = function.arg_names
    if "PRECISION" not in names:
        options |= kernel.POINTWISE
    constants = {n: x for n, x in options.items() if n in names}
    signature = {
        n: "i32" if n in NUMBERS else POINTERS[dtype] if n in TYPED else "*fp32"
        for n in names
        if n not in constants
    }
    launch = {n: options[n] for n in ("num_warps", "num_stages")}
    return compile_for(function, signature, constants, capability, **launch)


if __name__ == "__main__":
    for dtype in [name for name in sys.argv[2:] if name != "all"]:
        for function in kernel.KERNELS:
            if dtype == "float32" or TYPED & set(function.arg_names):
                shared = build(function, dtype, int(sys.argv[1]))
                sys.stdout.write(f"built {function.fn.__name__} {dtype} {shared}\n")
