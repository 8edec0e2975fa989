"""The report of a finished run: tables, figures and one self-contained page, from saved results only."""

from neuroplast.report.run import write_growing_page, write_report
from neuroplast.report.runs import write_runs_page

__all__ = ["write_growing_page", "write_report", "write_runs_page"]
