"""Reproduces the paper's tables and figures: `python -m harmodt.reproduce`."""
