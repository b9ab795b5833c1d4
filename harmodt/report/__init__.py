"""Shows runs side by side on one page: `write_report`, or `python -m harmodt.report RUN…`.

The page is one file. It needs no network and no other file.
"""

from .page import write_report

__all__ = ["write_report"]
