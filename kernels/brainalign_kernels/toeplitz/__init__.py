"""Toeplitz position encoding (TPE), along one axis or several."""

from brainalign_kernels.toeplitz.encoding import md_tpe, tpe
from brainalign_kernels.toeplitz.module import MDTPE, TPE

__all__ = ["MDTPE", "TPE", "md_tpe", "tpe"]
