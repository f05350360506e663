"""Energy-Based Transformers (Gladstone et al. 2025, arXiv 2507.02092): a model that scores
candidates for the next token, and predicts by descending its own score.

`model` holds the weights and the two streams; `context` runs the observed tokens, `candidates` what
is guessed of the tokens after them; `inner_step` is one step of descent and its derivative, `loss`
a whole descent and what is trained of it, `draws` its randomness, `cost` what all of it takes.
"""
