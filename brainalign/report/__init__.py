"""The report: sections as data in, one folder of HTML out, opened from disk without a network."""

from __future__ import annotations

from brainalign.report.build import ZIP_NAME, build_report

__all__ = ["ZIP_NAME", "build_report"]
