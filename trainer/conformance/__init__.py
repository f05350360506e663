"""Bring your own block and get the tests free: every promise of a mixer is held against what it
does.
"""
