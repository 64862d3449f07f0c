"""The examples of the operators in README run as they stand, on smaller tensors."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
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
