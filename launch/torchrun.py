"""The entry for `torchrun -m interlace.launch.torchrun RECIPE [section.key=value ...]`.

It is `interlace train`: torchrun's environment variables make it one rank of several. A rank whose
launcher is killed saves and leaves, where it would otherwise go on with nobody to look after it.
"""

import sys

from interlace.launch.cli import run
from interlace.launch.launchers.parents import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    run(["train", *sys.argv[1:]])
