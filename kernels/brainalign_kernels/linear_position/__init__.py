"""Linearised relative position encoding (LRPE), along one axis or several."""

from brainalign_kernels.linear_position.encoding import lrpe, md_lrpe
from brainalign_kernels.linear_position.module import LRPE, MDLRPE

__all__ = ["LRPE", "MDLRPE", "lrpe", "md_lrpe"]
