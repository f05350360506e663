"""Text to rows of tokens: sources, tokenizers, preparation once, and an order that needs no
state.
"""
