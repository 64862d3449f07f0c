"""Runs of `train.py` that start in a moment and may be killed: forks of a process that has done the imports."""

import atexit
import importlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Template:
    """A process with everything imported and no threads; each `start` forks workers that run `train.main`.

    Args:
        variables: of the environment, for the template and all its workers.
    """

    def __init__(self, **variables: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(
        self,
        argv: list[str],
        output: Path,
        ranks: int = 1,
        largest_file: int | None = None,
        module: str = "train",
        **variables: str,
    ) -> "Workers":
        """Fork the processes of a run.

        Args:
            argv: the command line after `train.py`.
            output: the file that takes stdout and stderr of all ranks.
            ranks: how many, as torchrun would start them on this machine.
            largest_file: bytes beyond which no file grows (RLIMIT_FSIZE); writing more fails as on a full disk.
            module: whose `main(argv)` runs.
            variables: of the environment.
        """
        request = {"argv": argv, "output": str(output), "largest_file": largest_file, "module": module}
        port = _free_port()
        environments = [variables | (_environment(rank, ranks, port) if ranks > 1 else {}) for rank in range(ranks)]
        return Workers(self, [self.ask(request | {"environment": e}) for e in environments], output)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the template; workers that still run are killed by it."""
        self._process.communicate("")


@dataclass
class Workers:
    """The processes of one run, by rank."""

    template: Template
    pids: list[int]
    output: Path

    def poll(self) -> list[int | None]:
        """Return the exit code of each rank, None of one that runs, -N of one that signal N has ended."""
        return [self.template.ask({"poll": pid}) for pid in self.pids]

    def send(self, number: int) -> None:
        """Send a signal to all ranks that run."""
        for pid, code in zip(self.pids, self.poll(), strict=True):
            if code is None:
                os.kill(pid, number)

    def kill(self) -> list[int | None]:
        """Kill all ranks at once, as a power cut does; return their exit codes."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = 120.0) -> list[int | None]:
        """Return the exit codes when all ranks have ended; those that don't are killed and fail the test."""
        self.wait_for(lambda: False, seconds)
        return self.poll()

    def wait_for(self, seen: Callable[[], Any], seconds: float = 120.0) -> bool:
        """Wait until `seen()`; return False where all ranks ended before."""
        deadline = time.monotonic() + seconds
        while None in self.poll():
            if _seen_soon(seen):
                return True
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"no end after {seconds} s: {self.said()}")
        return bool(seen())

    def said(self) -> str:
        """Return what the ranks have printed."""
        return self.output.read_text(errors="replace")


def _seen_soon(seen: Callable[[], Any]) -> bool:
    """Look every millisecond, which is cheap, for as long as it takes to be worth asking for exit codes again."""
    for _ in range(20):
        if seen():
            return True
        time.sleep(0.001)
    return False


def lines(path: Path, *without: str) -> list[dict[str, Any]]:
    """Return the records of a JSONL file, which must all be whole, without the keys named."""
    content = path.read_bytes() if path.exists() else b""
    assert content.endswith(b"\n") or not content, f"{path} ends in a torn line"
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in content.splitlines()]


def outcome(out: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on faults, files by their bytes."""
    last = max((out / "checkpoints").iterdir())
    files = {path.name: path.read_bytes() for path in (*last.glob("*.*"), *last.glob("model/*.safetensors"))}
    del files["manifest.json"]  # it lists the model card, which names the run's folder
    del files["rng.safetensors"]  # Python's own generator starts anywhere; a run draws nothing from it
    evaluations = (out / "evaluations.jsonl").read_bytes()
    return {**files, "metrics": lines(out / "metrics.jsonl", "tokens_per_second"), "evaluations": evaluations}


def check_equal(out: Path, whole: Path) -> None:
    """Check that two finished runs are the same run: weights, optimizer, generators, state, metrics, evaluations."""
    ours, theirs = outcome(out), outcome(whole)
    assert ours.keys() == theirs.keys() >= {"model.safetensors", "optimizer.safetensors"}
    assert [name for name in ours if ours[name] != theirs[name]] == []


def leftovers(folder: Path) -> set[str]:
    """Return the temporary files and folders below `folder`, which a run hides by a dot; locks stay for ever."""
    return {path.name for path in folder.rglob(".*") if path.suffix != ".lock" and path.name != ".lock"}


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}


def _free_port() -> int:
    """Return a port below those that the system gives to connections, which could take it at any moment."""
    for port in random.SystemRandom().sample(range(15_000, 30_000), 100):
        with closing(socket.socket()) as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def serve() -> None:
    """Answer the requests of a `Template` until its input ends; a worker returns from here to run and exit."""
    workers: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            answer = workers[request["poll"]] = _code(request["poll"], workers[request["poll"]])
        elif answer := os.fork():
            workers[answer] = None
        else:
            _become(request)
            _end(sys.modules[request["module"]].main(request["argv"]))
        print(json.dumps(answer), flush=True)
    for pid, code in workers.items():
        if _code(pid, code) is None:
            os.kill(pid, signal.SIGKILL)


def _code(pid: int, known: int | None) -> int | None:
    if known is not None:
        return known
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _become(request: dict[str, Any]) -> None:
    """Turn a fork of the template into a worker: its own streams, environment and limit."""
    os.environ.update(request["environment"])
    streams = (("/dev/null", os.O_RDONLY), *[(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2)
    for number, (path, flags) in enumerate(streams):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["largest_file"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], hard))


def _end(code: int) -> None:
    """Exit as Python does, but leave the imported modules, which would take a second to destroy."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# What a run imports on its way, so that a start costs none of it; scripts may be run as well.
IMPORTED = [
    "accelerate.optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "scripts.verify_checkpoint",
    "torch.distributed",
    "torch.utils.tensorboard",
    "train",
    "training.report",
    "training.trainer",
]

if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer  # noqa: F401 (found when asked for)

    serve()
