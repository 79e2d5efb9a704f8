"""Build Triton kernels for cards that are not there, and tell what they need.

Triton's interpreter shows that a kernel computes the right thing, but neither that it compiles nor
that it fits into a card's shared memory. Compiling for a target shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SHARED_MEMORY", "compile_for", "interpreted"]

#: Bytes of shared memory that one block may take, by compute capability (CUDA C++ Programming
#: Guide, table of technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on tensors of the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> int:
    """Compile a kernel for a CUDA card without one at hand.

    Parameters
    ----------
    kernel : triton.JITFunction
        Not interpreted.
    signature : mapping of str to str
        Type of every argument that is no constant, such as ``"*fp16"``, ``"i32"`` or ``"fp32"``.
    constants : mapping of str to value
        Every ``tl.constexpr`` argument.
    capability : int
        80 (A100) or 90 (H100).
    num_warps, num_stages : int
        The launch configuration.

    Returns
    -------
    int
        Shared memory of one block in bytes.

    Raises
    ------
    MemoryError
        If it is above the card's limit.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    shared = int(built.metadata.shared)
    limit = SHARED_MEMORY[capability]
    if shared > limit:
        raise MemoryError(
            f"{kernel.fn.__name__} {dict(constants)}, {num_warps} warps, {num_stages} stages: "
            f"{shared} bytes of shared memory, sm_{capability} has {limit}."
        )
    return shared
