"""Offline data: the store on disk, batches of windows, and importers for other formats."""
