"""Formats numbers for a reader, and shortens them for plots."""

from __future__ import annotations

import math

from rich.filesize import decimal

MISSING = "–"


def duration(seconds: float | None) -> str:
    """Format a time in its two largest units: 48 s, 21 min 5 s, 3 h 20 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, below in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if whole >= unit:
            smaller = {"h": 3600, "min": 60, "s": 1}[below]
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def count(number: float | None) -> str:
    """Format a count: 402, 10,098, 1.45 M."""
    if number is None:
        return MISSING
    return f"{number / 1e6:.2f} M" if abs(number) >= 1e6 else f"{number:,.0f}"


def size(number: float | None) -> str:
    """Format a number of bytes: 1.2 GB."""
    return MISSING if number is None else decimal(int(number))


def measured(number: float | None) -> str:
    """Format a measurement with about three digits: 0.131, 27.4, 865."""
    if number is None:
        return MISSING
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(digits, 6)}f}".replace("-", "−")


def percent(share: float, digits: int = 0) -> str:
    """Format a share: 80.0 %."""
    return f"{100 * share:.{digits}f} %"


def few_digits(number: float, digits: int = 5) -> float | None:
    """Round a number for a plot. The result is None for NaN and infinity, which JSON lacks."""
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None
