"""Offline data: the store on disk, windows of it as batches, and importers of other formats."""
