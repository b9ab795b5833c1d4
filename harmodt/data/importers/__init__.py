"""Readers of other formats, a file each."""
