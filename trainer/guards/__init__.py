"""What watches the numbers of a run: steps that stand out, results that do not repeat, and memory
that changes by itself. `interlace.trainer.guarding` calls it from the loop.
"""
