"""The device of a computation, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainalign.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["resolve_device"]


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
