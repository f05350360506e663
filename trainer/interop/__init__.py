"""Models of other libraries: what transformers writes is read here, and what it reads is written.

`formats` says what a format is and which fit a recipe; `llama` and `granite` are the formats there
are; `reading` and `writing` are the folders around them.
"""
