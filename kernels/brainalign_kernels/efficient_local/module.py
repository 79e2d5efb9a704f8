"""Efficient local attention as a module."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from brainalign_kernels.efficient_local.attention import Strip, efficient_local_attention
from brainalign_kernels.errors import ShapeError

__all__ = ["ELA_PRESETS", "EfficientLocalAttention"]


class Preset(NamedTuple):
    """Published sizes; group_width None is a depthwise convolution."""

    kernel_size: int
    group_width: int | None
    norm_groups: int


#: Tiny, base, small, large. S and L have C / 8 groups, that is 8 channels per group.
ELA_PRESETS = {
    "T": Preset(5, None, 32),
    "B": Preset(7, None, 16),
    "S": Preset(5, 8, 16),
    "L": Preset(7, 8, 16),
}


class EfficientLocalAttention(nn.Module):
    r"""`efficient_local_attention` with its parameters.

    .. math:: o_{chw} = x_{chw}\, a^h_{ch}\, a^w_{cw}

    Parameters
    ----------
    channels : int
        Channels C.
    kernel_size : int
        Odd.
    groups : int, optional
        Of the convolution; by default C (depthwise).
    norm_groups : int, optional
        Of the group norm; None: no norm.
    shared : bool
        One convolution and norm for rows and columns, as published; otherwise one for each.
    bias : bool
        Of the convolutions.
    activation, gate, has_skip, eps, impl
        See `efficient_local_attention`.

    Raises
    ------
    ShapeError
        For sizes that do not divide the channels.

    References
    ----------
    Xu and Wan (2024), ELA: efficient local attention for deep convolutional neural networks.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        *,
        groups: int | None = None,
        norm_groups: int | None = 16,
        shared: bool = True,
        bias: bool = False,
        activation: str = "identity",
        gate: str = "sigmoid",
        has_skip: bool = False,
        eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        groups = channels if groups is None else groups
        for name, count in (("groups", groups), ("norm_groups", norm_groups or 1)):
            if count < 1 or channels % count:
                raise ShapeError(f"{name} is {count}; it must divide the {channels} channels.")
        if kernel_size % 2 == 0:
            raise ShapeError(f"kernel_size is {kernel_size}; expected an odd number.")

        def convolution() -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel_size, groups=groups, bias=bias)

        def norm() -> nn.GroupNorm | None:
            return None if norm_groups is None else nn.GroupNorm(norm_groups, channels, eps=eps)

        self.conv_rows, self.norm_rows = convolution(), norm()
        self.conv_columns = None if shared else convolution()
        self.norm_columns = None if shared else norm()
        self.options: dict[str, Any] = {
            "norm_groups": norm_groups or 1,
            "activation": activation,
            "gate": gate,
            "has_skip": has_skip,
            "eps": eps,
            "impl": impl,
        }

    @classmethod
    def from_preset(cls, name: str, channels: int, **options: Any) -> EfficientLocalAttention:
        """Build the published T, B, S or L for a number of channels.

        Raises
        ------
        ShapeError
            For another name, or channels that the preset's groups do not divide.
        """
        if name not in ELA_PRESETS:
            raise ShapeError(f"preset is {name!r}; expected one of {', '.join(ELA_PRESETS)}.")
        kernel_size, group_width, norm_groups = ELA_PRESETS[name]
        if group_width is not None and channels % group_width:
            raise ShapeError(
                f"ELA-{name} convolves groups of {group_width} channels; they do not divide "
                f"{channels}."
            )
        groups = channels if group_width is None else channels // group_width
        return cls(channels, kernel_size, groups=groups, norm_groups=norm_groups, **options)

    @classmethod
    def timm(
        cls,
        channels: int,
        kernel_size: int = 7,
        *,
        bias: bool = False,
        norm: bool = True,
        **options: Any,
    ) -> EfficientLocalAttention:
        """Build the form of timm's EfficientLocalAttn."""
        chosen = {"activation": "silu", **options}
        return cls(
            channels,
            kernel_size,
            norm_groups=1 if norm else None,
            shared=False,
            bias=bias,
            **chosen,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh x (B, C, H, W)."""
        rows = _strip(self.conv_rows, self.norm_rows)
        columns = None
        if self.conv_columns is not None:
            columns = _strip(self.conv_columns, self.norm_columns)
        return efficient_local_attention(x, rows, columns, **self.options)


def _strip(convolution: nn.Conv1d, norm: nn.GroupNorm | None) -> Strip:
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    return Strip(convolution.weight, convolution.bias, gain, shift)
