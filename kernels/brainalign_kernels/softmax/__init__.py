"""Softmax attention, and the softmax that gives fully masked rows zeros."""

from brainalign_kernels.softmax.attention import softmax_attention

__all__ = ["softmax_attention"]
