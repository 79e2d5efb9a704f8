"""One way from a public function to the implementation that runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels.errors import UnsupportedError

__all__ = ["IMPLS", "Operation", "Path", "count_calls", "triton_missing"]

IMPLS = ("auto", "reference", "compiled", "triton")
#: From the fastest to the one that can do everything.
_ORDER = ("triton", "compiled", "reference")

_counters: list[Counter[tuple[str, str]]] = []


@contextmanager
def count_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls inside the block, by ``(operation, implementation)``.

    Calls that torch.compile traces are not counted: they run later, inside the compiled code.

    Yields
    ------
    Counter of (str, str)
    """
    counter: Counter[tuple[str, str]] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@dataclass(frozen=True)
class Path:
    """An implementation of an operation.

    Parameters
    ----------
    run : callable
        Takes the arguments of the operation.
    missing : callable
        Takes the same arguments; returns why `run` cannot do them, or an empty string.
    """

    run: Callable[..., Any]
    missing: Callable[..., str] = lambda *args, **options: ""


class Operation:
    """A mechanism: a reference that does everything, and faster paths that do a part of it.

    Parameters
    ----------
    name : str
        Under which calls are counted.
    reference : callable
        Plain, differentiable PyTorch in any precision.
    compiled : Path, optional
        Faster PyTorch, for CPU and GPU.
    triton : Path, optional
        A Triton kernel.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        compiled: Path | None = None,
        triton: Path | None = None,
    ) -> None:
        self.name = name
        self.paths = {"reference": Path(reference)}
        self.paths |= {"compiled": compiled} if compiled else {}
        self.paths |= {"triton": triton} if triton else {}

    def __call__(self, impl: str, *args: Any, **options: Any) -> Any:
        """Run with the implementation `impl`."""
        path = self.choose(impl, *args, **options)
        if _counters and not torch.compiler.is_compiling():
            for counter in _counters:
                counter[self.name, path] += 1
        return self.paths[path].run(*args, **options)

    def choose(self, impl: str, *args: Any, **options: Any) -> str:
        """Name of the implementation that `impl` means for these arguments.

        Raises
        ------
        UnsupportedError
            If `impl` names one that cannot do them.
        """
        if impl not in IMPLS:
            raise UnsupportedError(f"impl is {impl!r}; expected one of {', '.join(IMPLS)}.")
        if impl == "auto":
            for name in _ORDER:
                if name == "triton" and not _on_gpu(args):
                    continue
                if name in self.paths and not self.paths[name].missing(*args, **options):
                    return name
        if impl not in self.paths:
            raise UnsupportedError(
                f"{self.name} has no implementation {impl!r}; it has {', '.join(self.paths)}."
            )
        reason = self.paths[impl].missing(*args, **options)
        if reason:
            raise UnsupportedError(f"{self.name}, impl={impl!r}: {reason} Use impl='auto'.")
        return impl


def triton_missing(*tensors: Tensor | None) -> str:
    """Why Triton cannot run on these tensors, or an empty string."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not all(t.is_cuda for t in tensors if t is not None):
        return "Triton needs CUDA tensors (or its interpreter: TRITON_INTERPRET=1)."
    return ""


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in args)
