"""YAML of configurations: plain keys and texts alone, of bounded size and depth."""

from pathlib import Path
from typing import Any

import yaml

LARGEST_CHARACTERS = 1_000_000
DEEPEST = 20


class _RefusedError(yaml.YAMLError):
    """Valid YAML that no configuration needs: the problem and its place."""

    def __init__(self, problem: str, place: Any) -> None:
        super().__init__(problem)
        self.line = place.line + 1


class StrictLoader(yaml.BaseLoader):
    """YAML with every scalar left as its text, so that the field's type decides, and no key given twice.

    Tags, anchors and aliases are errors: no key needs them, and a few aliases of aliases fill any memory.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        _refuse_event(event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _RefusedError(f"nested more than {DEEPEST} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError("expected a name as key", key.start_mark)
            if key.value in seen:
                raise _RefusedError(f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_event(event: yaml.Event) -> None:
    """Refuse a tag, an anchor or an alias."""
    for kind, sign in (("tag", ""), ("anchor", "*" if isinstance(event, yaml.AliasEvent) else "&")):
        if (name := getattr(event, kind, None)) is not None:
            problem = f"expected plain values, got {sign}{name}: no tags, anchors and aliases here"
            raise _RefusedError(problem, event.start_mark)


def read_yaml(file: Path) -> Any:
    """Read a file of nested mappings and lists of texts.

    Raises:
        ValueError: naming the line and what is wrong with it.
        OSError: the file can't be read.
    """
    with file.open(encoding="utf-8") as stream:  # may well be a pipe
        text = stream.read(LARGEST_CHARACTERS + 1)
    if len(text) > LARGEST_CHARACTERS:
        raise ValueError(f"{file}: expected at most {LARGEST_CHARACTERS:,} characters of YAML, got more")
    try:
        return yaml.load(text, StrictLoader)
    except _RefusedError as error:
        raise ValueError(f"{file}:{error.line}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None


def refuse_references(text: str) -> None:
    """Refuse a value in YAML whose aliases, or brackets in brackets, a parser would unfold.

    Raises:
        ValueError: saying which.
    """
    depth, anchors = 0, set()
    try:
        for event in yaml.parse(text, yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:
                raise ValueError(f"expected a plain value, got the alias *{event.anchor}")
            anchors.add(getattr(event, "anchor", None))
    except yaml.YAMLError:
        return  # most texts are no YAML; those that only begin as such are refused above or stay texts
