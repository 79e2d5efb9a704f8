"""Subspace attention as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.ulsam.attention import subspace_weights
from brainalign_kernels.ulsam.reference import BatchNorm

__all__ = ["ULSAM"]


class ULSAM(nn.Module):
    r"""`subspace_attention` with its parameters and running statistics.

    .. math:: o_g = A_g x_g + x_g

    Parameters
    ----------
    channels : int
        Channels C.
    num_splits : int
        G, groups of channels; divides C.
    momentum : float
        Weight of the new statistics in the running ones.
    eps : float
        Of the batch norms.
    impl : {"auto", "reference", "compiled"}
        See `subspace_attention`.

    Raises
    ------
    ShapeError
        If the groups do not divide the channels.

    References
    ----------
    Saini et al. (2020), ULSAM: ultra-lightweight subspace attention module for compact
    convolutional neural networks.
    """

    running_mean_depthwise: Tensor
    running_var_depthwise: Tensor
    running_mean_pointwise: Tensor
    running_var_pointwise: Tensor

    def __init__(
        self,
        channels: int,
        num_splits: int,
        *,
        momentum: float = 0.9,
        eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_splits < 1 or channels % num_splits:
            raise ShapeError(f"num_splits is {num_splits}; it must divide the {channels} channels.")
        self.momentum, self.eps, self.impl = momentum, eps, impl
        # As torch.nn.Conv2d starts: uniform within one over the root of the number of inputs.
        width = channels // num_splits
        bound = width**-0.5
        self.depthwise_weight = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.depthwise_bias = nn.Parameter(torch.empty(channels).uniform_(-1, 1))
        self.pointwise_weight = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.pointwise_bias = nn.Parameter(torch.empty(num_splits).uniform_(-bound, bound))
        for name, size in (("depthwise", channels), ("pointwise", num_splits)):
            self.register_parameter(f"{name}_norm_weight", nn.Parameter(torch.ones(size)))
            self.register_parameter(f"{name}_norm_bias", nn.Parameter(torch.zeros(size)))
            self.register_buffer(f"running_mean_{name}", torch.zeros(size))
            self.register_buffer(f"running_var_{name}", torch.ones(size))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, C, H, W) and attention (B, G, H, W)."""
        norms = [
            BatchNorm(
                self.get_parameter(f"{name}_norm_weight"),
                self.get_parameter(f"{name}_norm_bias"),
                getattr(self, f"running_mean_{name}"),
                getattr(self, f"running_var_{name}"),
            )
            for name in ("depthwise", "pointwise")
        ]
        return subspace_weights(
            x,
            (self.depthwise_weight, self.depthwise_bias), norms[0],
            (self.pointwise_weight, self.pointwise_bias), norms[1],
            training=self.training, momentum=self.momentum, eps=self.eps, impl=self.impl,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Weigh x (B, C, H, W)."""
        return self.attend(x)[0]
