"""The report: runs as one page of tables and figures."""

from .page import report
from .runs import Point, Run, read

__all__ = ["Point", "Run", "read", "report"]
