"""Runs as one page to look at: `write_report`, or `python -m harmodt.report RUN…`.

The page needs nothing but itself: no network, no other file.
"""

from .page import write_report

__all__ = ["write_report"]
