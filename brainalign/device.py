"""The device of a computation, or several, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from brainalign.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["resolve_device", "resolve_devices"]


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
