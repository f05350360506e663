"""Channel mixers, one file each: they work on every position alone."""
