"""Models: blocks by letter (`registry`), the stack that a pattern spells (`language_model`), its
cost.
"""
