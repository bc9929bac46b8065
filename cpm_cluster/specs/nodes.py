"""YAML as a tree that remembers, for every value, where it was written and by whom.

Scalars stay text here: `24:00:00`, `1e-4` and `512G` mean what the key says they mean, not what YAML 1.1
would make of them (86400, a string, a string).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from cpm_cluster.specs.problems import Location, Problem, quoted

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000  # aliases count each time they are used: ten lines of YAML can stand for 10^9 values
MAX_DEPTH = 30

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class ScalarNode:
    """One value as written. `plain` is false for quoted text, which is never a null, a number or a boolean."""

    text: str
    plain: bool
    where: Location
    set_by: str

    @property
    def is_null(self) -> bool:
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class ListNode:
    items: tuple[Node, ...]
    where: Location
    set_by: str


@dataclass(frozen=True)
class MapNode:
    entries: dict[str, Node]
    where: Location
    set_by: str
    key_where: dict[str, Location]


Node = ScalarNode | ListNode | MapNode


def kind(node: Node) -> str:
    """What people call it: `a list`, `a mapping`, or the quoted text."""
    if isinstance(node, ListNode):
        return "a list"
    if isinstance(node, MapNode):
        return "a mapping"
    return "nothing" if node.is_null else quoted(node.text)


def read_yaml(path: Path, set_by: str, problems: list[Problem], shown_as: str | None = None) -> MapNode | None:
    """The mapping in a YAML file; None, with problems added, where there is none.

    `set_by` says in whose name the values speak (job, profile, cluster …); `shown_as` is the path for messages.
    """
    name = shown_as or str(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem(Location(name), "", f"cannot be read: {reason}"))
        return None
    if len(data) > MAX_FILE_BYTES:
        problems.append(Problem(Location(name), "", "is larger than 1 MiB; that is not a file of this kind"))
        return None
    return parse_yaml(data, name, set_by, problems)


def parse_yaml(data: bytes, name: str, set_by: str, problems: list[Problem]) -> MapNode | None:
    """As `read_yaml`, from bytes."""
    node = parse_value(data, name, set_by, problems)
    if node is None or isinstance(node, MapNode):
        return node
    if isinstance(node, ScalarNode) and node.is_null:
        problems.append(Problem(Location(name), "", "is empty; write `key: value` lines"))
        return None
    problems.append(Problem(node.where, "", f"is {kind(node)}; write `key: value` lines"))
    return None


def parse_value(data: bytes, name: str, set_by: str, problems: list[Problem]) -> Node | None:
    """Any YAML value, with positions; None, with a problem added, where the text is not YAML."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.append(Problem(Location(name, line, 1), "", "is not UTF-8 text; save the file as UTF-8"))
        return None
    try:
        if _too_deep(text):
            raise RecursionError(f"it is nested deeper than {MAX_DEPTH} levels")
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Location(name, mark.line + 1, mark.column + 1) if mark else Location(name)
        problems.append(Problem(where, "", f"is not valid YAML: {_yaml_reason(error)}"))
        return None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(Problem(Location(name), "", f"is not valid YAML: {' '.join(str(error).split())}"))
        return None
    if root is None:
        return ScalarNode("", True, Location(name, 1, 1), set_by)
    return _Reader(name, set_by, problems).node(root)


def _too_deep(text: str) -> bool:
    """Whether nesting would overflow the C stack of libyaml's composer, which does not guard itself.

    Every level needs one of five characters, so that an ordinary file is cleared by counting them.
    """
    if sum(map(text.count, "[{-?:")) < 1000:
        return False
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return True
    return False


def _yaml_reason(error: yaml.MarkedYAMLError) -> str:
    reason = " ".join(filter(None, (error.context, error.problem)))
    if "found character that cannot start any token" in reason:
        return reason + " (a tab, perhaps: indent with spaces)"
    return reason


class _TooLarge(Exception):
    pass


class _Reader:
    """Turns PyYAML's node graph into our tree, counting what aliases expand to."""

    def __init__(self, name: str, set_by: str, problems: list[Problem]) -> None:
        self.name, self.set_by, self.problems, self.count = name, set_by, problems, 0

    def node(self, root: yaml.Node) -> Node | None:
        try:
            return self._node(root, 0)
        except _TooLarge as error:
            self.problems.append(Problem(Location(self.name, 1, 1), "", str(error)))
            return None

    def _node(self, node: yaml.Node, depth: int) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooLarge(f"stands for more than {MAX_NODES:,} values; aliases (&a, *a) may not multiply like that")
        if depth > MAX_DEPTH:
            raise _TooLarge(f"is nested deeper than {MAX_DEPTH} levels, or an alias contains itself")
        where = self._where(node)
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in _KNOWN_TAGS:
                self.problems.append(Problem(where, "", f"YAML tag {quoted(node.tag)} is not allowed here"))
            return ScalarNode(node.value, not node.style, where, self.set_by)  # None, or '' from libyaml: plain
        if isinstance(node, yaml.SequenceNode):
            return ListNode(tuple(self._node(child, depth + 1) for child in node.value), where, self.set_by)
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, where, depth)

    def _mapping(self, node: yaml.MappingNode, where: Location, depth: int) -> MapNode:
        entries: dict[str, Node] = {}
        key_where: dict[str, Location] = {}
        for key_node, value_node in node.value:
            place = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(place, "", "a key must be a word, not a list or a mapping"))
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                self.problems.append(Problem(place, "<<", "merge keys are not supported; use a profile or --set"))
                continue
            if key in entries:
                self.problems.append(
                    Problem(place, key, f"is written twice (first in line {key_where[key].line}); keep one")
                )
                continue
            entries[key] = self._node(value_node, depth + 1)
            key_where[key] = place
        return MapNode(entries, where, self.set_by, key_where)

    def _where(self, node: yaml.Node) -> Location:
        if self.set_by == "--set":
            return Location(self.name)
        return Location(self.name, node.start_mark.line + 1, node.start_mark.column + 1)


_KNOWN_TAGS = {
    f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}


def merged(lower: MapNode, upper: MapNode) -> MapNode:
    """`upper` over `lower`: mappings merge key by key, everything else is replaced whole."""
    entries, key_where = dict(lower.entries), dict(lower.key_where)
    for key, node in upper.entries.items():
        below = entries.get(key)
        both = isinstance(below, MapNode) and isinstance(node, MapNode)
        entries[key] = merged(below, node) if both else node  # type: ignore[arg-type]
        key_where[key] = upper.key_where.get(key, node.where)
    return replace(lower, entries=entries, key_where=key_where)


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every value with its dotted path; a list counts as one value."""
    if isinstance(node, MapNode):
        for key, child in node.entries.items():
            yield from leaves(child, f"{path}.{key}" if path else key)
    else:
        yield path, node
