"""How a run is looked at: progress while it runs, pictures and pages afterwards, all read from its history."""

from atoll.report.html import report_run, write_comparison, write_report, write_study
from atoll.report.live import progress_for
from atoll.report.plot import plot_client_panels, plot_clients, plot_comparison, plot_history
from atoll.report.runs import Run, read_run

__all__ = [
    "Run",
    "plot_client_panels",
    "plot_clients",
    "plot_comparison",
    "plot_history",
    "progress_for",
    "read_run",
    "report_run",
    "write_comparison",
    "write_report",
    "write_study",
]
