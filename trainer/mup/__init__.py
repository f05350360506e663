"""Hyperparameters that transfer: how every tensor's start, rate and multipliers follow the width.

`widths` gives a recipe another width, `manifest` says what that means for every parameter,
`parametrise` writes its forward multipliers into a model. The manifest is data, not attributes of
parameters: sharding, compilation, copies and checkpoints cannot lose it.
"""
