"""The reasons for which a run ends early, each with its exit code."""

from collections.abc import Sequence


class RunError(Exception):
    """A failure whose message is for the user: it names the thing, what was expected and what came."""

    exit_code = 1

    def __str__(self) -> str:
        """The message in one line that a terminal shows as it is, whatever a file put into it."""
        line = " ".join(filter(None, map(str.strip, super().__str__().splitlines())))
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class ConfigError(RunError):
    """The configuration or the command line is wrong; nothing was written."""

    exit_code = 2


class DataError(RunError):
    """A corpus, a tokenizer or a token file can't be used."""

    exit_code = 3


class CheckpointError(RunError):
    """A checkpoint is missing, incomplete, altered or belongs to another run."""

    exit_code = 4


class NonFiniteError(RunError):
    """The loss or the gradient norm is NaN or infinite."""

    exit_code = 5


class PeerError(RunError):
    """Another process of the run died or did not answer in time; `lost` has the ranks of those that are gone."""

    exit_code = 6

    def __init__(self, message: str, lost: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.lost = list(lost)


class ResourceError(RunError):
    """The disk or the memory is full."""

    exit_code = 7


EXIT_SIGTERM = 143
