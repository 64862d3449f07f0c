"""wandb and TensorBoard beside `metrics.jsonl`: never a prompt, never in the way, no secrets in what they store."""

import html
import importlib.util
import netrc
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from training.config import TrackingConfig
from training.errors import ConfigError
from training.redaction import redact, redact_arguments
from training.storage import disk_errors

_WANDB_SECONDS = 30.0
_WANDB_OVERHEAD_SECONDS = 10.0  # wandb 0.31 waits this much longer than its init_timeout


def check_trackers(config: TrackingConfig) -> None:
    """Check, without writing anything, that the trackers asked for can be opened.

    Raises:
        ConfigError: one is not installed, or wandb is to be online without an API key.
    """
    for key, value, package in (
        ("wandb", config.wandb, "wandb"),
        ("tensorboard", config.tensorboard, "tensorboard"),
    ):
        if value not in ("off", False) and not _is_installed(package):
            raise ConfigError(
                f"tracking.{key} is {value!r}, but {package} is not installed: pip install -e '.[{package}]'"
            )
    if config.wandb == "online" and not _has_wandb_key():
        raise ConfigError(
            "tracking.wandb is 'online', but there is no API key: expected the variable WANDB_API_KEY or a netrc "
            "entry (`wandb login`); 'auto' and 'offline' do without"
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a plain folder `wandb/` of old runs has no origin


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and host in netrc.netrc(os.path.expanduser(path)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class Trackers:
    """The open trackers of a run, possibly none; made by `open_trackers`."""

    def __init__(self, wandb_run: Any = None, tensorboard: Any = None) -> None:
        self._wandb = wandb_run
        self._tensorboard = tensorboard

    @property
    def run_id(self) -> str | None:
        """The wandb run's id, for the checkpoint; None without wandb."""
        return self._wandb.id if self._wandb else None

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log numbers of a step; None is left out."""
        numbers = {name: value for name, value in values.items() if value is not None}
        if self._wandb:
            self._wandb.log({"step": step, **numbers})
        if self._tensorboard:
            with disk_errors(Path(self._tensorboard.log_dir)):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Log a text, white space kept."""
        page = f"<pre>{html.escape(redact(text))}</pre>"
        if self._wandb:
            import wandb

            self._wandb.log({"step": step, name: wandb.Html(page)})
        if self._tensorboard:
            with disk_errors(Path(self._tensorboard.log_dir)):
                self._tensorboard.add_text(name, page, step)

    def close(self, exit_code: int = 0) -> None:
        """Write what is pending, within the time limit of wandb's upload; a run that failed is marked so."""
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)
        if self._tensorboard:
            with disk_errors(Path(self._tensorboard.log_dir)):
                self._tensorboard.close()


def open_trackers(
    config: TrackingConfig,
    out: Path,
    config_dict: Mapping[str, Any],
    run_id: str | None,
    resume_step: int = 0,
) -> Trackers:
    """Open the trackers asked for; for the main process alone.

    Args:
        config: which ones.
        out: the run's folder; they write into `wandb/` and `tensorboard/` there.
        config_dict: the run's configuration, stored without its secrets.
        run_id: `Trackers.run_id` of the run that is continued, or None.
        resume_step: steps done by the checkpoint that is continued; TensorBoard hides later ones.

    Raises:
        ConfigError: as `check_trackers`.
        ResourceError: the disk is full, which also the methods of `Trackers` raise.
    """
    check_trackers(config)
    wandb_run = tensorboard = None
    if config.wandb != "off":
        wandb_run = _open_wandb(config, out, config_dict, run_id)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        folder = out / "tensorboard"
        with disk_errors(folder):
            tensorboard = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
    return Trackers(wandb_run, tensorboard)


def _open_wandb(config: TrackingConfig, out: Path, config_dict: Mapping[str, Any], run_id: str | None) -> Any:
    # wandb reports on itself as the process ends, offline runs included, and waits 10 s for a silent network;
    # there is no setting against it, only this variable.
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    out.mkdir(parents=True, exist_ok=True)  # else wandb moves to the system's temporary folder
    options: dict[str, Any] = {
        "project": redact(config.wandb_project),
        "group": redact(config.wandb_group),
        "dir": str(out),
        "id": run_id or secrets.token_hex(4),
        "config": redact(config_dict),
        "settings": wandb.Settings(
            init_timeout=_WANDB_SECONDS - _WANDB_OVERHEAD_SECONDS,
            finish_timeout=_WANDB_SECONDS,
            console="off",
            disable_git=True,  # a diff of the working tree can hold anything
        ),
    }
    run = None
    with _redacted_argv():
        if config.wandb == "online" or (config.wandb == "auto" and _has_wandb_key()):
            try:
                run = wandb.init(mode="online", resume="allow", **options)
            except wandb.Error as error:
                print(
                    f"wandb: could not start online, this run is logged offline under {out / 'wandb'} "
                    f"(`wandb sync` uploads it): {redact(str(error))}",
                    file=sys.stderr,
                )
                wandb.teardown()  # the failed start still holds the run's id
        run = run or wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="step")  # its own counter would drop what a resumed run logs again
    return run


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """Hide secrets of the command line while wandb copies it."""
    original = sys.argv
    sys.argv = redact_arguments(original)
    try:
        yield
    finally:
        sys.argv = original
