"""A module for `--import`: the process sends itself signal SIGNAL, twice, when it begins what SIGNAL_AT names."""

import ctypes
import os
import signal
import time

from training.peers import Peers

begin = Peers.at


def signalled(self, what, limit=0.0):
    """What the main thread begins, once with a signal."""
    begin(self, what, limit)
    if os.environ["SIGNAL_AT"] == "deaf":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock, as no handler can
    elif os.environ["SIGNAL_AT"] and what.startswith(os.environ["SIGNAL_AT"]):
        for _ in range(2):
            signal.raise_signal(int(os.environ["SIGNAL"]))
            time.sleep(0.01)


Peers.at = signalled
