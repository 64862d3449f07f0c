"""Documents: where they come from, what is refused, and which side each is on."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from training.config import DataConfig
from training.corpus import _python_files, _read_python, all_documents, documents, open_corpus
from training.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_parquet(path: Path, texts: list) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return str(path)


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"document number {index}" for index in range(start, start + count)]


def sides(config: DataConfig) -> tuple[list[str], list[str], Counter]:
    skipped: Counter = Counter()
    pairs = list(open_corpus(config).documents(skipped))
    return (
        [text for side, text in pairs if side == "train"],
        [text for side, text in pairs if side == "validation"],
        skipped,
    )


def test_standard_library():
    train, validation, skipped = sides(DataConfig())
    assert Path(json.__file__).read_text() in train + validation
    assert len(validation) < 0.05 * len(train)
    assert not set(train) & set(validation)
    assert skipped["empty"] > 0
    assert open_corpus(DataConfig()).identity == open_corpus(DataConfig()).identity


def test_python_files_are_those_of_python_itself(tmp_path):
    names = ["b.py", "a.py", "test/bad.py", "venv/main.py", "site-packages/x.py", "__pycache__/y.py", "env/lib/z.py"]
    for name in [*names, "env/pyvenv.cfg", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x = 1\n")
    found = [path.relative_to(tmp_path).as_posix() for path in _python_files(tmp_path)]
    assert found == ["a.py", "b.py", "test/bad.py", "venv/main.py"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"), ["# -*- coding: latin-1 -*-\ns = 'é'\n"]),
        (b"# coding: nonsense\n", []),
        (b"s = '\xff'\n", []),
    ],
    ids=["declared", "unknown-coding", "not-utf8"],
)
def test_python_source_is_decoded_as_it_declares(tmp_path, source, expected):
    path, skipped = tmp_path / "a.py", Counter()
    path.write_bytes(source)
    assert list(_read_python(path, "", skipped)) == expected
    assert skipped["undecodable"] == 1 - len(expected)


def test_text_files_folders_and_globs(tmp_path):
    for name, data in {
        "b/2.txt": b"two\r\n",
        "b/1.md": b"one",
        "b/.hidden": b"no",
        "c.txt": b"sea",
        "d.txt": b" ",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / "c.txt"), str(tmp_path / "b"), str(tmp_path / "*.txt")]
    config = DataConfig(corpus="text", paths=paths)
    assert list(all_documents(config)) == ["sea", "one", "two\r\n"]
    assert sides(config)[2] == {"empty": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records(tmp_path, kind):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    write(tmp_path / f"a.{kind}", ["one\n1", "", "two"])
    write(tmp_path / f"b.{kind}", ["three"])
    config = DataConfig(corpus=kind, paths=[str(tmp_path)])
    assert list(all_documents(config)) == ["one\n1", "two", "three"]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", b"fine\nfine\nbad \xff\n", "line 3: expected UTF-8, got byte 0xff"),
        ("jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: expected a JSON object"),
        ("jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: expected a JSON object in UTF-8"),
        ("jsonl", b'{"text": "a"}\n["text"]\n', "line 2: expected a JSON object, got list"),
        ("jsonl", b'{"body": "a"}\n', r"line 1: expected the key 'text' \(data.text_column\), got \['body'\]"),
        ("jsonl", b'{"text": 3}\n', "line 1: expected text in 'text', got int"),
        ("jsonl", b'{"text": "\\ud800"}\n', "line 1: expected text in 'text', got half a surrogate pair"),
        ("parquet", b"not parquet at all", "expected a parquet file"),
    ],
)
def test_broken_files_stop_with_their_name_and_line(tmp_path, kind, content, message):
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(all_documents(DataConfig(corpus=kind, paths=[str(path)])))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_broken_parquet_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["one", None])
    with pytest.raises(DataError, match=r"a.parquet, row 2: expected text in 'text', got NoneType"):
        list(all_documents(DataConfig(corpus="parquet", paths=[path])))
    with pytest.raises(DataError, match=r"expected the column 'body' .* got \['text'\]"):
        list(all_documents(DataConfig(corpus="parquet", paths=[path], text_column="body")))


@pytest.mark.parametrize("name", ["missing.txt", "*.missing", "empty"])
def test_paths_that_name_nothing(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        open_corpus(DataConfig(corpus="text", paths=[str(tmp_path / name)]))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"corpus": "text"}, "data.paths"),
        ({"corpus": "hub"}, "data.dataset"),
        ({"corpus": "hub", "dataset": "a/b", "streaming": True}, "data.token_budget"),
        ({"paths": ["a.txt"]}, "data.paths: expected data.corpus text or jsonl or parquet, got python-stdlib"),
        ({"corpus": "text", "paths": ["."], "validation_split": "test"}, "data.validation_split"),
    ],
)
def test_impossible_options(options, key):
    with pytest.raises(ConfigError, match=key):
        open_corpus(DataConfig(**options))


def test_held_out_share(tmp_path):
    texts = numbered(2000)
    config = DataConfig(corpus="jsonl", paths=[write_jsonl(tmp_path / "a.jsonl", texts + texts)], validation_share=0.1)
    train, validation, _ = sides(config)
    assert sorted(train + validation) == sorted(texts + texts)
    assert not set(train) & set(validation)
    assert 300 < len(validation) < 500
    assert list(documents(config, "train")) == train
    assert list(documents(config, "validation")) == validation


def test_held_out_documents_stay_when_others_come(tmp_path):
    first = DataConfig(corpus="jsonl", paths=[write_jsonl(tmp_path / "a.jsonl", numbered(500))], validation_share=0.1)
    more = DataConfig(corpus="jsonl", paths=[write_jsonl(tmp_path / "b.jsonl", numbered(900))], validation_share=0.1)
    assert set(sides(first)[1]) <= set(sides(more)[1])


def test_each_side_gets_a_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["same", "same", "other"])
    train, validation, _ = sides(DataConfig(corpus="jsonl", paths=[path], validation_share=0.001))
    assert (train, validation) == (["same", "same"], ["other"])
    path = write_jsonl(tmp_path / "a.jsonl", ["same", "", "same"])
    with pytest.raises(DataError, match="at least 2 different documents, to hold one out for validation, got 1"):
        sides(DataConfig(corpus="jsonl", paths=[path]))


def test_validation_paths_never_overlap(tmp_path):
    config = DataConfig(
        corpus="jsonl",
        paths=[write_jsonl(tmp_path / "train.jsonl", numbered(10))],
        validation_paths=[write_jsonl(tmp_path / "validation.jsonl", numbered(5, start=7))],
    )
    train, validation, skipped = sides(config)
    assert train == numbered(7)
    assert validation == numbered(5, start=7)
    assert skipped == {"also in validation": 3}
    config.validation_paths = config.paths
    with pytest.raises(DataError, match="got 0 for training and 10 for validation"):
        sides(config)
    assert list(documents(config, "validation")) == numbered(10)


def test_identity_follows_content_and_options(tmp_path):
    def identity(name: str, texts: list[str], **options) -> str:
        return open_corpus(DataConfig(corpus="jsonl", paths=[write_jsonl(tmp_path / name, texts)], **options)).identity

    base = identity("a.jsonl", ["one", "two"])
    assert identity("renamed.jsonl", ["one", "two"]) == base
    assert identity("a.jsonl", ["one", "owt"]) != base
    assert identity("a.jsonl", ["one", "two"], validation_share=0.2) != base
    assert identity("a.jsonl", ["one", "two"], text_column="body") != base


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", numbered(600))
    write_jsonl(folder / "test.jsonl", numbered(3, start=599))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_hub_dataset(hub_folder, streaming):
    config = DataConfig(corpus="hub", dataset=hub_folder, streaming=streaming, token_budget=10**6)
    train, validation, _ = sides(config)
    assert sorted(train + validation) == sorted(numbered(600))
    assert 0 < len(validation) < 30
    config.validation_split = "test"
    train, validation, skipped = sides(config)
    assert (train, validation) == (numbered(599), numbered(3, start=599))
    assert skipped == {"also in validation": 1}
    config.text_column = "body"
    with pytest.raises(DataError, match=r"expected the column 'body' .* got \['text'\]"):
        sides(config)
    config.text_column, config.split = "text", "nowhere"
    with pytest.raises(DataError, match="nowhere"):
        sides(config)


OPEN_HUB = """
import sys
from training.config import DataConfig
from training.corpus import open_corpus
from training.errors import RunError
try:
    open_corpus(DataConfig(corpus="hub", dataset="someone/missing-dataset"))
except RunError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def open_hub(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", OPEN_HUB], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_unreachable_hub_is_said_plainly_and_soon(tmp_path):
    start = time.monotonic()
    done = open_hub(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert done.returncode == 3
    assert "dataset someone/missing-dataset: the Hugging Face hub can't be reached" in done.stdout
    assert time.monotonic() - start < 15


def test_offline_mode_without_a_copy(tmp_path):
    done = open_hub(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 3
    assert "dataset someone/missing-dataset: the Hugging Face hub can't be reached" in done.stdout


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


def test_unknown_dataset_is_named(tmp_path):
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = open_hub(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path))
        server.shutdown()
    assert done.returncode == 3
    assert "dataset someone/missing-dataset: the Hugging Face hub answered" in done.stdout
