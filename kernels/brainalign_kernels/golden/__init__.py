"""Check the mechanisms against stored inputs and outputs of the programs that introduced them."""

from brainalign_kernels.golden.check import Comparison, GoldenFile, Run, check_file, check_folder

__all__ = ["Comparison", "GoldenFile", "Run", "check_file", "check_folder"]
