"""The report of a finished run: tables, figures and one self-contained page, from saved results only."""

from neuroplast.report.page import write_report

__all__ = ["write_report"]
