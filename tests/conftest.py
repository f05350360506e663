"""What tests share: running the command line as a user does, and a corpus small enough to be
quick.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads the variable when its own
# library is imported, which any test module may do: so it is set before all of them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts this in the background has Ctrl-C ignored, here and in all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    "fault-drill",
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_width=64",
    "data.sequence_length=32",
    "train.tokens_per_step=256",
    "train.validate_every_steps=15",
    "train.validation_tokens=1024",
    "optimizer.warmup_steps=5",
    "observe.log_every_steps=10",
    "observe.sample_tokens=0",
)
"""Words of a `train` command that finish in seconds: 40 steps, a checkpoint every 5."""

Interlace = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_finish() -> None:
    """Have every later search for garbage pass over modules and tests, which stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def interlace(tmp_path_factory: pytest.TempPathFactory) -> Interlace:
    """Run `interlace WORDS...` in a process of its own, on one rank or under torchrun on
    several.
    """
    home = tmp_path_factory.mktemp("work")

    def run(
        *words: str,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        cwd: Path = home,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "interlace.launch.cli", *words]
        if ranks > 1:
            assert words[0] == "train"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [
                "--nproc-per-node",
                str(ranks),
                "-m",
                "interlace.launch.torchrun",
                *words[1:],
            ]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **(environment or {})}
        return subprocess.run(
            command,
            cwd=cwd,
            env=settings,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def corpus_text() -> str:
    """Return 16 KB of made-up words, some of them frequent: the same for ever, because what a run
    learns, and how far rounding carries, follows from it.
    """
    draw = random.Random(0)

    def any_of(choices: Sequence[str]) -> str:
        # Of all draws this one alone is the same in every version of Python.
        return choices[int(len(choices) * draw.random() ** 2)]

    syllables = [consonant + vowel for consonant in "tnshrdlcmwfgypbvk" for vowel in "eaoiu"]
    words = ["".join(any_of(syllables) for _ in range(1 + n % 3)) for n in range(400)]
    lines = (" ".join(any_of(words) for _ in range(9)) for _ in range(330))
    return "".join(f"{number}. {line}.\n" for number, line in enumerate(lines))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two words for a command line: a small text file as source, and where its tokens go."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(corpus_text() * 8, encoding="utf-8")
    return f"data.source={folder / 'text.txt'}", f"data.prepared_dir={folder / 'prepared'}"


@pytest.fixture(scope="session")
def tiny(corpus: tuple[str, str]) -> Sequence[str]:
    """The words of a tiny training run over the small corpus."""
    return (*TINY, *corpus)


def losses(run: Path) -> list[str]:
    """Return the loss of every step as hexadecimal bits, in order of the file."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]).hex() for line in lines]


@pytest.fixture(scope="session")
def losses_of() -> Callable[[Path], list[str]]:
    """Read the losses of a run folder, bit for bit."""
    return losses
