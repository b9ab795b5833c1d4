"""HarmoDT: one decision transformer for many tasks, with a learned weight mask for each.

Command lines: `python -m harmodt.collect`, `harmodt.data`, `harmodt.train`, `harmodt.evaluate`.
"""

__version__ = "0.1.0"
