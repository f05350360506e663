"""`interlace mup`: what muP makes of a recipe (`table`), and whether it holds (`check`)."""
