"""Documents of a corpus, in an order that never changes, each on its side: training or validation."""

import hashlib
import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

from training.config import DataConfig
from training.errors import ConfigError, DataError
from training.jsonfile import parse_json
from training.progress import working

Split = Literal["train", "validation"]
Skipped = Counter[str]


@dataclass(frozen=True)
class Source:
    """Texts that can be read again and again: what they are, their size in bytes if known, how to read them."""

    identity: str
    num_bytes: int | None
    texts: Callable[[Skipped], Iterator[str]]


@dataclass(frozen=True)
class Corpus:
    """The documents of a configuration.

    Attributes:
        name: what messages call it.
        identity: sha256 over the kind, the options and the content; another one means other documents.
        num_bytes: size of the text, None where only reading it would tell.
        streamed: reading all of it may be too much.
        train: texts for training, and for validation where that has no source of its own.
        validation: texts for validation, None where a share of the documents is held out.
        share: that share.
    """

    name: str
    identity: str
    num_bytes: int | None
    streamed: bool
    train: Source
    validation: Source | None
    share: float

    def documents(self, skipped: Skipped) -> Iterator[tuple[Split, str]]:
        """Yield (side, text) of every document that isn't empty, and count in `skipped` those left out.

        A document is on one side only: copies of a validation document are left out of training, or held out
        with it.

        Raises:
            DataError: a file can't be read as what it should be, or a side has no document.
        """
        train = _not_empty(self.train.texts(skipped), skipped)
        if self.validation is None:
            yield from self._hold_out(train)
        else:
            validation = _not_empty(self.validation.texts(skipped), skipped)
            yield from self._keep_apart(train, validation, skipped)

    def _hold_out(self, texts: Iterable[str]) -> Iterator[tuple[Split, str]]:
        """Hold a document out by the hash of its content; the first is for training, the next one held out.

        These two give both sides a document in a single pass, streams included.
        """
        pinned: dict[int, Split] = {}
        for text in texts:
            key = _content_hash(text)
            if len(pinned) < 2 and key not in pinned:
                pinned[key] = "validation" if pinned else "train"
            yield pinned.get(key) or ("validation" if key < self.share * 2**64 else "train"), text
        if len(pinned) < 2:
            raise DataError(
                f"{self.name}: expected at least 2 different documents, to hold one out for validation, "
                f"got {len(pinned)}; name validation documents by data.validation_paths or data.validation_split"
            )

    def _keep_apart(
        self, train: Iterable[str], validation: Iterable[str], skipped: Skipped
    ) -> Iterator[tuple[Split, str]]:
        held_out = set()
        for text in validation:
            held_out.add(_content_hash(text))
            yield "validation", text
        num_train = 0
        for text in train:
            if _content_hash(text) in held_out:
                skipped["also in validation"] += 1
                continue
            num_train += 1
            yield "train", text
        if not (held_out and num_train):
            raise DataError(
                f"{self.name}: expected documents on both sides, got {num_train} for training and "
                f"{len(held_out)} for validation (left out: {dict(skipped) or 'none'})"
            )


def documents(config: DataConfig, split: Split) -> Iterator[str]:
    """Yield the text of each document on one side of the corpus of `config`."""
    corpus, skipped = open_corpus(config), Skipped()
    if split == "validation" and corpus.validation is not None:
        return _not_empty(corpus.validation.texts(skipped), skipped)
    return (text for side, text in corpus.documents(skipped) if side == split)


def all_documents(config: DataConfig) -> Iterator[str]:
    """Yield the text of each document that `data.paths` or `data.split` names, nothing held out."""
    skipped = Skipped()
    return _not_empty(open_corpus(config).train.texts(skipped), skipped)


def open_corpus(config: DataConfig) -> Corpus:
    """Find the documents of `config` and take the hash of their content, or ask the hub for their revision.

    Raises:
        ConfigError: an option is missing or does not fit the kind of corpus.
        DataError: a path, a dataset or the hub can't be reached.
    """
    check_options(config)
    validation: Source | None = None
    if config.corpus == "hub":
        name = f"dataset {config.dataset}"
        version = _hub_version(config)
        train = _hub_source(config, version, config.split)
        if config.validation_split is not None:
            validation = _hub_source(config, version, config.validation_split)
    elif config.corpus == "recall":
        raise ConfigError("data.corpus: expected one of documents, got recall, whose rows are generated without text")
    elif config.corpus == "python-stdlib":
        name = "corpus python-stdlib"
        root = Path(sysconfig.get_paths()["stdlib"])
        train = _file_source(_python_files(root), _read_python, config)
    else:
        name = f"corpus {', '.join(config.paths)}"
        read = _READERS[config.corpus]
        train = _file_source(_find_files(config.paths, config.corpus), read, config)
        if config.validation_paths:
            validation = _file_source(_find_files(config.validation_paths, config.corpus), read, config)
    share = None if validation else config.validation_share
    parts = [config.corpus, train.identity, validation and validation.identity, share]
    sizes = [source.num_bytes for source in (train, validation) if source]
    return Corpus(
        name=name,
        identity=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        num_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        streamed=config.corpus == "hub" and config.streaming,
        train=train,
        validation=validation,
        share=config.validation_share,
    )


_LOCAL = ("text", "jsonl", "parquet")
_CORPORA_OF = {"paths": _LOCAL, "validation_paths": _LOCAL, "dataset": ("hub",), "validation_split": ("hub",)}


def check_options(config: DataConfig) -> None:
    """Refuse options that do not fit the kind of corpus with a ConfigError."""
    for key, corpora in _CORPORA_OF.items():
        if getattr(config, key) and config.corpus not in corpora:
            raise ConfigError(f"data.{key}: expected data.corpus {' or '.join(corpora)}, got {config.corpus}")
    if config.corpus == "hub":
        if not config.dataset:
            raise ConfigError("data.dataset: expected the name of a dataset for data.corpus hub, got none")
        if config.streaming and config.token_budget is None:
            raise ConfigError("data.token_budget: expected a number of tokens for data.streaming true, got null")
    elif config.corpus in _LOCAL and not config.paths:
        raise ConfigError(f"data.paths: expected files or folders for data.corpus {config.corpus}, got none")


def _content_hash(text: str) -> int:
    """Return 64 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _not_empty(texts: Iterable[str], skipped: Skipped) -> Iterator[str]:
    for text in texts:
        if text.strip():
            yield text
        else:
            skipped["empty"] += 1


def _checked_text(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in {column!r}, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: expected text in {column!r}, got half a surrogate pair ({error})") from error
    return value


def _file_source(files: list[Path], read: Callable[[Path, str, Skipped], Iterator[str]], config: DataConfig) -> Source:
    try:
        with working(f"reading {len(files)} files of the corpus"):
            identity = _files_identity(files)
        num_bytes = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise DataError(str(error)) from error
    holds_records = config.corpus in ("jsonl", "parquet")
    return Source(
        identity=f"{identity} {config.text_column}" if holds_records else identity,
        num_bytes=None if holds_records else num_bytes,
        texts=lambda skipped: (text for path in files for text in read(path, config.text_column, skipped)),
    )


def _files_identity(files: list[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _python_files(root: Path) -> list[Path]:
    """Return the sources below `root` that came with Python: no installed package, no virtual environment."""
    found = []
    for folder, folders, files in os.walk(root):
        foreign = {"site-packages", "dist-packages", "__pycache__"}
        folders[:] = [name for name in folders if name not in foreign and not Path(folder, name, "pyvenv.cfg").exists()]
        found += [path for name in files if (path := Path(folder, name)).suffix == ".py" and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _find_files(patterns: list[str], kind: str) -> list[Path]:
    """Return the files that paths, globs and folders name, each once, sorted within each pattern."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        named = [pattern] if Path(pattern).exists() else glob(pattern, recursive=True)
        files = sorted(file for name in named for file in _files_of(Path(name), kind))
        if not files:
            expected = "a file, folder or glob" if not named else "files" if kind == "text" else f"*.{kind} files"
            raise DataError(f"{pattern}: expected {expected}, found none")
        found.update(dict.fromkeys(files))
    return list(found)


def _files_of(path: Path, kind: str) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in path.rglob("*" if kind == "text" else f"*.{kind}"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden:
            yield file


def _read_python(path: Path, column: str, skipped: Skipped) -> Iterator[str]:
    """Yield a source, decoded as it declares (PEP 263); tests of Python hold some that are broken on purpose."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode()
    except (SyntaxError, UnicodeError):
        skipped["undecodable"] += 1
    else:
        yield text


def _read_text(path: Path, column: str, skipped: Skipped) -> Iterator[str]:
    data = path.read_bytes()
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: expected UTF-8, got byte 0x{data[error.start]:02x}") from error


def _read_jsonl(path: Path, column: str, skipped: Skipped) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise DataError(f"{place}: expected a JSON object in UTF-8, got {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{place}: expected a JSON object, got {type(record).__name__}")
            if column not in record:
                raise DataError(f"{place}: expected the key {column!r} (data.text_column), got {sorted(record)}")
            yield _checked_text(record[column], place, column)


def _read_parquet(path: Path, column: str, skipped: Skipped) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path}: expected the column {column!r} (data.text_column), got {names}")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _checked_text(value, f"{path}, row {row}", column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {row}: expected a parquet file, got {error}") from error


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}


@dataclass(frozen=True)
class _Version:
    """A state of a hub dataset: the identity of its content, and the revision to ask for."""

    identity: str
    revision: str | None


def _hub_version(config: DataConfig) -> _Version:
    """Return the commit of the dataset on the hub, or the hash of the files of a local dataset folder.

    One request with a time limit, before the library begins to retry: a missing hub is known in seconds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    dataset = str(config.dataset)
    if Path(dataset).is_dir():
        files = sorted(path for path in Path(dataset).rglob("*") if path.is_file())
        return _Version(_files_identity(files), None)
    try:
        with working(f"asking the Hugging Face hub for dataset {dataset}"):
            commit = HfApi().dataset_info(dataset, revision=config.revision, timeout=10).sha
    except OfflineModeIsEnabled:
        return _Version(_load_hub(config, config.revision, config.split)._fingerprint, config.revision)
    except HfHubHTTPError as error:
        raise DataError(f"dataset {dataset}: the Hugging Face hub answered {error}") from error
    except (HTTPError, OSError) as error:
        raise DataError(
            f"dataset {dataset}: the Hugging Face hub can't be reached ({error}); with HF_HUB_OFFLINE=1 a copy in "
            "the local cache is used"
        ) from error
    except ValueError as error:
        raise ConfigError(f"data.dataset: expected a name like owner/name, got {dataset!r} ({error})") from error
    return _Version(str(commit), commit)


def _hub_source(config: DataConfig, version: _Version, split: str) -> Source:
    parts = [config.dataset, config.subset, split, version.identity, config.text_column]
    return Source(
        identity=json.dumps(parts),
        num_bytes=None,
        texts=lambda skipped: _read_hub(config, version.revision, split),
    )


def _load_hub(config: DataConfig, revision: str | None, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    name = f"dataset {config.dataset}"
    try:
        with working(f"loading {name}, split {split}"):
            return load_dataset(
                str(config.dataset), config.subset, split=split, revision=revision, streaming=config.streaming
            )
    except ConnectionError as error:
        raise DataError(f"{name}: the Hugging Face hub can't be reached ({error})") from error
    except (DatasetsError, HTTPError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{name}, subset {config.subset}, split {split}: {error}") from error


def _read_hub(config: DataConfig, revision: str | None, split: str) -> Iterator[str]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    column, row = config.text_column, 0
    place = f"dataset {config.dataset}, split {split}"
    try:
        for batch in _load_hub(config, revision, split).iter(batch_size=256):
            if column not in batch:
                raise DataError(f"{place}: expected the column {column!r} (data.text_column), got {list(batch)}")
            for value in batch[column]:
                row += 1
                yield _checked_text(value, f"{place}, row {row}", column)
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(f"{place}, after row {row}: {error}") from error
