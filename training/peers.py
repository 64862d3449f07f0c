"""A watch over the other processes of a run: one that died or is stuck is named, and nobody waits for it for ever.

Each process tells the others, twice a second and from a thread of its own, that it is alive, what its main thread is
doing, and how it ended. They exchange this through the store over which torch.distributed found them.
"""

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

from training.errors import PeerError, RunError
from training.processes import Processes

_INTERVAL = 0.5  # s between two signs of life
_SILENT = 5.0  # s without a sign after which a process is dead, where something else says so too
START_SECONDS = 1800.0  # that a process may take for one thing until the first step of a start is done, or to save
_HINT = "; training.peer_timeout allows more"


@dataclass
class _Seen:
    """What is known of a process; times are of the clock of the one that knows."""

    place: str = ""
    beat: int = 0
    heard: float = field(default_factory=time.monotonic)
    mark: int = 0
    what: str = "starting"
    limit: float = START_SECONDS
    since: float = field(default_factory=time.monotonic)
    ending: str | None = None  # "" for a good one

    def tell(self) -> str:
        return json.dumps([self.beat, self.mark, self.what, self.limit, self.place, self.ending])

    def hear(self, told: bytes) -> None:
        before = (self.beat, self.mark)
        self.beat, self.mark, self.what, self.limit, self.place, self.ending = json.loads(told)
        now = time.monotonic()
        self.heard = now if self.beat != before[0] else self.heard
        self.since = now if self.mark != before[1] else self.since

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.place})" if self.place else f"rank {rank}"


class Peers:
    """The watch of one process; its methods are for the main thread.

    Args:
        processes: those of the run.
        timeout: seconds that a process waits for another one, once its first step is done.
        told_to_stop: whether a signal has come, as a launcher sends one when a process of its own has died.
        give_up: called from another thread with the error when the main thread waits in vain; must not return.
    """

    def __init__(
        self,
        processes: Processes,
        timeout: float,
        told_to_stop: Callable[[], bool],
        give_up: Callable[[PeerError], None],
    ) -> None:
        self.processes, self.timeout = processes, timeout
        self._told_to_stop, self._give_up = told_to_stop, give_up
        self._patience = START_SECONDS
        self._me = _Seen(_place())
        self._seen = {rank: _Seen() for rank in range(processes.count) if rank != processes.rank}
        self._running = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the block ends; an error that comes of a lost process becomes a PeerError that names it."""
        if self.processes.count == 1:
            yield
            return
        self._store = _connect()
        for rank, place in enumerate(self.processes.gather_objects(_place())):
            if rank != self.processes.rank:
                self._seen[rank].place = place
        self._running = True
        exchange = threading.Thread(target=self._exchange, daemon=True)
        exchange.start()
        threading.Thread(target=self._judge, daemon=True).start()
        try:
            yield
            self._me.ending = ""
        except BaseException as error:
            lost = self._find_cause() if _is_of_connection(error) else None
            self._me.ending = str(lost) if lost else str(error) if isinstance(error, RunError) else _told(error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            self._running = False
            exchange.join(timeout=4 * _INTERVAL)

    def at(self, what: str, limit: float = 0.0) -> None:
        """Note what the main thread begins; all processes note the same things in the same order.

        Args:
            what: for messages.
            limit: seconds that it may take, where that is more than the time-out.
        """
        me = self._me
        me.what, me.since, me.limit = what, time.monotonic(), max(limit, self._patience)
        me.mark += 1

    def first_step_done(self) -> None:
        """From now on the time-out counts."""
        self._patience = self.timeout

    def _exchange(self) -> None:
        """Tell and hear, until the run ends; the last thing told is how it ended."""
        running = True
        while running:
            running = self._running
            self._me.beat += 1
            with contextlib.suppress(DistError):  # silence is what `_judge` looks for
                self._store.set(str(self.processes.rank), self._me.tell())
                for rank, seen in self._seen.items():
                    if self._store.check([str(rank)]):
                        seen.hear(self._store.get(str(rank)))
            time.sleep(_INTERVAL if running else 0)

    def _judge(self) -> None:
        while self._running:
            time.sleep(_INTERVAL)
            self._me.heard = time.monotonic()
            error = self._lost(self._patience) or self._stuck() if self._me.ending is None else None
            if error is not None and self._running:
                self._me.ending = str(error)
                time.sleep(2 * _INTERVAL)  # the others are told
                self._give_up(error)

    def _lost(self, patience: float) -> PeerError | None:
        """The processes that are silent for too long, or ended before their time."""
        now = time.monotonic()
        if self._told_to_stop() and now - self._me.since > _SILENT:
            patience = _SILENT
        silent = {r: seen for r, seen in self._seen.items() if seen.ending is None and now - seen.heard > patience}
        if silent:
            texts = [
                f"{s.name(r)} gave no sign of life for {now - s.heard:.0f} s, last in {s.what}"
                for r, s in silent.items()
            ]
            return PeerError("; ".join(texts), list(silent))
        failed = {
            r: seen for r, seen in self._seen.items() if seen.ending and now - seen.heard > min(_SILENT, patience)
        }
        if failed:
            first = min(failed, key=lambda r: str(failed[r].ending).startswith("rank "))  # a cause, not an effect
            return PeerError(f"{failed[first].name(first)} ended: {failed[first].ending}", list(failed))
        return None

    def _stuck(self) -> PeerError | None:
        """The processes that are behind the others and have been doing one thing for too long."""
        now, rank = time.monotonic(), self.processes.rank
        busy = {r: seen for r, seen in (self._seen | {rank: self._me}).items() if seen.ending != ""}
        last = min(seen.mark for seen in busy.values())
        behind = {r: seen for r, seen in busy.items() if seen.mark == last}
        if any(now - seen.since <= seen.limit for seen in behind.values()):
            return None
        one = next(iter(behind.values()))
        waited = f"{now - one.since:.0f} s in {one.what}"
        if len(behind) == len(busy):
            return PeerError(f"all processes have been {waited}{_HINT}")
        names = ", ".join(seen.name(r) for r, seen in behind.items())
        text = f"{names} stuck for {waited}, while others wait{_HINT}"
        return PeerError(text, [r for r in behind if r != rank])

    def _find_cause(self) -> PeerError | None:
        """After an error in this process: the process that is gone, if one is."""
        for _ in range(int(2 * _SILENT / _INTERVAL)):
            lost = self._lost(patience=_SILENT / 2)
            if lost is not None:
                return lost
            time.sleep(_INTERVAL)
        return None


def _is_of_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, DistError) or re.search(r"gloo|nccl|connection|peer", str(error), re.IGNORECASE) is not None
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _place() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _connect() -> PrefixStore:
    """A connection of its own to the store of the process group, which may be in use for minutes."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore(f"peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
