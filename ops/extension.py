"""Builds the CUDA kernels of `csrc/` on their first use and loads them; `python -m ops.extension` builds them."""

import argparse
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent.parent / "csrc"
ARCHITECTURE = "90a"  # Hopper with its own instructions
FLAGS = (
    "-std=c++17",
    "-O3",
    f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}",
    "-Werror=all-warnings",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # PyTorch's stable ABI as of 2.10
    "-lineinfo",
    "--threads=0",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-Wall,-Wno-unknown-pragmas",
)


class BuildError(RuntimeError):
    """The kernels can't be built here; the message says why."""


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels can't be built or loaded here, or None once they are loaded."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        path = build()
        # The library refers to symbols that `import torch` loads privately; this makes them visible.
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except (RuntimeError, OSError) as error:  # `BuildError`, and what loading the library raises
        return str(error)
    return None


def build() -> Path:
    """Path of the shared library, built with one call of nvcc if these sources and flags have not been before.

    It lies in a folder of the user's cache that nobody else can write to. It is written under another name and
    renamed, so that it is whole whenever it exists; processes that start together wait for the first one.

    Raises:
        BuildError: no nvcc, no sources, no folder to write to, or a compiler error, with the compiler's own words.
    """
    folder, nvcc = _cache(), _nvcc()
    library = folder / f"kernels-{_key(nvcc)}.so"
    if library.exists():
        return library
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder}: expected a folder to write to; XDG_CACHE_HOME chooses another")
    with FileLock(folder / "lock"):
        if library.exists():
            return library
        for left in folder.glob("tmp*"):  # by builds that were killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / library.name
            report = compile_library(nvcc, made)
            (folder / f"{library.stem}.txt").write_text(report)
            os.replace(made, library)
    return library


def compile_library(nvcc: str, made: Path) -> str:
    """Compile every source into the library `made`; returns the compiler's report on registers and spills."""
    include = Path(torch.__file__).parent / "include"
    sources = sorted(str(x) for x in SOURCES.iterdir() if x.suffix in (".cu", ".cpp"))
    command = [nvcc, *FLAGS, f"-I{include}", "--shared", "-o", str(made), *sources]
    report = _said(command)
    if not made.exists():
        raise BuildError(f"{nvcc} ended well but wrote no library")
    return report


def _said(command: list[str]) -> str:
    """All that nvcc writes; a `BuildError` if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        said = (result.stderr or result.stdout).strip()[-2000:]
        raise BuildError(f"nvcc failed with {result.returncode}: {said or f'{command[0]} said nothing'}")
    return result.stderr + result.stdout


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for folder in (f"{home}/bin" if home else "", None, "/usr/local/cuda/bin"):  # None: the PATH
        if folder != "" and (found := shutil.which("nvcc", path=folder)):
            return found
    raise BuildError(f"nvcc is not on the PATH, nor under CUDA_HOME ({home or 'not set'}) or /usr/local/cuda")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "transnormer"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder}: can't be made ({error.strerror}); XDG_CACHE_HOME chooses another place") from error
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{folder}: expected a folder of this user that nobody else can write to")
    return folder


def _key(nvcc: str) -> str:
    """Digest of whatever the library depends on."""
    if not SOURCES.is_dir():
        raise BuildError(f"{SOURCES}: the kernels' sources are not there")
    version = _said([nvcc, "--version"])
    more = (os.environ.get(f"NVCC_{x}", "") for x in ("PREPEND_FLAGS", "APPEND_FLAGS", "CCBIN"))  # nvcc reads them
    digest = hashlib.sha256("\n".join((*FLAGS, *more, version)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    argparse.ArgumentParser(prog="python -m ops.extension", description=__doc__).parse_args()
    try:
        print(build())
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
