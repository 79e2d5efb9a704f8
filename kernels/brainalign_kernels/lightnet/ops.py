"""The two steps of LightNet as PyTorch operators: opaque to compilers, with gradients.

An implementation gives four functions; what they take and return is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]


def register(
    name: str,
    gates: Callable[..., Any],
    gates_backward: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> tuple[Any, Any]:
    """Register ``brainalign::lightnet_{name}_gates`` and ``brainalign::lightnet_{name}``.

    Parameters
    ----------
    name : str
        Of the implementation.
    gates : callable
        k (B, H, N, D), z0 (B, H, D) to z and kappa.
    gates_backward : callable
        kappa, z, z0 and the gradients of z and kappa to those of k (in the type of kappa) and z0.
    forward : callable
        q, kappa (B, H, N, D), v (B, H, N, E), z, z0, s0 (B, H, D, E), chunk length to the output
        and the final state.
    backward : callable
        The same with the gradients of output and state before the chunk length, to the gradients
        of q, kappa, v, z, z0 and s0.

    Returns
    -------
    gates, recurrence : operators
    """
    prefix = f"brainalign::lightnet_{name}"
    inputs = "Tensor q, Tensor kappa, Tensor v, Tensor z, Tensor z0, Tensor s0"

    def operator(suffix: str, function: Callable[..., Any], schema: str) -> Any:
        return torch.library.custom_op(prefix + suffix, function, mutates_args=(), schema=schema)

    op_gates = operator("_gates", gates, "(Tensor k, Tensor z0) -> (Tensor, Tensor)")
    op_gates_backward = operator(
        "_gates_backward",
        gates_backward,
        "(Tensor kappa, Tensor z, Tensor z0, Tensor grad_z, Tensor grad_kappa) -> (Tensor, Tensor)",
    )
    op_forward = operator("", forward, f"({inputs}, int chunk) -> (Tensor, Tensor)")
    op_backward = operator(
        "_backward",
        backward,
        f"({inputs}, Tensor grad_out, Tensor grad_state, int chunk)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )

    def like(x: Tensor, of: Tensor | None = None) -> Tensor:
        return x.new_empty(x.shape, dtype=(x if of is None else of).dtype)

    op_gates.register_fake(lambda k, z0: (like(k, z0), like(k, z0)))
    op_gates_backward.register_fake(
        lambda kappa, z, z0, grad_z, grad_kappa: (like(kappa), like(z0))
    )
    op_forward.register_fake(
        lambda q, kappa, v, z, z0, s0, chunk: (
            q.new_empty((*q.shape[:3], v.shape[3])), like(s0)
        )
    )  # fmt: skip
    op_backward.register_fake(
        lambda q, kappa, v, z, z0, s0, grad_out, grad_state, chunk: tuple(
            like(x) for x in (q, kappa, v, z, z0, s0)
        )
    )

    def gates_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], output[0], inputs[1])
        ctx.dtype = inputs[0].dtype

    def gates_gradient(ctx: Any, grad_z: Tensor, grad_kappa: Tensor) -> tuple[Tensor, Tensor]:
        grad_k, grad_z0 = op_gates_backward(
            *ctx.saved_tensors, grad_z.contiguous(), grad_kappa.contiguous()
        )
        return grad_k.to(ctx.dtype), grad_z0

    def context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.chunk = inputs[6]

    def gradient(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        found = op_backward(
            *ctx.saved_tensors, grad_out.contiguous(), grad_state.contiguous(), ctx.chunk
        )
        return (*found, None)

    op_gates.register_autograd(gates_gradient, setup_context=gates_context)
    op_forward.register_autograd(gradient, setup_context=context)
    return op_gates, op_forward
