"""Modules that `--import` names: where they are looked for, and what is refused."""

import sys
from pathlib import Path

import pytest

from training.errors import ConfigError
from training.imports import import_modules


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; the list of folders is as before when a test ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_working_folder_comes_first_while_modules_are_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder / "other"
    other.mkdir()
    monkeypatch.syspath_prepend(other)
    for place in (folder, other):
        (place / "a_module_of_mine.py").write_text("")
    (folder / "a_package_of_mine").mkdir()
    (folder / "a_package_of_mine" / "inner.py").write_text("")
    import_modules(["a_module_of_mine", "a_package_of_mine.inner"])
    assert sys.modules["a_module_of_mine"].__file__ == str(folder / "a_module_of_mine.py")
    assert "a_package_of_mine.inner" in sys.modules
    assert sys.path[0] == str(other)
    assert sys.path.count(str(folder)) == 1  # for what these import later


@pytest.mark.parametrize("name", ["", ".masks", "./masks", "masks.py", "a..b", "a b"])
def test_what_is_no_name_is_refused(name: str, folder: Path) -> None:
    (folder / "masks.py").write_text("raise RuntimeError")
    with pytest.raises(ConfigError, match=r"^--import: expected a module's name") as caught:
        import_modules([name])
    assert str(caught.value).endswith(f", got {name!r}")


@pytest.mark.parametrize("name", ["not_there", "not_there.inner", "json.not_there"])
def test_a_module_that_is_not_there_is_named(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        import_modules([name])
    assert str(caught.value) == f"--import: no module {name!r} in {folder} or on PYTHONPATH"


def test_what_a_module_raises_is_passed_on(folder: Path) -> None:
    (folder / "needs_another.py").write_text("import not_there")
    with pytest.raises(ModuleNotFoundError, match="'not_there'"):
        import_modules(["needs_another"])
