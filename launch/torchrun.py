"""The entry for `torchrun -m interlace.launch.torchrun RECIPE [section.key=value ...]`.

It is `interlace train` and nothing else: torchrun's environment variables make it one rank of
several.
"""

import sys

from interlace.launch.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
