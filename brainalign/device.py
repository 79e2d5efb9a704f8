"""The device of a computation, or several, by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from brainalign.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Repeatable", "resolve_device", "resolve_devices"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises
    ------
    ConfigError
        If it is no device of this machine.
    """
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"This machine cannot use device {str(device)!r}: {reason}", "Use 'auto' or 'cpu'."
        ) from error
    return found


def resolve_devices(
    device: str | torch.device | Sequence[str | torch.device],
) -> list[torch.device]:
    """Return devices that share a work.

    Parameters
    ----------
    device : str, torch.device or sequence of them
        ``"auto"`` and ``"cuda"`` are every CUDA device there is (for "auto" the CPU where there is
        none); several names may be joined by commas. A device that is named twice has two workers.

    Raises
    ------
    ConfigError
        If one is no device of this machine.
    """
    import torch

    named = device.split(",") if isinstance(device, str) else device
    listed = list(named) if isinstance(named, Sequence) else [named]
    if len(listed) == 1 and str(listed[0]) in ("auto", "cuda") and torch.cuda.is_available():
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [resolve_device(d) for d in listed]


class Repeatable:
    """Calls functions with torch's deterministic algorithms, so that a device repeats its numbers.

    Without them a GPU adds up gradients in an order of the moment. Where the environment does not
    set ``CUBLAS_WORKSPACE_CONFIG``, which cuBLAS reads when it is first used, it is set here. If an
    operation has no deterministic algorithm, a warning says so, and from then on what has none is
    computed nevertheless. Torch's settings are those of the process, for as long as a call lasts.
    """

    def __init__(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.strict = True

    def __call__(self, run: Callable[[], T]) -> T:
        """Return what `run` returns; it is called a second time where the first was not possible.

        Parameters
        ----------
        run : callable
            Without side effects.
        """
        if self.strict:
            try:
                with _deterministic(warn_only=False):
                    return run()
            except RuntimeError as error:
                if "use_deterministic_algorithms" not in str(error):
                    raise
                logger.warning("Numbers may differ from run to run: %s", str(error).splitlines()[0])
            self.strict = False
        with _deterministic(warn_only=True):
            return run()


@contextmanager
def _deterministic(*, warn_only: bool) -> Iterator[None]:
    import torch

    # Its flag is a property of the module, which no type checker sees.
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.benchmark = False
    # Only code that reads what it has not written would notice.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        memory.fill_uninitialized_memory = before[3]
