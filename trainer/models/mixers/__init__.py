"""Sequence mixers, one file each: they move information between positions."""
