"""Build the kernels of neighborhood attention for cards that need not be there.

Run as a program, without Triton's interpreter: ``neighborhood_builds.py CAPABILITY [all]``. With
"all", every launch that a call can make; otherwise those that need most shared memory.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from brainalign_kernels._triton import compile_for
from brainalign_kernels.neighborhood import kernel
from brainalign_kernels.neighborhood.windows import make_axes

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
FLAT = {"Lse": "*fp32", "Delta": "*fp32", "scale": "fp32"}
#: Windows, dilation, stride and direction are constants of a kernel, but take no shared memory.
GRIDS = {
    1: make_axes((500,), 33, 2, 1, True),
    2: make_axes((60, 50), 7, 1, (1, 2), (False, True)),
    3: make_axes((10, 20, 30), 3),
}
FUNCTIONS = (kernel.forward, kernel.query_gradients, kernel.key_gradients)
#: What channels are filled up to; float16 and bfloat16 take the same room.
EVERY = tuple(product(GRIDS, TYPES, (16, 32, 64, 128)))
LARGEST = {
    80: ((1, torch.bfloat16, 128), (2, torch.bfloat16, 128), (3, torch.bfloat16, 128),
         (2, torch.float32, 128)),
    90: ((2, torch.bfloat16, 128),),
}  # fmt: skip


def build(function, dimensions, dtype, channels, capability):
    """Shared memory of one block."""
    backward = function is not kernel.forward
    how = kernel.launch(dimensions, channels, dtype, backward=backward)
    keys = function is kernel.key_gradients
    constants = kernel.constants(GRIDS[dimensions], channels, channels, dtype, how, keys=keys)
    signature = {
        n: FLAT.get(n, TYPES[dtype] if n[0].isupper() and not n[-1].isdigit() else "i32")
        for n in function.arg_names
        if n not in constants
    }
    launch = {"num_warps": how.warps, "num_stages": how.stages}
    return compile_for(function, signature, constants, capability, **launch)


if __name__ == "__main__":
    card = int(sys.argv[1])
    for configuration in EVERY if "all" in sys.argv else LARGEST[card]:
        for function in FUNCTIONS:
            shared = build(function, *configuration, card)
            sys.stdout.write(f"built {function.fn.__name__} {configuration} {shared}\n")
            sys.stdout.flush()
