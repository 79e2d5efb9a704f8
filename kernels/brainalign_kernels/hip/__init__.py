"""HiP: a tree search for the blocks of keys that matter, and a softmax over them."""

from brainalign_kernels.hip.attention import hip_attention, hip_blocks

__all__ = ["hip_attention", "hip_blocks"]
