"""Trials in processes of this machine, several at a time.

A worker serves trial after trial. One that dies takes its trial with it and nothing else: the trial
counts as crashed, and the next one gets a new worker. Workers are not in the terminal's group, so
that Ctrl-C reaches the sweep alone, which then closes their pipes.
"""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from interlace.launch.sweep.conducting import Ended, Job
from interlace.launch.sweep.running import last_lines
from interlace.launch.sweep.store import Store
from interlace.launch.sweep.worker import SOURCES_CHANGED
from interlace.trainer.errors import UserError

CLOSING_SECONDS = 5.0
WORKER = "interlace.launch.sweep.worker"


@dataclass
class Worker:
    """One process, what it has said so far, and the trial it runs."""

    process: "subprocess.Popen[bytes]"
    place: int
    job: Job | None = None
    said: bytes = b""


@dataclass
class LocalRunner:
    """Runs trials in processes of its own.

    Attributes:
        store: Where they keep results.
        code: Digest of the code that results are kept under.
        jobs: Trials at a time.
        threads: Threads of each.
        gpus: GPUs that the processes share out among themselves; 0 without any.
    """

    store: Store
    code: str
    jobs: int
    threads: int
    gpus: int = 0
    workers: list[Worker] = field(default_factory=list[Worker])
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def room(self) -> int:
        """Return how many more trials can be started now."""
        return self.jobs - sum(worker.job is not None for worker in self.workers)

    def start(self, job: Job) -> None:
        """Give a trial to an idle worker, or to a new one."""
        log = self.store.log_of(job.key)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        idle = (worker for worker in self.workers if worker.job is None)
        worker = next(idle, None) or self.begin_worker(job)
        worker.job = job
        request = json.dumps({"key": job.key, "recipe": job.recipe}) + "\n"
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(request.encode())
            worker.process.stdin.flush()
        except BrokenPipeError:
            # It died while idle; what it answers next is the end of its output.
            return

    def begin_worker(self, job: Job) -> Worker:
        """Start a process; until it runs its first trial its log is that trial's."""
        taken = {worker.place for worker in self.workers}
        place = min(set(range(self.jobs)) - taken)
        with self.store.log_of(job.key).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, os.fspath(self.store.folder), self.code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment(place),
                start_new_session=True,
            )
        assert process.stdout is not None
        worker = Worker(process, place)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        self.workers.append(worker)
        return worker

    def environment(self, place: int) -> Mapping[str, str]:
        """Return the environment of a worker: its threads, and one of the GPUs."""
        own = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        own["NUMBA_NUM_THREADS"] = str(self.threads)
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = visible if visible != [""] else [str(n) for n in range(self.gpus)]
            own["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
        return {**os.environ, **own}

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return what has ended, waiting for so long at most."""
        ended: list[Ended] = []
        for key, _ in self.selector.select(seconds):
            worker: Worker = key.data
            assert worker.process.stdout is not None
            piece = os.read(worker.process.stdout.fileno(), 65536)
            worker.said += piece
            *complete, worker.said = worker.said.split(b"\n")
            for line in complete:
                ended.append(self.answered(worker, str(json.loads(line)["problem"])))
            if not piece:
                ended += self.buried(worker)
        return ended

    def answered(self, worker: Worker, problem: str) -> Ended:
        """Return how a worker's trial ended."""
        job = worker.job
        assert job is not None, "a worker answers what it was asked"
        worker.job = None
        if problem:
            return Ended(job, None, self.described(job, problem))
        return Ended(job, self.store.read(job.key))

    def buried(self, worker: Worker) -> list[Ended]:
        """Take leave of a worker that has died, and of its trial if it had one.

        Raises:
            UserError: It left since the code is not what it was.
        """
        self.selector.unregister(worker.process.stdout)  # pyright: ignore[reportArgumentType] - a pipe
        self.workers.remove(worker)
        status = worker.process.wait()
        if status == SOURCES_CHANGED:
            raise UserError(
                "the code of interlace has changed while the sweep ran, so further results would "
                "be of another program; what is finished is kept, start the sweep again"
            )
        if worker.job is None:
            return []
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return [Ended(worker.job, None, self.described(worker.job, f"its process died ({how})"))]

    def described(self, job: Job, problem: str) -> str:
        """Return a problem with the end of the log and where all of it is."""
        log = self.store.log_of(job.key)
        ending = [f"    {line}" for line in last_lines(log)]
        return "\n".join([problem, *ending, f"    log: {log}"])

    def close(self) -> None:
        """Stop every worker; a trial that runs is lost, and runs again when it is needed."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait(CLOSING_SECONDS)
            for stream in (worker.process.stdin, worker.process.stdout):
                if stream is not None:
                    stream.close()
        self.workers.clear()
        self.selector.close()
