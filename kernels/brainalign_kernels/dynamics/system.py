"""A linear time-varying system with a diagonal transition, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError

__all__ = ["DynamicalSystem", "run_system"]


@dataclass(frozen=True)
class DynamicalSystem:
    r"""What a layer is in the dynamical systems framework.

    .. math:: h_t = \Lambda_t h_{t-1} + B_t u_t, \qquad y_t = C_t h_t + D_t u_t

    The state has n rows for each channel of u; :math:`\Lambda_t` is diagonal. An axis on which
    an array does not depend has size 1.

    Parameters
    ----------
    transition : Tensor, broadcastable to (B, H, N, n, E)
        Lambda.
    input : Tensor, broadcastable to (B, H, N, n, E)
        B: row i of the state takes in ``input[..., i, :] * u``.
    output : Tensor, broadcastable to (B, H, N, n, E)
        C: y sums ``output * h`` over the rows.
    feedthrough : Tensor, broadcastable to (B, H, N, E), optional
        D; nothing by default.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models: attention, state
    space models, and recurrent neural networks.
    """

    transition: Tensor
    input: Tensor
    output: Tensor
    feedthrough: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the state, n."""
        return max(x.shape[-2] for x in (self.transition, self.input, self.output))


def _read_out(system: DynamicalSystem, states: Tensor, u: Tensor) -> Tensor:
    y = (system.output * states).sum(dim=-2)
    return y if system.feedthrough is None else y + system.feedthrough * u


def _step_by_step(system: DynamicalSystem, u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    taken = system.input * u[..., None, :]
    transition = system.transition.expand_as(taken)
    state, states = start, []
    for t in range(u.shape[2]):
        state = transition[:, :, t] * state + taken[:, :, t]
        states.append(state)
    visited = torch.stack(states, dim=2) if states else taken
    return _read_out(system, visited, u), state


def _scan(system: DynamicalSystem, u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    # Doubling: after the pass with `shift`, each token holds the last 2 * shift tokens.
    states = system.input * u[..., None, :]
    decay = system.transition
    decay = decay.expand(*states.shape[:3], *decay.shape[3:])
    tokens, shift = u.shape[2], 1
    while shift < tokens:
        back = (0, 0, 0, 0, shift, -shift)
        states = states + decay * pad(states, back)
        decay = decay * pad(decay, back, value=1.0)
        shift *= 2
    states = states + decay * start[:, :, None]
    return _read_out(system, states, u), states[:, :, -1] if tokens else start


RUN = Operation("run_system", _step_by_step, compiled=Path(_scan))


def run_system(
    system: DynamicalSystem, u: Tensor, *, initial_state: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run the recurrence :math:`h_t = \Lambda_t h_{t-1} + B_t u_t,\; y_t = C_t h_t + D_t u_t`.

    Parameters
    ----------
    system : DynamicalSystem
        For N tokens.
    u : Tensor, shape (B, H, N, E)
        Input.
    initial_state : Tensor, shape (B, H, n, E), optional
        Zero by default; the state of an earlier call continues it.
    impl : {"auto", "reference", "compiled"}
        "reference" goes token by token; "compiled" takes log2(N) passes over all tokens.

    Returns
    -------
    y : Tensor, shape (B, H, N, E)
    state : Tensor, shape (B, H, n, E)
        After the last token; float32 for half precision.

    Raises
    ------
    ShapeError
        If the arrays do not broadcast to one system for `u`.
    """
    if u.ndim != 4:
        raise ShapeError(f"u must have 4 axes (B, H, N, E); got {tuple(u.shape)}.")
    batch, heads, tokens, channels = u.shape
    full = (batch, heads, tokens, system.rows, channels)
    for name in ("transition", "input", "output"):
        _broadcasts(name, getattr(system, name), full)
    if system.feedthrough is not None:
        _broadcasts("feedthrough", system.feedthrough, (batch, heads, tokens, channels))
    wide = accumulation_dtype(u.dtype)
    if initial_state is None:
        state = u.new_zeros((batch, heads, system.rows, channels), dtype=wide)
    else:
        state = initial_state.to(wide)
        if state.shape != (batch, heads, system.rows, channels):
            raise ShapeError(
                f"initial_state must have shape {(batch, heads, system.rows, channels)}; "
                f"got {tuple(state.shape)}."
            )
    # Every row takes part, also where only the transition or the output has them all.
    taken_in = system.input.to(wide).expand(*system.input.shape[:3], system.rows, -1)
    passed = None if system.feedthrough is None else system.feedthrough.to(wide)
    widened = DynamicalSystem(system.transition.to(wide), taken_in, system.output.to(wide), passed)
    y, state = RUN(impl, widened, u.to(wide), state)
    return y.to(u.dtype), state


def _broadcasts(name: str, x: Tensor, full: tuple[int, ...]) -> None:
    if x.ndim != len(full) or any(n not in (1, m) for n, m in zip(x.shape, full, strict=True)):
        raise ShapeError(
            f"{name} of the system must broadcast to {full}, with all its axes (any of them 1); "
            f"got {tuple(x.shape)}."
        )
