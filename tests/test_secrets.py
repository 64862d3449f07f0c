"""No file of a run holds a secret of the environment, the command line or the configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_cases import ROOT
from small_run import small_run

import train
from training.redaction import REDACTED, redact

ENVIRONMENT = {
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "HF_TOKEN": "hf_canaryofthehubcanaryofthehub",
    "MY_PASSWORD": "canary horse-battery",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+key/of0123",
    "serviceApiKey": "canary.mixed.case",
    "OTHER_CREDENTIALS": 'canary"quoted\\é',
}
GIVEN = {"key": "sk-canaryofanothervendor", "user": "canaryuser:canarypass"}


def spellings(secret: str) -> set[bytes]:
    """Return a secret as it may stand in a file: plain, in JSON, in HTML."""
    import html

    return {secret.encode(), json.dumps(secret)[1:-1].encode(), html.escape(secret).encode()}


def found_in(folder: Path, secrets: dict[str, str]) -> list[tuple[str, str]]:
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {path / "its name": str(path.relative_to(folder)).encode() for path in folder.rglob("*")}
    assert len(files) > 20
    return [
        (str(path.relative_to(folder)), name)
        for path, content in files.items()
        for name, secret in secrets.items()
        if any(spelling in content for spelling in spellings(secret))
    ]


def test_canaries_of_a_run_are_in_none_of_its_files(tmp_path: Path) -> None:
    corpus = tmp_path / ENVIRONMENT["MY_PASSWORD"]
    corpus.mkdir()
    (tmp_path / "net").write_text("")
    out = tmp_path / "run"
    arguments = [
        *small_run(corpus, steps=2),
        f"--out={out}",
        "--tracking.wandb=offline",
        "--tracking.tensorboard=true",
        f"--tracking.wandb_project=of-{ENVIRONMENT['serviceApiKey']}",
        f"--tracking.wandb_group=of-{ENVIRONMENT['serviceApiKey']}",
        "--training.sample_prompt",
        f"{ENVIRONMENT['OTHER_CREDENTIALS']} {ENVIRONMENT['WANDB_API_KEY']} {GIVEN['key']}",
        "--data.revision",
        f"https://{GIVEN['user']}@host/{ENVIRONMENT['HF_TOKEN']}",
        f"--data.split={ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}",
        "--training.eval_every=1",
    ]
    environment = {**os.environ, **ENVIRONMENT, "HOME": str(tmp_path), "NETRC": str(tmp_path / "net")}
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    secrets = ENVIRONMENT | GIVEN
    assert found_in(out, secrets) == []
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert list((out / "tensorboard").iterdir())
    assert REDACTED in (out / "config.yaml").read_text()
    assert REDACTED in (out / "evaluations.jsonl").read_text()
    assert REDACTED in next(out.glob("checkpoints/*/model/README.md")).read_text()
    (out / "planted").write_text("canary.mixed.case")
    assert found_in(out, secrets) == [("planted", "serviceApiKey")]


def test_the_reason_of_an_end_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "canary horse-battery")

    def fail(run: object, ending: train.Ending) -> None:
        ending.out = tmp_path
        raise RuntimeError(f"could not reach canary horse-battery at https://{GIVEN['user']}@host")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RuntimeError):
        train.main([])
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["reason"] == f"RuntimeError: could not reach {REDACTED} at https://{REDACTED}@host"


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("MY_PASSWORD", "12345678", True),
        ("MY_PASSWORD", "1234567", False),  # too short: it may be a word of any text
        ("HF_TOKEN", "abcdefgh", True),
        ("TOKENIZERS_PARALLELISM", "abcdefgh", False),
        ("EDITOR", "abcdefgh", False),
    ],
)
def test_values_of_telling_variables_are_redacted(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hidden: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert redact({"path": [f"/data/{value}/x"]}) == {"path": [f"/data/{REDACTED if hidden else value}/x"]}


def test_the_longer_of_two_secrets_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_PASSWORD", "canary-one")
    monkeypatch.setenv("B_PASSWORD", "canary-one-and-more")
    assert redact("canary-one-and-more canary-one") == f"{REDACTED} {REDACTED}"
