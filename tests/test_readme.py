"""What the documents say: the examples of the operators run as they stand, on smaller tensors; promises have tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = [source for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from ops import" in source]
SMALLER = {"16, 12, 1024, 64": "2, 3, 128, 16", "1, 1, 1024, 1024": "1, 1, 128, 128", "2, 8, 4096, 64": "1, 8, 128, 16"}


@pytest.mark.parametrize("source", EXAMPLES, ids=["masked", "lightning"])
def test_an_example(source: str) -> None:
    for size, smaller in SMALLER.items():
        source = source.replace(size, smaller)
    assert "1024" not in source
    assert "4096" not in source
    names: dict[str, object] = {}
    exec(source, names)
    assert all(names[x].grad is not None for x in "QKV" if x in names)  # type: ignore[attr-defined]


def test_every_promise_of_security_names_tests_that_exist():
    promised = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    files = ("test_hostile.py", "test_hostile_text.py", "test_secrets.py")
    defined = re.findall(
        r"^def (test_\w+)", "".join((ROOT / "tests" / name).read_text() for name in files), re.MULTILINE
    )
    assert len(promised) > 15
    assert set(promised) <= set(defined)
