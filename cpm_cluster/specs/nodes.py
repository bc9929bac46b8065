"""YAML as a tree that remembers, for every value, where it was written and by whom.

Scalars stay text here: `24:00:00`, `1e-4` and `512G` mean what the key says they mean, not what YAML 1.1
would make of them (86400, a string, a string).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cpm_cluster.specs.problems import Location, Problem, quoted, shortened

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


def written(node: Node) -> str:
    """A value as its author wrote it, on one line."""
    if isinstance(node, ListNode):
        return "[" + ", ".join(map(written, node.items)) + "]"
    if isinstance(node, MapNode):
        return "{" + ", ".join(f"{key}: {written(child)}" for key, child in node.entries.items()) + "}"
    return shortened(node.text, 4096)  # aliases can repeat a text of 1 MiB thousands of times


def read_yaml(path: Path, set_by: str, problems: list[Problem], shown_as: str | None = None) -> MapNode | None:
    """The mapping in a YAML file; None, with problems added, where there is none.

    `set_by` says in whose name the values speak (job, profile, cluster …); `shown_as` is the path for messages.
    """
    name = shown_as or str(path)
    try:
        with open(path, "rb", opener=_open_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                problems.append(Problem(Location(name), "", "is a pipe or a device; save it as a file"))
                return None
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem(Location(name), "", f"cannot be read: {reason}"))
        return None
    if len(data) > MAX_FILE_BYTES:
        problems.append(Problem(Location(name), "", "is larger than 1 MiB; that is not a file of this kind"))
        return None
    return parse_yaml(data, name, set_by, problems)


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that nobody writes to would have `open` wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


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


def parse_value(data: bytes, name: str, set_by: str, problems: list[Problem], path: str = "") -> Node | None:
    """Any YAML value, with positions; None, with a problem added, where the text is not YAML.

    `path` is the dotted key under which it stands.
    """
    source = _Source(name, set_by)
    try:
        root = yaml.compose(_checked_text(data, source), Loader=_Loader)
        if root is None:
            return ScalarNode("", True, source.at(0, 0), set_by)
        return _Reader(source, problems).read(root, path)
    except _Unusable as error:
        problems.append(error.problem)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(Problem(source.of(mark), "", f"is not valid YAML: {_reason(error, data)}"))
    except RecursionError:  # PyYAML's own parser; libyaml has no such guard, see _check_depth
        problems.append(Problem(Location(name), "", TOO_DEEP))
    except (yaml.YAMLError, ValueError) as error:
        problems.append(Problem(Location(name), "", f"is not valid YAML: {' '.join(str(error).split())}"))
    return None


@dataclass(frozen=True)
class _Source:
    """Where a text is from: a file, or an option of the command line, in which lines mean nothing."""

    name: str
    set_by: str

    def at(self, line: int, column: int) -> Location:
        """A place by its line and column from 0."""
        return Location(self.name) if self.set_by == "--set" else Location(self.name, line + 1, column + 1)

    def of(self, mark: Any) -> Location:
        """The place of a mark of PyYAML."""
        return self.at(mark.line, mark.column) if mark else Location(self.name)

    def at_offset(self, text: str, offset: int) -> Location:
        before = text[:offset]
        return self.at(before.count("\n"), offset - before.rfind("\n") - 1)


class _Unusable(Exception):
    """The text cannot be read as a whole."""

    def __init__(self, where: Location, key: str, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(where, key, what)


def _checked_text(data: bytes, source: _Source) -> str:
    """The text, once it is sure that the YAML parser can digest it."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        where = source.at_offset(before, len(before))
        what = "is not UTF-8 text" if source.set_by == "--set" else "is not UTF-8 text; save the file as UTF-8"
        raise _Unusable(where, "", what) from None
    if unprintable := _NOT_YAML.search(text):
        what = f"holds the control character U+{ord(unprintable.group()):04X}, which YAML does not allow; remove it"
        raise _Unusable(source.at_offset(text, unprintable.start()), "", what)
    _check_depth(text, source)
    return text


_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # YAML 1.1, 5.1


def _check_depth(text: str, source: _Source) -> None:
    """Refuses nesting that would overflow the C stack of libyaml's composer, which does not guard itself.

    Every level needs one of five characters, so that an ordinary file is cleared by counting them.
    """
    if sum(map(text.count, "[{-?:")) < 1000:
        return
    try:
        mark = _too_deep_at(text, _Loader)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" not in str(error.problem):
            return  # reported when it is read
        # libyaml since PyYAML 6.0.4 has a limit of its own, and looks ahead to it before it says where ours is passed
        mark = _too_deep_at(text, yaml.SafeLoader)
    if mark is not None:
        raise _Unusable(source.of(mark), "", TOO_DEEP)


def _too_deep_at(text: str, loader: Any) -> Any:
    """The mark of the first thing that is nested too deeply; None where nothing is."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return event.start_mark
    return None


TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels; no file of this kind is"

# What the parser says (libyaml or PyYAML's own), and what the author most likely did; {line}: where that begins.
_REASONS = {
    "expected ',' or ']'": "a comma is missing here, or the ] of the list that begins in line {line}",
    "expected ',' or '}'": "a comma is missing here, or the } of the mapping that begins in line {line}",
    "mapping values are not allowed": "a colon is not expected here; mend the indentation, or put text with `: ` in it"
    " in quotes",
    "could not find expected ':'": "a colon is missing: every line is `key: value`, and a key is one word",
    "did not find expected key": "the indentation is not that of the lines above",
    "did not find expected '-' indicator": "the indentation is not that of the lines above",
    "expected <block end>": "the indentation is not that of the lines above",
    "expected alphabetic or numeric": "a value cannot start with * or &; put it in quotes",
    "found undefined alias": "a value that starts with * repeats one that was marked with &, and none was; for text,"
    " put it in quotes",
    "found unknown escape character": "between double quotes, \\ starts an escape; use single quotes",
    "found unexpected end of stream": "the quote that begins in line {line} is not closed",
    "did not find expected <document start>": "a `key: value` line is expected here",
    "expected '<document start>'": "a `key: value` line is expected here",
    "expected a single document": "a second document begins here (---); write a file for each",
}


def _reason(error: yaml.MarkedYAMLError, data: bytes) -> str:
    said = " ".join(filter(None, (error.context, error.problem)))
    mark, begin = error.problem_mark, error.context_mark
    if mark and "cannot start any token" in said:
        character = data.decode("utf-8-sig")[mark.index : mark.index + 1]
        tab = "a tab cannot indent; use spaces"
        return tab if character == "\t" else f"a value cannot start with {character}; put it in quotes"
    advice = next((text for phrase, text in _REASONS.items() if phrase in said), said)
    return advice.replace("{line}", str(begin.line + 1 if begin else 1))


class _Reader:
    """Turns PyYAML's node graph into our tree, counting what aliases expand to."""

    def __init__(self, source: _Source, problems: list[Problem]) -> None:
        self.source, self.problems = source, problems
        self.count = 0
        self.open: list[yaml.Node] = []  # the collections around the node that is being read

    def read(self, node: yaml.Node, path: str) -> Node:
        """Raises _Unusable where the text stands for too much, or has a construct that hides what is meant."""
        self.count += 1
        where = self._where(node)
        if self.count > MAX_NODES:
            what = f"stands for more than {MAX_NODES:,} values; aliases (&a, *a) may not multiply like that"
            raise _Unusable(self.source.at(0, 0), "", what)
        if any(node is outer for outer in self.open):
            raise _Unusable(where, path, "contains itself: an alias (*a) stands inside the value that it repeats")
        if node.tag not in _KNOWN_TAGS:
            tag = quoted(node.tag.replace("tag:yaml.org,2002:", "!!"))
            raise _Unusable(where, path, f"has the YAML tag {tag}, which is not allowed; for text, put it in quotes")
        if isinstance(node, yaml.ScalarNode):
            return ScalarNode(node.value, not node.style, where, self.source.set_by)  # None, or '' from libyaml: plain
        if len(self.open) == MAX_DEPTH:
            raise _Unusable(where, "", TOO_DEEP)
        self.open.append(node)
        read = self._mapping(node, where, path) if isinstance(node, yaml.MappingNode) else self._list(node, where, path)
        self.open.pop()
        return read

    def _list(self, node: yaml.Node, where: Location, path: str) -> ListNode:
        items = tuple(self.read(child, f"{path}[{index}]") for index, child in enumerate(node.value))
        return ListNode(items, where, self.source.set_by)

    def _mapping(self, node: yaml.MappingNode, where: Location, path: str) -> MapNode:
        entries: dict[str, Node] = {}
        key_where: dict[str, Location] = {}
        for key_node, value_node in node.value:
            place, key = self._where(key_node), key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Unusable(
                    place, path, f"{_KINDS[type(key_node)]} cannot be a key; put text with [ or {{ in quotes"
                )
            full = f"{path}.{key}" if path else key
            if key == "<<" and not key_node.style:
                raise _Unusable(place, full, "merge keys are not supported; write the keys out")
            if key in entries:
                line = key_where[key].line
                first = f" (first in line {line})" if line else ""
                self.problems.append(Problem(place, full, f"is written twice{first}; keep one"))
                continue
            entries[key] = self.read(value_node, full)
            key_where[key] = place
        return MapNode(entries, where, self.source.set_by, key_where)

    def _where(self, node: yaml.Node) -> Location:
        return self.source.of(node.start_mark)


_KINDS = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}
_KNOWN_TAGS = {
    f"tag:yaml.org,2002:{tag}"
    for tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")
}


def merged(lower: MapNode, upper: MapNode) -> MapNode:
    """`upper` over `lower`: mappings merge key by key, everything else is replaced whole.

    A key without a value (`resources:`) changes nothing in a mapping. The result lies where `upper` was written,
    but for --set, which has no lines to point to.
    """
    entries, key_where = dict(lower.entries), dict(lower.key_where)
    for key, node in upper.entries.items():
        below = entries.get(key)
        if isinstance(below, MapNode) and isinstance(node, ScalarNode) and node.is_null:
            continue
        both = isinstance(below, MapNode) and isinstance(node, MapNode)
        entries[key] = merged(below, node) if both else node  # type: ignore[arg-type]
        key_where[key] = upper.key_where.get(key, node.where)
    return replace(upper if upper.where.line else lower, entries=entries, key_where=key_where)


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every value with its dotted path; a list counts as one value."""
    if isinstance(node, MapNode):
        for key, child in node.entries.items():
            yield from leaves(child, f"{path}.{key}" if path else key)
    else:
        yield path, node
