"""`interlace launch ray`: what its words mean, and that its ranks train as those of torchrun."""

import asyncio
import io
import re
import signal
import subprocess
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from interlace.launch.cli import build_parser, main
from interlace.launch.launchers.ray.bridge import Begun, Bridge, Ending, Wish
from interlace.launch.launchers.ray.cluster import (
    Cluster,
    local_environment,
    shipped,
    start_sweeper,
)
from interlace.launch.launchers.ray.console import Forwarded
from interlace.launch.launchers.ray.driving import trainer_of
from interlace.launch.launchers.ray.request import Request, Workers, even_counts, request_of
from interlace.launch.launchers.ray.stranger import admitted
from interlace.launch.launchers.ray.terminal import Terminal, recovery_lines
from interlace.launch.launchers.ray.worker import appears
from interlace.trainer.config import load_recipe
from interlace.trainer.exits import Exit

Interlace = Callable[..., subprocess.CompletedProcess[str]]
LossesOf = Callable[[Path], list[str]]


def words(*more: str) -> Namespace:
    """Return the parsed words of a launch."""
    return build_parser().parse_args(["launch", "ray", "fault-drill", *more])


def asked(*more: str) -> Request:
    """Return what a launch asks for."""
    parsed = words(*more)
    return request_of(parsed, load_recipe("fault-drill", parsed.overrides).config)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--workers", "two"), "--workers two: is neither a number of ranks nor a range"),
        (("--workers", "4:2"), "--workers 4:2: is neither a number of ranks nor a range"),
        (("--workers", "0"), "--workers 0: is neither a number of ranks nor a range"),
        (("--workers", "7"), "no such number of ranks divides evenly; type --workers 8"),
        (("--workers", "5:7"), "--workers 5:7: a step has"),
        (("--max-failures", "-2"), "type --max-failures -1 to start again always"),
        (("--cpus-per-worker", "0"), "a rank needs one; type --cpus-per-worker 1"),
        (("--resize-seconds", "0"), "must be more than 0; type --resize-seconds 60"),
        (("--address", "somewhere"), "--address somewhere: is no Ray cluster; type"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_ray_is_loaded(
    option: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    assert main(["launch", "ray", "fault-drill", run, *option]) == Exit.MISTAKE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_range_of_ranks_leaves_out_those_that_do_not_divide_a_step() -> None:
    request = asked("--workers", "2:9")
    assert request.workers == Workers(2, 9)
    rows = request.config.train.tokens_per_step // request.config.data.sequence_length
    counts = even_counts(request.config, Workers(2, 9))
    assert counts == [count for count in range(2, 10) if rows % count == 0]
    assert 2 in counts
    assert 7 not in counts


def cluster(tmp_path: Path, workers: Workers, gpus: int = 0) -> Cluster:
    """Return a cluster that nobody has started."""
    return Cluster(False, tmp_path, workers, 3, gpus, io.StringIO())


def test_ray_train_is_asked_for_ranks_resources_and_new_starts(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="pip install 'interlace[ray]'")
    request = asked("--placement", "strict-spread")
    trainer = trainer_of(request, tmp_path, cluster(tmp_path, Workers(4, 4), gpus=4), None)
    scaling, failures = trainer.scaling_config, trainer.run_config.failure_config
    assert (scaling.num_workers, scaling.use_gpu) == (4, True)
    assert scaling.resources_per_worker == {"CPU": 3, "GPU": 1}
    assert scaling.placement_strategy == "STRICT_SPREAD"
    assert (failures.max_failures, failures.max_preemption_failures) == (3, -1)
    assert trainer.backend_config.backend == "cpu:gloo,cuda:nccl"
    assert trainer.train_loop_config["errand"].run_dir == tmp_path
    # Ray Train takes a name that it knows for a run that is finished.
    again = trainer_of(request, tmp_path, cluster(tmp_path, Workers(4, 4)), None)
    assert again.run_config.name != trainer.run_config.name


def test_an_elastic_run_chooses_a_number_of_ranks_that_fits_its_step(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="pip install 'interlace[ray]'")
    request = asked("--workers", "1:7", "--resize-seconds", "5")
    trainer = trainer_of(request, tmp_path, cluster(tmp_path, Workers(1, 7)), None)
    assert trainer.scaling_config.num_workers == (1, 7)
    assert trainer.scaling_config.elastic_resize_monitor_interval_s == 5
    room = {"one": {"CPU": 9.0}, "other": {"CPU": 13.0}}
    # 3 + 4 ranks would find room; 8 rows are spread over 4.
    assert trainer.policy._count_possible_workers(room) == 4
    assert trainer.policy._count_possible_workers({"one": {"CPU": 2.0}}) == 0


def test_ranks_get_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runtime = shipped()
    assert runtime["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert "planted" not in str(runtime)
    assert [Path(each).name for each in runtime["py_modules"]] == ["interlace"]
    local = local_environment(3)
    assert (local["OMP_NUM_THREADS"], local["GLOO_SOCKET_IFNAME"]) == ("3", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert local_environment(3)["OMP_NUM_THREADS"] == "1"


def test_an_older_generation_is_not_heard_and_is_told_to_leave() -> None:
    async def talk() -> None:
        bridge = Bridge()
        first = await bridge.begin()
        await bridge.say(first, ["one"])
        assert not (await bridge.beat(first, 0)).superseded
        second = await bridge.begin()
        await bridge.say(first, ["of a zombie"])
        await bridge.end(Ending(first, 0, Exit.SUPERSEDED))
        await bridge.resume(Begun(first, 1, 2, 5, 0))
        await bridge.say(second, ["two"])
        assert (await bridge.beat(first, 0)).superseded
        news = await bridge.listen(1)
        assert (news.lines, news.begun, news.endings) == (["one", "two"], [], [])

    asyncio.run(talk())


def test_a_wish_to_move_ends_with_the_move_and_one_to_stop_stays() -> None:
    async def talk() -> None:
        bridge = Bridge()
        first = await bridge.begin()
        await bridge.stop(Wish("more machines", moving=True))
        assert (await bridge.beat(first, 0)).moving
        second = await bridge.begin()
        assert not (await bridge.beat(second, 0)).reason
        await bridge.resume(Begun(second, 2, 2, 5, 0))
        # Ray itself told the ranks of this one that their machine goes.
        await bridge.end(Ending(second, 0, Exit.DONE, moving=True))
        third = await bridge.begin()
        await bridge.resume(Begun(third, 3, 2, 9, 0))
        fourth = await bridge.begin()
        await bridge.resume(Begun(fourth, 4, 2, 9, 0))
        begun = (await bridge.listen(1)).begun
        assert [each.moved for each in begun] == [True, True, False]
        await bridge.stop(Wish("SIGINT"))
        await bridge.stop(Wish("more machines", moving=True))
        assert await bridge.beat(fourth, 0) == Wish("SIGINT")

    asyncio.run(talk())


def test_a_recovery_tells_step_time_and_what_is_repeated(tmp_path: Path) -> None:
    lost = Begun(2, 2, 4, 20, 3, 11.04, moved=False)
    said = "attempt 2 resumed at step 20 on 4 ranks, 11.0 s after the failure, 3 steps repeated"
    assert recovery_lines(lost, tmp_path) == [said]
    moved = Begun(3, 3, 8, 25, 0, 9.0, moved=True)
    said = "attempt 3 goes on at step 25 on 8 ranks, 9.0 s after the last one stopped"
    assert recovery_lines(moved, tmp_path) == [said]


def test_an_end_that_no_start_can_cure_ends_the_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def news(bridge: Bridge, *endings: Ending) -> None:
        for ending in endings:
            await bridge.end(ending)

    bridge = Bridge()
    asyncio.run(bridge.begin())
    asyncio.run(news(bridge, Ending(1, 1, Exit.NUMERICS, message="loss nan"), Ending(1, 0, 0)))
    terminal = Terminal(None, tmp_path, io.StringIO())
    terminal.take(bridge.news)
    assert terminal.status(None) == Exit.NUMERICS
    assert "interlace: loss nan" in capsys.readouterr().err


def test_printed_lines_are_sent_whole_and_in_order() -> None:
    sent: list[str] = []
    beneath = io.StringIO()
    forwarded = Forwarded(sent.extend, beneath)
    print("one\ntw", end="", file=forwarded)
    print("o", file=forwarded)
    print("rest", end="", file=forwarded)
    forwarded.finish()
    assert sent == ["one", "two", "rest"]
    assert beneath.getvalue() == "one\ntwo\nrest"


def test_what_a_launch_leaves_is_ended_with_it_and_nothing_else(tmp_path: Path) -> None:
    mine, other = tmp_path / "launch", tmp_path / "other"
    asleep: list[subprocess.Popen[bytes]] = []
    for folder in (mine, other):
        folder.mkdir()
        with (folder / "log").open("wb") as log:
            asleep.append(subprocess.Popen(["sleep", "600"], stdout=log))
    sweeper = start_sweeper(mine)
    assert asleep[0].poll() is None
    # As when the launching process ends, which has a log open itself and may take its time.
    with (mine / "own").open("wb"):
        sweeper.communicate(timeout=60)
    assert asleep[0].wait(60) == -signal.SIGKILL
    assert asleep[1].poll() is None
    asleep[1].kill()
    asleep[1].wait()
    assert not mine.exists()
    assert other.exists()


def test_a_file_that_others_have_written_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interlace.launch.launchers.ray.worker.VISIBLE_SECONDS", 0.3)
    assert not appears(tmp_path / "marker")
    (tmp_path / "marker").touch()
    assert appears(tmp_path / "marker")
    assert not appears(tmp_path / "elsewhere" / "marker")


@pytest.mark.long
def test_two_ranks_of_ray_train_as_two_of_torchrun_and_nearly_as_one(
    interlace: Interlace, tiny: Sequence[str], losses_of: LossesOf, tmp_path: Path
) -> None:
    pytest.importorskip("ray.train", reason="pip install 'interlace[ray]'")
    short = (*tiny, "train.steps=12", "observe.log_every_steps=4")
    runs = {name: tmp_path / name for name in ("one", "torchrun", "ray")}
    done = [
        interlace("train", *short, f"run.dir={runs['one']}"),
        interlace("train", *short, f"run.dir={runs['torchrun']}", ranks=2),
        interlace("launch", "ray", *short, f"run.dir={runs['ray']}", "--workers", "2"),
    ]
    for each in done:
        assert each.returncode == 0, each.stdout + each.stderr
    one, torchrun, ray = (losses_of(run) for run in runs.values())
    assert ray == torchrun
    pairs = zip(ray, one, strict=True)
    assert max(abs(float.fromhex(a) - float.fromhex(b)) for a, b in pairs) <= 1e-5
    # The terminal shows what it shows under torchrun.
    steps = [re.findall(r"^step +\d+/\d+ +loss +\S+", each.stdout, re.M) for each in done[1:]]
    assert steps[0] == steps[1]
    assert len(steps[1]) == 4
    assert done[2].stderr == ""


@pytest.mark.parametrize(("status", "lets_in"), [("UNAUTHENTICATED", False), ("NOT_FOUND", True)])
def test_a_server_for_clients_that_answers_without_a_token_is_open(
    status: str, lets_in: bool
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    grpc: Any = pytest.importorskip("grpc")

    class Server(grpc.GenericRpcHandler):
        """Answers every call with one status, as Ray's does a client that it does not know."""

        def service(self, handler_call_details: Any) -> Any:
            def answer(request: Any, context: Any) -> bytes:
                context.abort(grpc.StatusCode[status], "")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Server()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert admitted(f"ray://127.0.0.1:{port}") == lets_in
    finally:
        server.stop(None)
