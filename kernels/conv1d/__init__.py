"""Causal depthwise convolution over packed documents, with a state for streaming."""
