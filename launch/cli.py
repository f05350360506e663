"""The command line: `interlace COMMAND ...`. Parsing only; every command is a function of
`launch.commands`.

Exit statuses are those of `interlace.trainer.exits`: 0 success, 2 a mistake the user can mend (one
message, no traceback), 1 a failure of ours.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

from interlace.launch.launchers.parser import add_launch
from interlace.launch.mup.parser import add_mup
from interlace.launch.sweep.parser import add_sweep
from interlace.trainer.ends import is_of_a_peer, is_told_by_rank_0, is_told_later, record_of
from interlace.trainer.errors import UserError
from interlace.trainer.exits import Exit, status_of

AddParser = Callable[..., argparse.ArgumentParser]

TELLING_SECONDS = 3.0
"""How long a rank that says nothing stays after a mistake, for rank 0 to say it."""

OVERRIDE_HELP = "settings that win over the recipe's, as section.key=value (train.steps=100)"
CONFORM_OVERRIDES = "settings to try it at, in place of a small shape (model.width=64)"
RECIPE_HELP = "name of a shipped recipe (`interlace recipes` lists them) or path of a TOML file"

EXAMPLES = """\
examples:
  interlace train quickstart                        a first model, a few minutes on a laptop
  interlace train quickstart train.steps=50         the same, shorter
  interlace train --resume runs/quickstart-0001     continue after a kill or Ctrl-C
  interlace sample runs/quickstart-0001 --prompt "def "
  interlace plan quickstart model.width=512         what would happen, without doing it
  interlace launch torchrun quickstart --nproc 2    two ranks; slurm, ray, ... likewise
"""


PLAN_EXAMPLES = """\
known machines: {machines}

examples:
  interlace plan quickstart_offload                             for this machine
  interlace plan gpt_7b_offload --hardware 4xh100-pcie5 --timeline lanes.png
  interlace plan gpt_20b_offload --hardware h200 --ranks 8 --sweep gpus=8..512
  interlace plan gpt_7b_offload --hardware mine.json offload.strategy=host
"""

DOCTOR_EXAMPLES = """\
examples:
  interlace doctor                                   what this machine has, and what is missing
  interlace doctor quickstart                        which attention a recipe takes here, and why
  interlace doctor quickstart model.attention_backend=chunked
  INTERLACE_ATTENTION=chunked interlace doctor quickstart
"""

CONFORM_EXAMPLES = """\
examples:
  interlace conform mixer attention                           does it keep its promises?
  interlace conform mixer shift --plugin token_shift.py       a block of your own
  interlace conform mixer shift --recipe mine.toml            the same, as a recipe loads it
  interlace conform mixer A model.heads=8 model.query_key_norm=true
  interlace conform mixer --all --json
"""

THINK_EXAMPLES = """\
An energy-based model predicts by descending its own energy. It may take more steps than in
training, and descend from several random starts and keep, at every position, the one whose energy
ends lowest. Both are shown beside a choice at random and the choice of who knows the answer.

examples:
  interlace think runs/quickstart_ebt-0001
  interlace think runs/quickstart_ebt-0001 --steps 8 --samples 16 --rows 32 --picture thinking.svg
"""

LONGCTX_EXAMPLES = """\
Every model reads prompts of growing length and decodes after them, in turns. All have one
vocabulary and one precision, and logits are of the last position only, as decoding needs: full
logits, which can outweigh all else, have rows of their own.

examples:
  interlace bench longctx quickstart quickstart_hybrid
  interlace bench longctx quickstart quickstart_hybrid --lengths 512,2048,8192 --picture longctx.png
  interlace bench longctx runs/quickstart-0001 runs/quickstart_hybrid-0001 --json
  interlace bench longctx quickstart bpe --vocabulary 2048 model.width=384
"""

PROFILE_EXAMPLES = """\
known machines: {machines}

examples:
  interlace profile                          measure, show, and keep for later runs
  interlace profile --output mine.json       write it there too, for plans made elsewhere
  interlace profile --show gh200             what a known machine is taken to do
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="interlace",
        description="Pretrain sequence models on less GPU memory than their optimizer needs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: AddParser = subparsers.add_parser
    recipes = add(commands, "recipes", "list the shipped recipes")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    train = add(commands, "train", "train a model, or continue a run", recipe=True, optional=True)
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    train.add_argument(
        "--from-step",
        type=int,
        metavar="STEP",
        help="go on from its checkpoint of this step, in a new folder (run.dir=NEW)",
    )
    add_launch(commands)
    add_plan(commands)
    add_profile(commands)
    add_mup(commands)
    add_sweep(commands)
    add_doctor(commands)
    add_bench(commands)
    add_conform(commands)
    why = add(commands, "why", "tell where a setting's value comes from")
    why.add_argument("setting", metavar="SECTION.KEY", help="the setting, as in model.width")
    why.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    why.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDE_HELP)
    why.add_argument("--json", action="store_true", help="print JSON")
    add(commands, "prepare", "tokenise a recipe's text once, in parallel", recipe=True)
    add_sample(commands)
    add_think(commands)
    verify = add(commands, "verify", "check every digest of a run's checkpoints")
    verify.add_argument("run", metavar="RUN", help="run folder")
    verify.add_argument("--json", action="store_true", help="print JSON")
    export = add(commands, "export", "write a trained model for other programs")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument(
        "--to",
        required=True,
        nargs=2,
        metavar=("FORMAT", "DIR"),
        help="`hf` (a folder that transformers loads) and the folder to write",
    )
    imported = add(commands, "import", "turn a folder of transformers into a model folder")
    imported.set_defaults(function="import_model")
    imported.add_argument("source", metavar="HF-DIR", help="folder with config.json and weights")
    imported.add_argument("target", metavar="MODEL-DIR", help="new folder to write")
    add_hybridize(commands)
    return parser


def add_plan(commands: AddParser) -> None:
    """Add the `plan` command."""
    plan = add(commands, "plan", "show what a recipe would do, without doing it", recipe=True)
    plan.formatter_class = argparse.RawDescriptionHelpFormatter
    plan.epilog = PLAN_EXAMPLES.format(machines=", ".join(machine_names()))
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="plan for N ranks (default 1; with --sweep its first number that divides the batch)",
    )
    plan.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help="plan for a known machine (named below) or a profile's JSON file",
    )
    plan.add_argument(
        "--timeline",
        metavar="FILE",
        help="draw the predicted update of every strategy that fits (.png, .svg or .pdf)",
    )
    plan.add_argument(
        "--sweep",
        metavar="gpus=A..B",
        help="show on paper how the recipe scales from A to B GPUs: A, twice A, and so on "
        "doubling, and B itself",
    )


def add_profile(commands: AddParser) -> None:
    """Add the `profile` command."""
    profile = add(commands, "profile", "measure this machine for the performance model")
    profile.formatter_class = argparse.RawDescriptionHelpFormatter
    profile.epilog = PROFILE_EXAMPLES.format(machines=", ".join(machine_names()))
    profile.add_argument("--json", action="store_true", help="print JSON")
    profile.add_argument(
        "--output", metavar="FILE", help="write the profile there too, beside the one on record"
    )
    profile.add_argument(
        "--show",
        metavar="NAME|FILE",
        help="show a known machine (named below) or a profile's file instead of measuring",
    )


def add_bench(commands: AddParser) -> None:
    """Add the `bench` command."""
    bench = add(commands, "bench", "measure models side by side on this machine")
    benchmarks: AddParser = bench.add_subparsers(
        dest="benchmark", metavar="BENCHMARK", required=True
    ).add_parser
    longctx = add(benchmarks, "longctx", "show what a long context costs: times, memory, operators")
    longctx.formatter_class = argparse.RawDescriptionHelpFormatter
    longctx.epilog = LONGCTX_EXAMPLES
    longctx.set_defaults(overrides=[])
    longctx.add_argument(
        "words",
        nargs="+",
        metavar="RECIPE|RUN|SECTION.KEY=VALUE",
        help="recipes (random weights), run folders (their weights), and settings that win over "
        "those of all recipes",
    )
    longctx.add_argument(
        "--lengths", metavar="A,B,...", help="tokens of the prompts (default up to 4,096 on a CPU)"
    )
    longctx.add_argument(
        "--decode", type=int, metavar="N", help="tokens to decode after each prompt (default 16)"
    )
    longctx.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds at each length (default 5)"
    )
    longctx.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no length that would go beyond it (default 60 on a CPU, 120 on a GPU)",
    )
    longctx.add_argument(
        "--vocabulary", type=int, metavar="N", help="entries for all recipes, where theirs differ"
    )
    longctx.add_argument("--picture", metavar="FILE", help="draw it there too (.png, .svg or .pdf)")
    longctx.add_argument("--json", action="store_true", help="print JSON")


def add_doctor(commands: AddParser) -> None:
    """Add the `doctor` command."""
    doctor = add(
        commands,
        "doctor",
        "tell what this machine has and which attention a recipe takes on it, and why",
        recipe=True,
        optional=True,
    )
    doctor.formatter_class = argparse.RawDescriptionHelpFormatter
    doctor.epilog = DOCTOR_EXAMPLES
    doctor.add_argument("--json", action="store_true", help="print JSON")


def add_conform(commands: AddParser) -> None:
    """Add the `conform` command."""
    conform = add(commands, "conform", "hold a block, your own too, to everything it declares")
    conform.formatter_class = argparse.RawDescriptionHelpFormatter
    conform.epilog = CONFORM_EXAMPLES
    conform.add_argument("part", choices=["mixer"], metavar="mixer", help="what is tested")
    conform.add_argument("name", nargs="?", metavar="NAME", help="name or letter of the mixer")
    conform.add_argument("overrides", nargs="*", metavar="MODEL.KEY=VALUE", help=CONFORM_OVERRIDES)
    conform.add_argument("--all", action="store_true", help="test every registered mixer")
    conform.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers blocks of your own; may be given several times",
    )
    conform.add_argument(
        "--recipe", metavar="RECIPE", help="recipe whose model.plugins and model.options are used"
    )
    conform.add_argument("--json", action="store_true", help="print JSON")


def add_think(commands: AddParser) -> None:
    """Add the `think` command."""
    think = add(commands, "think", "show what an energy-based model gains by thinking longer")
    think.formatter_class = argparse.RawDescriptionHelpFormatter
    think.epilog = THINK_EXAMPLES
    think.add_argument("run", metavar="RUN", help="run folder, or a model folder")
    think.add_argument(
        "--steps", type=int, metavar="N", help="steps of descent (default twice those of training)"
    )
    think.add_argument(
        "--samples",
        type=int,
        default=4,
        metavar="M",
        help="descents from random starts, of which the lowest energy is kept (default 4)",
    )
    think.add_argument(
        "--rows", type=int, default=8, metavar="R", help="held-out rows to read (default 8)"
    )
    think.add_argument(
        "--seed", type=int, default=0, metavar="S", help="fixes the starts (default 0)"
    )
    think.add_argument(
        "--picture",
        metavar="FILE",
        help="where to draw it, .png, .svg or .pdf (default thinking.png in RUN)",
    )
    think.add_argument("--json", action="store_true", help="print JSON")


def add_hybridize(commands: AddParser) -> None:
    """Add the `hybridize` command."""
    hybridize = add(
        commands,
        "hybridize",
        "replace attention layers of a trained model by Mamba-2 layers made of their weights",
    )
    hybridize.add_argument(
        "source", metavar="RUN|MODEL-DIR|HF-DIR", help="folder of the trained model, the teacher"
    )
    hybridize.add_argument(
        "--keep-attention",
        required=True,
        metavar="every=N",
        help="the last of every N attention layers stays as it is",
    )
    hybridize.add_argument(
        "--to",
        metavar="DIR",
        help="new folder to write (default: the source's, plus -hybrid)",
    )
    hybridize.add_argument(
        "--init",
        default="copy+scale",
        choices=("copy+scale", "copy", "random"),
        help="how the new layers start: from queries, keys and values, scaled to be close to "
        "linear attention (default), or as they are, or at random",
    )


def machine_names() -> list[str]:
    """Return the names of the machines that ship; they are files, so that nothing is imported."""
    folder = resources.files("interlace") / "offload" / "machines"
    return sorted(Path(each.name).stem for each in folder.iterdir())


def add_sample(commands: AddParser) -> None:
    """Add the `sample` command."""
    sample = add(commands, "sample", "let a trained model continue a text")
    sample.add_argument("run", metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default="", help="text to continue (default: from nothing)")
    sample.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="most tokens (default 200)"
    )
    sample.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="randomness, 0 is greedy (default 0.8)",
    )
    sample.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw among the K likeliest tokens (default all)",
    )
    sample.add_argument(
        "--seed", type=int, default=0, metavar="S", help="fixes the draws (default 0)"
    )


def add(
    commands: AddParser,
    name: str,
    summary: str,
    recipe: bool = False,
    optional: bool = False,
) -> argparse.ArgumentParser:
    """Add one command, with recipe, which may be optional, and overrides where it takes them."""
    command = commands(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    if recipe:
        command.add_argument(
            "recipe", nargs="?" if optional else None, metavar="RECIPE", help=RECIPE_HELP
        )
        command.add_argument(
            "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDE_HELP
        )
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = build_parser()
    parsed = parse(parser, arguments)
    from interlace.launch import commands

    action: Callable[[argparse.Namespace], int] = getattr(
        commands, getattr(parsed, "function", parsed.command)
    )
    return guarded(lambda: action(parsed))


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, allowing overrides after options (`train --resume RUN train.steps=50`)."""
    parsed, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or not hasattr(parsed, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def guarded(action: Callable[[], int]) -> int:
    """Run an action and turn what it raises into a message and an exit status.

    Of several ranks that fail together, most only say that another has gone. That they leave to
    their files (`interlace.trainer.ends`); so does everyone under a launcher that tells in the end
    which rank failed first.
    """
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        return action()
    except UserError as error:
        if not is_told_later(error) and (main_rank or not is_told_by_rank_0(error)):
            print(f"interlace: {error}", file=sys.stderr)
        elif not is_told_later(error):
            # torchrun ends rank 0 as soon as it sees this one gone.
            time.sleep(TELLING_SECONDS)
        return status_of(error)
    except KeyboardInterrupt:
        if main_rank:
            print("interlace: interrupted; nothing that was committed is lost", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); nobody listens to an explanation either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DEFECT
    except Exception as error:
        if is_told_later(error):
            return Exit.DEFECT
        if os.environ.get("WORLD_SIZE", "1") != "1" and is_of_a_peer(error):
            # Before a start has its number there is no file that would tell of the other ranks.
            if main_rank or record_of(error) is None:
                print(f"interlace: another rank has gone: {first_sentence(error)}", file=sys.stderr)
            return Exit.DEFECT
        traceback.print_exc()
        print(
            "interlace: this is a defect of interlace; the traceback above tells where",
            file=sys.stderr,
        )
        return Exit.DEFECT


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message, or the kind of error if it has none, and where more
    is written.
    """
    notes: list[str] = getattr(error, "__notes__", [])
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return "; ".join([first.split(". ")[0], *notes])


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its status.

    Whatever it writes is for this user alone: models, samples and logs tell of the text.
    """
    os.umask(0o077)
    status = main(arguments)
    if "torch" in sys.modules:
        # Everything is saved and closed. Native threads of libraries (gloo's, the data readers')
        # that are still there can abort the process while the interpreter shuts down, and a run
        # that finished, or was refused in words, would count as crashed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
