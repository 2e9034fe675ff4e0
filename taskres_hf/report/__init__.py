"""One HTML page that shows what a classifier does; and its main figure."""

from .figures import accuracy_figure, figure_for_card
from .page import check_report_output, write_report

__all__ = ["accuracy_figure", "check_report_output", "figure_for_card", "write_report"]
