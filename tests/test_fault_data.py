"""Corpora that can't be used and preparations that are cut short, seen from the command line."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fault_runs import Template, check_equal, leftovers, lines
from small_run import WORDS, write_corpus

pytestmark = pytest.mark.faults


def parquet(column: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: ["a text", "another"] * 500}), sink)
    return sink.getvalue().to_pybytes()


BROKEN = {
    "an empty folder": ("text", {}, "expected files, found none"),
    "empty files": ("text", {"a": b"", "b": b" \n"}, "expected at least 2 different documents"),
    "a single document": ("text", {"a": b"text"}, "expected at least 2 different documents"),
    "text that is not UTF-8": ("text", {"a": b"good\n", "b": b"one\ntwo \xff\n"}, "b, line 2: expected UTF-8"),
    "half a line of jsonl": ("jsonl", {"a.jsonl": b'{"text": "one"}\n{"text": "tw'}, "a.jsonl, line 2"),
    "jsonl without the key": ("jsonl", {"a.jsonl": b'{"texts": "one"}\n'}, "expected the key 'text'"),
    "half a parquet file": ("parquet", {"a.parquet": parquet("text")[:-50]}, "a.parquet, after row 0"),
    "parquet without the column": ("parquet", {"a.parquet": parquet("body")}, "expected the column 'text'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_corpus_that_can_not_be_used(
    template: Template, fault_arguments: list[str], tmp_path: Path, name: str
) -> None:
    kind, files, message = BROKEN[name]
    corpus, cache, out = tmp_path / "corpus", tmp_path / "cache", tmp_path / "run"
    corpus.mkdir()
    for file, content in files.items():
        (corpus / file).write_bytes(content)
    options = [f"--data.corpus={kind}", f"--data.paths={json.dumps([str(corpus)])}", f"--data.cache_dir={cache}"]
    workers = template.start([*fault_arguments, *options, f"--out={out}"], tmp_path / "log")
    assert workers.wait() == [3], workers.said()
    assert "Traceback" not in workers.said()
    (error,) = (line for line in workers.said().splitlines() if line.startswith("error: "))
    assert str(corpus) in error
    assert message in error
    assert not out.exists()
    assert not cache.exists() or leftovers(cache) == set()


@pytest.fixture
def argv(fault_arguments: list[str], tmp_path: Path) -> list[str]:
    """The command line of a run whose tokens and tokenizer are not there yet, nor its folder."""
    return [*fault_arguments, f"--data.cache_dir={tmp_path / 'cache'}"]


def kill_while_building(template: Template, argv: list[str], folder: Path, station: str, delay: float) -> None:
    """Kill a run while it builds in a folder of the cache; where that was built too soon, try again."""
    for _ in range(20):
        workers = template.start([*argv, f"--out={folder / 'run'}"], folder / "killed.log")
        workers.wait_for(lambda: list(folder.glob(f"cache/{station}/.*.building")))
        time.sleep(delay)
        workers.kill()
        if list(folder.glob(f"cache/{station}/.*.building")):
            return
        shutil.rmtree(folder / "cache" / station)
    raise AssertionError(f"20 kills while {station} are built came too late")


def test_killed_preparations(
    template: Template, argv: list[str], tmp_path: Path, fault_generator: random.Random, long_form: bool
) -> None:
    """Killed while the tokenizer is trained and while tokens are packed, again and again, on one cache."""
    write_corpus(tmp_path / "corpus.jsonl", 6_000)
    argv = [*argv, f"--data.paths={json.dumps([str(tmp_path / 'corpus.jsonl')])}"]
    for station, seconds in (("tokenizers", 0.15), ("tokens", 0.1)):  # less than each takes
        for _ in range(10 if long_form else 2):
            kill_while_building(template, argv, tmp_path, station, fault_generator.uniform(0, seconds))
    runs = {"run": argv, "fresh": [*argv, f"--data.cache_dir={tmp_path / 'other'}"]}
    for name, command in runs.items():
        workers = template.start([*command, f"--out={tmp_path / name}"], tmp_path / f"{name}.log")
        assert workers.wait() == [0], workers.said()
    assert leftovers(tmp_path / "cache") == set()
    check_equal(tmp_path / "run", tmp_path / "fresh")


def test_two_runs_that_prepare_at_once(template: Template, argv: list[str], tmp_path: Path, long_form: bool) -> None:
    for turn in range(10 if long_form else 1):
        cache = tmp_path / f"cache{turn}"
        outs = [tmp_path / f"{turn}.{index}" for index in range(2)]
        runs = [
            template.start([*argv, f"--data.cache_dir={cache}", f"--out={out}"], out.with_suffix(f".log{out.suffix}"))
            for out in outs
        ]
        for run in runs:
            assert run.wait() == [0], run.said()
        said = [line for run in runs for line in run.said().splitlines()]
        assert said.count("training the tokenizer …") == 1
        assert sum(line.startswith("packing tokens: 0.00B") for line in said) == 1
        check_equal(*outs)
        for kind in ("tokens", "tokenizers"):
            assert sum(path.is_dir() for path in (cache / kind).iterdir()) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_fewer_documents_and_rows_than_processes(
    template: Template, fault_arguments: list[str], tmp_path: Path, ranks: int
) -> None:
    """One document and one row a side; every batch is that row again and again."""
    paths = []
    for name in ("train", "validation"):
        path = tmp_path / f"{name}.txt"
        path.write_text(f"{name} {' '.join(random.Random(0).choices(WORDS, k=65))}")
        paths.append(json.dumps([str(path)]))
    options = ["--data.corpus=text", f"--data.paths={paths[0]}", f"--data.validation_paths={paths[1]}"]
    options += [f"--data.cache_dir={tmp_path / 'cache'}", "--tokenizer.vocab_size=300", "--training.micro_batch_size=2"]
    out = tmp_path / "run"
    workers = template.start([*fault_arguments, *options, f"--out={out}"], tmp_path / "log", ranks=ranks)
    assert workers.wait() == [0] * ranks, workers.said()
    (meta,) = (json.loads(path.read_text()) for path in tmp_path.glob("cache/tokens/*/meta.json"))
    for side in ("train", "validation"):
        assert meta[side]["documents"] == 1
        assert 64 < meta[side]["tokens"] <= 128
    losses = [record["loss"] for record in lines(out / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
