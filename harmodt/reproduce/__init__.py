"""The paper's tables and figures, trained and measured again: `python -m harmodt.reproduce`."""
