"""Under Ray: ranks, machines and the launcher are killed or frozen; the run goes on by itself, and
ends with the losses of an undisturbed run, bit for bit where as many ranks trained.

Undisturbed runs are torchrun's, so every comparison also says that both launchers train alike.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_launch import (
    Launch,
    Nodes,
    Resumed,
    acknowledged,
    descendants,
    kill,
    rank_of,
    steps_done,
    wait_until_gone,
)

from interlace.trainer.checkpoint import verify_run
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.exits import Exit

pytestmark = pytest.mark.faults

pytest.importorskip("ray.train", reason="pip install 'interlace[ray]'")

Interlace = Callable[..., subprocess.CompletedProcess[str]]
LossesOf = Callable[[Path], list[str]]
RecordFault = Callable[[str, int, float], None]

SLOW = {"INTERLACE_FAILPOINT": "step.update@*:delay"}
"""A fifth of a second more for every step, so that a test can act between two of them."""

MOST_LOST = 8
"""Checkpoint interval, and the steps in which a killed rank is noticed."""


@dataclass(frozen=True)
class Job:
    """A run that is started under Ray, perhaps several times.

    Attributes:
        home: A folder of its own.
        words: Recipe and settings.
        reference: Losses of the undisturbed run.
        losses_of: Reads those of a run.
    """

    home: Path
    words: Sequence[str]
    reference: list[str]
    losses_of: LossesOf

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.home / "run"

    @property
    def acks(self) -> Path:
        """The log of acknowledged commits."""
        return self.home / "acknowledged"

    def launch(self, *words: str, **environment: str) -> Launch:
        """Return a launch of it with two ranks, unless words say otherwise."""
        always = ("--workers", "2", *self.words, f"run.dir={self.run}")
        settings = {"INTERLACE_ACK_LOG": str(self.acks), **environment}
        return Launch((*always, *words), self.home, settings)

    def judge(self) -> None:
        """Hold the finished run to the undisturbed one, and its checkpoints to the promises."""
        self.sound()
        assert self.losses_of(self.run) == self.reference

    def sound(self) -> None:
        """Hold its checkpoints to what was promised."""
        assert not [p for report in verify_run(self.run / "checkpoints") for p in report.problems]
        newest = max(CheckpointStore(self.run / "checkpoints").committed_steps())
        assert newest == acknowledged(self.acks)
        published = re.findall(r"step (\d+)", self.acks.read_text(encoding="utf-8"))
        assert len(set(published)) == len(published), "a step was published by two starts"


@pytest.fixture(scope="module")
def reference(
    interlace: Interlace,
    tiny: Sequence[str],
    losses_of: LossesOf,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """Losses of two undisturbed ranks of torchrun."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = interlace("train", *tiny, f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stderr
    return losses_of(run)


@pytest.fixture
def job(tmp_path: Path, tiny: Sequence[str], reference: list[str], losses_of: LossesOf) -> Job:
    """A run of its own for one test."""
    return Job(tmp_path, tiny, reference, losses_of)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Generator[Nodes]:
    """A cluster whose nodes tests may break; the driver's has no core for ranks."""
    with Nodes(tmp_path_factory.mktemp("nodes")) as cluster:
        yield cluster


def only_recovery(launch: Launch) -> Resumed:
    """Return the one recovery that a launch tells of."""
    (resumed,) = launch.resumed()
    return resumed


def test_e1_a_killed_rank_is_started_again(job: Job, record_fault: RecordFault) -> None:
    failing = {"INTERLACE_FAILPOINT": "step.update@23:kill", "INTERLACE_FAILPOINT_RANK": "1"}
    with job.launch(**failing) as launch:
        assert launch.wait() == 0, launch.printed()
        resumed = only_recovery(launch)
        wait_until_gone(launch.started, 30)
    assert (resumed.attempt, resumed.step, resumed.ranks) == (2, 20, 2)
    assert resumed.lost_steps <= MOST_LOST
    job.judge()
    record_fault("Ray: rank killed", resumed.lost_steps, resumed.seconds)


def test_e2_what_was_acknowledged_before_a_kill_is_never_lost(
    job: Job, record_fault: RecordFault
) -> None:
    """Three ranks are killed up to two seconds after a commit was acknowledged."""
    choice = random.Random(20_260_211)
    with job.launch("--max-failures", "9", **SLOW) as launch:
        for step in (10, 20, 30):
            launch.wait_until(lambda step=step: acknowledged(job.acks) >= step)
            time.sleep(choice.uniform(0, 2))
            promised = acknowledged(job.acks)
            before = len(launch.resumed())
            victims = launch.ranks()
            if not victims:
                break
            kill(choice.choice(victims))
            launch.wait_until(lambda before=before: len(launch.resumed()) > before)
            assert launch.resumed()[-1].step >= promised
        assert launch.wait() == 0, launch.printed()
        recoveries = launch.resumed()
    job.judge()
    assert recoveries
    for resumed in recoveries:
        record_fault("Ray: rank killed right after a commit", resumed.lost_steps, resumed.seconds)


def test_e5_a_frozen_rank_is_ended_and_started_again(job: Job, record_fault: RecordFault) -> None:
    freezing = {"INTERLACE_FAILPOINT": "step.update@23:stop", "INTERLACE_FAILPOINT_RANK": "1"}
    with job.launch("watchdog.seconds=15", **freezing) as launch:
        assert launch.wait() == 0, launch.printed()
        resumed = only_recovery(launch)
        wait_until_gone(launch.started, 30)
    job.judge()
    record_fault("Ray: rank frozen (SIGSTOP)", resumed.lost_steps, resumed.seconds)


def test_e9_after_a_killed_launcher_the_same_words_go_on(
    job: Job, record_fault: RecordFault
) -> None:
    with job.launch(**SLOW) as first:
        first.wait_until(lambda: steps_done(job.run) >= 13)
        below = descendants(first.process.pid)
        first.process.kill()
        killed = time.monotonic()
        first.process.wait()
        # Two ranks, the control store, the agent of the machine: all of them end by themselves.
        wait_until_gone(below, 30)
    promised, done = acknowledged(job.acks), steps_done(job.run)
    with job.launch() as second:
        second.wait_until(lambda: steps_done(job.run) > done or "finished" in second.printed())
        seconds = time.monotonic() - killed
        assert second.wait() == 0, second.printed()
        found = re.search(r"resumed from the checkpoint of step (\d+)", second.printed())
    assert found is not None
    assert int(found[1]) >= promised
    job.judge()
    record_fault("Ray: launcher killed, started again", done - int(found[1]), seconds)


def test_e3_a_killed_machine_is_replaced_and_its_ranks_are_gone(
    job: Job, nodes: Nodes, record_fault: RecordFault
) -> None:
    machines = [nodes.add() for _ in range(3)]
    words = ("--address", nodes.address, "--cpus-per-worker", "1")
    with job.launch(*words, **SLOW, **nodes.environment) as launch:
        launch.wait_until(lambda: steps_done(job.run) >= 12)
        raylet = next(each for each in machines if nodes.ranks_of(each))
        ranks = nodes.ranks_of(raylet)
        kill(raylet)
        launch.wait_until(launch.resumed)
        of_the_old = published_by(job.acks, 1)
        # Its ranks were told by nobody, but leave with it.
        wait_until_gone(ranks, 30)
        assert launch.wait() == 0, launch.printed()
        assert published_by(job.acks, 1) == of_the_old
        resumed = only_recovery(launch)
    job.judge()
    for each in machines:
        kill(each)
    record_fault("Ray: machine killed (raylet)", resumed.lost_steps, resumed.seconds)


def test_e4_a_frozen_machine_that_wakes_up_writes_nothing(
    job: Job, nodes: Nodes, record_fault: RecordFault
) -> None:
    """The machine of rank 0, which publishes, is cut off while it trains, and comes back when the
    run has been started again elsewhere."""
    machines = [nodes.add() for _ in range(3)]
    words = ("--address", nodes.address, "--cpus-per-worker", "1")
    with job.launch(*words, **SLOW, **nodes.environment) as launch:
        launch.wait_until(lambda: steps_done(job.run) >= 12)
        raylet = next(
            each for each in machines if any(is_first(pid) for pid in nodes.ranks_of(each))
        )
        ranks = nodes.ranks_of(raylet)
        frozen = [raylet, *descendants(raylet)]
        for pid in frozen:
            kill(pid, signal.SIGSTOP)
        launch.wait_until(launch.resumed)
        launch.wait_until(lambda: published_by(job.acks, 2))
        of_the_old = published_by(job.acks, 1)
        for pid in reversed(frozen):
            kill(pid, signal.SIGCONT)
        wait_until_gone(ranks, 60)
        assert launch.wait() == 0, launch.printed()
        assert published_by(job.acks, 1) == of_the_old
        resumed = only_recovery(launch)
    job.judge()
    for each in machines:
        kill(each)
    record_fault("Ray: machine frozen, woken later", resumed.lost_steps, resumed.seconds)


def test_e8_a_machine_that_is_taken_away_with_notice_costs_no_step(
    job: Job, nodes: Nodes, record_fault: RecordFault
) -> None:
    """The ranks save within the notice and go on elsewhere; no failure is counted."""
    machines = [nodes.add() for _ in range(3)]
    words = ("--address", nodes.address, "--cpus-per-worker", "1", "--max-failures", "0")
    notice = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with job.launch(*words, **SLOW, **notice, **nodes.environment) as launch:
        launch.wait_until(lambda: steps_done(job.run) >= 8)
        nodes.drain(next(each for each in machines if nodes.ranks_of(each)), 120)
        store, taken = CheckpointStore(job.run / "checkpoints"), [0]
        # A step takes longer than a look, so none is missed.
        launch.wait_until(lambda: taken.append(steps_done(job.run)) or store.live_attempt() == 2)
        assert launch.wait() == 0, launch.printed()
        moved = re.search(
            r"attempt 2 goes on at step (\d+) on 2 ranks, ([0-9.]+) s after", launch.printed()
        )
    assert moved is not None, launch.printed()
    assert f"step {moved[1]} attempt 1 committed" in job.acks.read_text(encoding="utf-8")
    assert max(taken) == int(moved[1])
    job.judge()
    for each in machines:
        kill(each)
    lost = max(taken) - int(moved[1])
    record_fault("Ray: machine taken away with notice", lost, float(moved[2]))


def test_the_package_is_taken_along_to_workers_that_do_not_have_it(
    job: Job, nodes: Nodes, root: Path
) -> None:
    """A copy that only the launching process can import says something of its own."""
    copy = job.home / "copy" / "interlace"
    shutil.copytree(root / "interlace", copy, ignore=shutil.ignore_patterns("__pycache__"))
    marked = copy / "trainer" / "assembly.py"
    text = marked.read_text(encoding="utf-8")
    assert text.count('f"run folder {folder.path}"') == 1
    marked.write_text(
        text.replace('f"run folder {folder.path}"', 'f"a copy writes {folder.path}"'),
        encoding="utf-8",
    )
    machine = nodes.add()
    words = ("--address", nodes.address, "--workers", "1", "--cpus-per-worker", "1")
    seen = {"PYTHONPATH": str(copy.parent), **nodes.environment}
    with job.launch(*words, "train.steps=2", **seen) as launch:
        assert launch.wait() == 0, launch.printed()
        assert f"a copy writes {job.run}" in launch.printed()
    kill(machine)


def test_i4_a_cluster_that_admits_anybody_is_refused(
    job: Job, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Nodes(tmp_path_factory.mktemp("open"), "disabled") as nodes:
        with job.launch("--address", nodes.address, **nodes.environment) as launch:
            assert launch.wait() == Exit.MISTAKE, launch.printed()
            assert "admits anybody who can reach it" in launch.printed()
        nodes.add()
        words = ("--address", nodes.address, "--allow-open-cluster", "train.steps=1")
        with job.launch(*words, "--workers", "1", **nodes.environment) as launch:
            assert launch.wait() == 0, launch.printed()


def test_an_elastic_run_shrinks_and_grows(
    job: Job, nodes: Nodes, interlace: Interlace, record_fault: RecordFault
) -> None:
    """2 ranks, 1 when a machine is lost, 2 when another comes; growing loses no step."""
    longer = "train.steps=150"
    undisturbed = job.home / "undisturbed"
    done = interlace("train", *job.words, longer, f"run.dir={undisturbed}", ranks=2)
    assert done.returncode == 0, done.stderr
    machines = [nodes.add(), nodes.add()]
    words = ("--address", nodes.address, "--cpus-per-worker", "1", "--resize-seconds", "3")
    with job.launch(longer, "--workers", "1:2", *words, **SLOW, **nodes.environment) as launch:
        launch.wait_until(lambda: steps_done(job.run) >= 12)
        kill(machines[1])
        launch.wait_until(launch.resumed)
        machines.append(nodes.add())
        assert launch.wait() == 0, launch.printed()
        printed, resumed = launch.printed(), only_recovery(launch)
    assert resumed.ranks == 1
    grown = re.search(r"attempt 3 goes on at step (\d+) on 2 ranks", printed)
    assert grown is not None, printed
    assert int(grown[1]) < 150
    job.sound()
    assert_near(job.losses_of(job.run), job.losses_of(undisturbed))
    for each in machines:
        kill(each)
    record_fault("Ray: machine lost, with fewer ranks", resumed.lost_steps, resumed.seconds)


def test_three_launches_of_2_1_and_2_ranks_agree(job: Job) -> None:
    """Each but the last is stopped by a signal to the launcher, and has saved when it ends."""
    for workers, number, until in (("2", signal.SIGINT, 8), ("1", signal.SIGTERM, 18)):
        with job.launch("--workers", workers, **SLOW) as launch:
            launch.wait_until(lambda until=until: steps_done(job.run) >= until)
            launch.process.send_signal(number)
            assert launch.wait() == 0, launch.printed()
            assert "the state is saved" in launch.printed()
        assert acknowledged(job.acks) == steps_done(job.run)
    with job.launch() as launch:
        assert launch.wait() == 0, launch.printed()
    job.sound()
    assert_near(job.losses_of(job.run), job.reference)


@pytest.fixture(scope="module")
def private(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Generator[Launch]:
    """A launch on this machine, in the middle of its training."""
    home = tmp_path_factory.mktemp("private")
    words = (*tiny, "train.steps=4000", f"run.dir={home / 'run'}")
    with Launch(words, home, SLOW) as launch:
        launch.wait_until(lambda: steps_done(home / "run") >= 1)
        yield launch
        launch.process.send_signal(signal.SIGINT)
        launch.wait()


def test_i4_nobody_gets_into_our_ray_without_its_token(private: Launch, root: Path) -> None:
    settings = environment_of(private)
    token = Path(settings["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    address = control_address(private)
    for guess in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        assert asks(address, root, guess) == 1
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert asks(address, root, right) == 0
    # The token is in no command line, where every user of the machine could read it.
    secret = token.read_text(encoding="ascii")
    shown = [Path(f"/proc/{pid}/cmdline") for pid in descendants(private.process.pid)]
    assert not any(secret.encode() in path.read_bytes() for path in shown if path.exists())


def test_i5_our_ray_listens_on_the_loopback_only(private: Launch) -> None:
    """But for the store through which torch's ranks find each other, which has no such choice."""
    below = {private.process.pid, *descendants(private.process.pid)}
    listening = sockets_of(below)
    assert any(address.startswith("127.") for _, address in listening)
    open_to_all = [(pid, address) for pid, address in listening if not is_loopback(address)]
    ranks = set(private.ranks())
    assert [pid for pid, _ in open_to_all if pid not in ranks] == []
    assert len(open_to_all) <= 1, open_to_all


def published_by(acks: Path, attempt: int) -> list[int]:
    """Return the steps that one attempt has published."""
    text = acks.read_text(encoding="utf-8")
    return [int(step) for step in re.findall(rf"step (\d+) attempt {attempt} ", text)]


def is_first(pid: int) -> bool:
    """Whether a process is rank 0."""
    return rank_of(pid) == 0


def assert_near(losses: Sequence[str], reference: Sequence[str]) -> None:
    """Hold losses to those of an undisturbed run, step by step."""
    assert len(losses) == len(reference)
    pairs = zip(losses, reference, strict=True)
    assert max(abs(float.fromhex(a) - float.fromhex(b)) for a, b in pairs) <= 1e-5


def environment_of(launch: Launch) -> dict[str, str]:
    """Return the environment of the Ray that a launch has started."""
    agent = next(pid for pid in descendants(launch.process.pid) if has_token(pid))
    text = Path(f"/proc/{agent}/environ").read_bytes().decode(errors="replace")
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def has_token(pid: int) -> bool:
    """Whether a process was told where the token lies."""
    try:
        return b"RAY_AUTH_TOKEN_PATH" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def control_address(launch: Launch) -> str:
    """Return where the control store of a launch listens."""
    for pid in descendants(launch.process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if (found := re.search(r"--gcs-address=([0-9.]+:\d+)", words)) is not None:
            return found[1]
    raise AssertionError("no process names the control store")


def asks(address: str, root: Path, settings: dict[str, str]) -> int:
    """Ask a control store for its nodes with some credentials; return the exit status."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "interlace.launch.launchers.ray.stranger", address]
    default = {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"}
    done = subprocess.run(
        command, env={**kept, **default, **settings}, cwd=root, capture_output=True, timeout=120
    )
    return done.returncode


def sockets_of(pids: set[int]) -> list[tuple[int, str]]:
    """Return (process, address) of every TCP socket that these processes listen at."""
    owners: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[str(path.readlink())] = pid
    found: list[tuple[int, str]] = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == "0A" and owner is not None:
                found.append((owner, shown(fields[1].split(":")[0], family)))
    return found


def shown(digits: str, family: socket.AddressFamily) -> str:
    """Return the kernel's hexadecimal address as people write it."""
    raw = bytes.fromhex(digits)
    # Each group of four bytes is in this machine's order.
    ordered = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return socket.inet_ntop(family, ordered).removeprefix("::ffff:")


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine only."""
    return address.startswith("127.") or address == "::1"
