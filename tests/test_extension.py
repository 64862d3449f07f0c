"""Building the CUDA kernels: where the library lies, what its name depends on, what is said when it can't be."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from ops import extension, lightning_attention
from ops.extension import BuildError


def nvcc() -> str | None:
    try:
        return extension._nvcc()
    except BuildError:
        return None


NVCC = nvcc()
# How many of each kernel there are, of those that keep sums of products in registers.
MULTIPLYING = {
    "pass": 40,
    "prepare": 4,
    "wide_outputs": 4,
    "masked": 18,  # two widths, one problem or two, two types of masks, two types; float32 in two parts and in three
    "masked_scores": 6,  # two tiles, two types; float32 in two parts and in three
    "masked_products": 6,
    "mask_gradient": 4,
}
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, CUDA's compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "transnormer"


@needs_nvcc
def test_compiles_without_warnings_and_without_spills(tmp_path: Path) -> None:
    """Warnings are errors by the compiler's flags."""
    report = extension.compile_library(NVCC, tmp_path / "kernels.so").splitlines()
    passes = {
        line.split("for ")[-1]: int(re.search(r"(\d+) bytes spill stores", report[i + 1]).group(1))
        for i, line in enumerate(report)
        if "Function properties for" in line and re.search(rf"\d({'|'.join(MULTIPLYING)})_kernel", line)
    }
    assert len(passes) == sum(MULTIPLYING.values())
    assert set(passes.values()) == {0}
    assert [line for line in report if "(C75" in line] == []  # products that the compiler makes wait for each other


@needs_nvcc
def test_is_built_once_in_a_folder_of_the_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_library(nvcc: str, made: Path) -> str:
        calls.append(made)
        assert made.parent.parent == cache  # nothing under the final name before it is whole
        made.write_text("library")
        return "report"

    monkeypatch.setattr(extension, "compile_library", compile_library)
    path = extension.build()
    assert path == extension.build()
    assert path.read_text() == "library"
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(calls) == 1


@needs_nvcc
def test_a_failed_build_leaves_no_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "FLAGS", ("--no-such-flag",))
    with pytest.raises(BuildError, match=r"^nvcc failed with 1: .*no-such-flag"):
        extension.build()
    assert not list(cache.glob("*.so"))


@needs_nvcc
@pytest.mark.parametrize("changed", ["flags", "environment", "source", "header"])
def test_another_source_or_flag_is_another_library(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(extension.SOURCES, sources)
    monkeypatch.setattr(extension, "SOURCES", sources)
    before = extension._key(NVCC)
    if changed == "flags":
        monkeypatch.setattr(extension, "FLAGS", (*extension.FLAGS, "-g"))
    elif changed == "environment":
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DALL_LANES_ARRIVE")
    else:
        with (sources / ("step.cu" if changed == "source" else "decay.cuh")).open("a") as file:
            file.write("\n")
    assert extension._key(NVCC) != before


def test_a_folder_that_others_write_to_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True)
    os.chmod(cache, 0o777)
    with pytest.raises(BuildError, match=r"expected a folder of this user that nobody else can write to$"):
        extension._cache()


def fake_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvcc that knows its version; else it does what the script says."""
    folder.joinpath("bin").mkdir(parents=True)
    path = folder / "bin" / "nvcc"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("printf 'caf\\351' >&2; exit 3", "nvcc failed with 3: caf\ufffd"),
        ("exit 3", "nvcc failed with 3: .*/bin/nvcc said nothing"),
        ("exit 0", ".*/bin/nvcc ended well but wrote no library"),
        ("kill -9 $$", "nvcc failed with -9: .*/bin/nvcc said nothing"),
    ],
    ids=["not UTF-8", "silent", "nothing written", "killed"],
)
def test_what_a_failing_compiler_says(
    script: str, said: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path / "cuda", monkeypatch, script)
    (cache / "tmp_of_a_killed_build").mkdir(mode=0o700, parents=True)
    cache.chmod(0o700)
    with pytest.raises(BuildError, match=f"^{said}$"):
        extension.build()
    assert [x.name for x in cache.iterdir()] == ["lock"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert re.fullmatch(said, extension.unavailable_reason.__wrapped__())


def test_what_is_built_is_taken_from_a_folder_that_cannot_be_written_to(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path / "cuda", monkeypatch, "exit 3")
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(
        BuildError, match=r"transnormer: expected a folder to write to; XDG_CACHE_HOME chooses another$"
    ):
        extension.build()
    library = cache / f"kernels-{extension._key(extension._nvcc())}.so"
    library.touch()
    assert extension.build() == library
    assert [x.name for x in cache.iterdir()] == [library.name]


def test_a_cache_that_cannot_be_made_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"file/transnormer: can't be made \(Not a directory\); XDG_CACHE_HOME"):
        extension.build()


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(BuildError, match=r"^nvcc is not on the PATH"):
        extension.build()


def test_no_sources_is_a_reason(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "nowhere")
    monkeypatch.setattr(extension, "_nvcc", lambda: "nvcc")
    with pytest.raises(BuildError, match=r"nowhere: the kernels' sources are not there$"):
        extension.build()


def test_on_a_cpu_the_reason_is_the_cpu() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"^backend: 'cuda' can't take this call: q is on cpu"):
        lightning_attention(x, x, x, backend="cuda")
