"""Field types: how a key's value is read, refused with a useful sentence, and described in JSON Schema.

Field types are NamedTuples: ten times quicker to define than dataclasses, which every start of the CLI pays for.
A spec is a frozen dataclass whose fields are made with `key(TYPE, "what it means")`; `Section(Spec)` reads it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cpm_cluster.specs.nodes import ListNode, MapNode, Node, ScalarNode, kind
from cpm_cluster.specs.problems import Location, Problem, did_you_mean, listed, nearest, quoted, shortened
from cpm_cluster.specs.values import parse_duration, parse_size

Schema = dict[str, Any]


class Invalid(Exception):
    """A value was refused; its problem is already noted."""


@dataclass
class Reading:
    """What one pass over a file notes down.

    A `lenient` pass gives back what could be read (None for a required key that could not), so that checks can
    go on; `unread` holds the keys of which nothing more can be said without repeating what is already noted.
    `meant_by` knows the key (dotted) that a word stands for which is none where it was written.
    """

    problems: list[Problem]
    lenient: bool = False
    unread: set[str] = dataclasses.field(default_factory=set)
    meant_by: Callable[[str], str | None] = lambda word: None

    def refuse(self, where: Location, key: str, what: str) -> Invalid:
        self.problems.append(Problem(where, key, what))
        self.unread.add(key)
        return Invalid()

    def is_unread(self, key: str) -> bool:
        """Whether a key, one above it or one below it could not be read."""
        return any(_lies_in(key, other) or _lies_in(other, key) for other in self.unread)


def _lies_in(key: str, section: str) -> bool:
    return key == section or key.startswith((section + ".", section + "["))


class FieldType(Protocol):
    def read(self, node: Node, path: str, reading: Reading) -> Any:
        """The value. Raises Invalid once its problems are noted."""

    def schema(self) -> Schema:
        """JSON Schema (draft 2020-12) of what `read` takes."""


def key(type_: FieldType, doc: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is read from YAML; required where it has no default."""
    extra: dict[str, Any] = {}
    if factory is not dataclasses.MISSING:
        extra["default_factory"] = factory
    elif default is not dataclasses.MISSING:
        extra["default"] = default
    return dataclasses.field(metadata={"type": type_, "doc": doc}, **extra)


def _scalar(node: Node, path: str, reading: Reading, expected: str) -> ScalarNode:
    if not isinstance(node, ScalarNode) or node.is_null:
        raise reading.refuse(node.where, path, f"is {kind(node)}; write {expected}")
    return node


def _refuse_quotes(scalar: ScalarNode, path: str, reading: Reading) -> None:
    if not scalar.plain:
        raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is text; write it without quotes")


class Text(NamedTuple):
    """Text without control characters, so that it can be shown and put into an environment.

    `pattern` (with `expected` to say it in words) narrows it; `multiline` admits newlines and tabs.
    """

    pattern: str = ""
    expected: str = "text"
    multiline: bool = False
    max_length: int = 4096

    def read(self, node: Node, path: str, reading: Reading) -> str:
        scalar = _scalar(node, path, reading, self.expected)
        text = scalar.text
        if len(text) > self.max_length:
            most = f"{self.expected} of at most {self.max_length:,} characters"
            raise reading.refuse(scalar.where, path, f"is {len(text):,} characters long; write {most}")
        allowed = "\n\t" if self.multiline else ""
        if any((ord(c) < 32 and c not in allowed) or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in text):
            raise reading.refuse(scalar.where, path, f"{quoted(text)} holds control characters; write {self.expected}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            what = f"{quoted(text)} is not allowed" if text.strip() else "is empty"
            raise reading.refuse(scalar.where, path, f"{what}; write {self.expected}")
        return text

    def schema(self) -> Schema:
        scalar: Schema = {"type": ["string", "number", "boolean"]}  # what YAML makes of text such as 1.13 or true
        return scalar | ({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})


MANY = 10**9  # of steps, nodes, tokens: more is a slip of the finger


class Integer(NamedTuple):
    minimum: int = 0
    maximum: int = MANY

    @property
    def expected(self) -> str:
        if self.maximum < MANY:
            return f"a whole number from {self.minimum} to {self.maximum}"
        return f"a whole number of {self.minimum} or more"

    def read(self, node: Node, path: str, reading: Reading) -> int:
        scalar = _scalar(node, path, reading, self.expected)
        text = scalar.text.replace("_", "")
        if not re.fullmatch(r"[+-]?(0|[1-9][0-9]{0,29})", text):  # 010 is 8 in YAML 1.1
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not {self.expected}")
        _refuse_quotes(scalar, path, reading)
        value = int(text)
        if not self.minimum <= value <= self.maximum:
            most = f", at most {self.maximum}" if value > self.maximum >= MANY else ""
            raise reading.refuse(scalar.where, path, f"{scalar.text} is out of range; write {self.expected}{most}")
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"


class Number(NamedTuple):
    minimum: float = 0.0
    maximum: float = 1e18
    above_minimum: bool = False

    @property
    def expected(self) -> str:
        lower = f"above {self.minimum:g}" if self.above_minimum else f"of {self.minimum:g} or more"
        return f"a number {lower}" + (f" and at most {self.maximum:.12g}" if self.maximum < 1e18 else "")

    def read(self, node: Node, path: str, reading: Reading) -> float:
        scalar = _scalar(node, path, reading, self.expected)
        value = float(scalar.text) if re.fullmatch(_NUMBER, scalar.text) else math.inf
        if not math.isfinite(value):
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not {self.expected}")
        _refuse_quotes(scalar, path, reading)
        if value < self.minimum or value > self.maximum or (self.above_minimum and value == self.minimum):
            short = shortened(scalar.text, 60)
            raise reading.refuse(scalar.where, path, f"{short} is out of range; write {self.expected}")
        return value

    def schema(self) -> Schema:
        lower = "exclusiveMinimum" if self.above_minimum else "minimum"
        # YAML 1.1 readers take 1e-4 (no dot) for a string; so do editors
        number: Schema = {"type": "number", lower: self.minimum, "maximum": self.maximum}
        return {"anyOf": [number, {"type": "string", "pattern": f"^{_NUMBER}$"}]}


class Boolean(NamedTuple):
    def read(self, node: Node, path: str, reading: Reading) -> bool:
        scalar = _scalar(node, path, reading, "true or false")
        if scalar.text not in ("true", "false"):
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not allowed; write true or false")
        _refuse_quotes(scalar, path, reading)
        return scalar.text == "true"

    def schema(self) -> Schema:
        return {"type": "boolean"}


class Choice(NamedTuple):
    """One of `options`; `elsewhere` are words of other tools, and the option that is meant by each."""

    options: tuple[str, ...]
    elsewhere: tuple[tuple[str, str], ...] = ()

    def read(self, node: Node, path: str, reading: Reading) -> str:
        scalar = _scalar(node, path, reading, listed(self.options))
        if scalar.text not in self.options:
            meant = dict(self.elsewhere).get(scalar.text.lower())
            hint = f" (did you mean {meant}?)" if meant else did_you_mean(scalar.text, self.options)
            raise reading.refuse(
                scalar.where, path, f"{quoted(scalar.text)} is not allowed; write {listed(self.options)}{hint}"
            )
        return scalar.text

    def schema(self) -> Schema:
        return {"enum": list(self.options)}


class _Measured(NamedTuple):
    """A number with a unit, stored as an integer in the smallest one."""

    parse: Callable[[str], int]
    expected: str
    pattern: str
    suffix: str
    minimum: int = 1

    def read(self, node: Node, path: str, reading: Reading) -> int:
        scalar = _scalar(node, path, reading, self.expected)
        try:
            value = self.parse(scalar.text)
        except ValueError as error:
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} {error}; write {self.expected}") from None
        if value < self.minimum:
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is too small; write {self.expected}")
        return value

    def schema(self) -> Schema:
        return {"type": "string", "pattern": self.pattern}


SIZE = _Measured(
    parse_size, "a size with its unit, such as 512G, 4GiB or 80GB", r"^\s*\d+(\.\d+)?\s*[A-Za-z]+\s*$", "_bytes"
)
DURATION = _Measured(
    parse_duration,
    "a duration with its unit, such as 24h, 1h30m, 24:00:00 or 2-00:00:00",
    r"^\s*\d+[\d\s.:A-Za-z-]+$",
    "_s",
)


def yaml_name(field: dataclasses.Field[Any]) -> str:
    """The key in the file: sizes and durations carry their unit in the value there, in the name here."""
    type_ = field.metadata["type"]
    return field.name.removesuffix(type_.suffix) if isinstance(type_, _Measured) else field.name


class ListOf(NamedTuple):
    """A list, described in words by `expected`; one value alone stands for a list of one where `or_one`."""

    item: FieldType
    minimum: int = 0
    or_one: bool = False
    expected: str = "a list, [a, b]"

    def read(self, node: Node, path: str, reading: Reading) -> tuple[Any, ...]:
        if self.or_one and isinstance(node, ScalarNode) and not node.is_null:
            return (self.item.read(node, path, reading),)
        if not isinstance(node, ListNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write {self.expected}")
        if len(node.items) < self.minimum:
            raise reading.refuse(node.where, path, f"is too short; write {self.expected} ({self.minimum} or more)")
        values = []
        with _whole(reading):
            for index, item in enumerate(node.items):
                with suppress(Invalid):
                    values.append(self.item.read(item, f"{path}[{index}]", reading))
        return tuple(values)

    def schema(self) -> Schema:
        array: Schema = {"type": "array", "items": self.item.schema(), "minItems": self.minimum}
        return {"anyOf": [self.item.schema(), array]} if self.or_one else array


class MapOf(NamedTuple):
    """A mapping with free keys of one form, described in words by `key_expected`."""

    value: FieldType
    key_pattern: str
    key_expected: str
    expected: str = "a mapping, {key: value}"

    def read(self, node: Node, path: str, reading: Reading) -> dict[str, Any]:
        if isinstance(node, ScalarNode) and node.is_null:
            return {}
        if not isinstance(node, MapNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write {self.expected}")
        values = {}
        with _whole(reading):
            for name, child in node.entries.items():
                if not re.fullmatch(self.key_pattern, name) or not name.isprintable():
                    reading.refuse(node.key_where[name], path, f"{quoted(name)} is not {self.key_expected}")
                    continue
                with suppress(Invalid):
                    values[name] = self.value.read(child, f"{path}.{name}", reading)
        return values

    def schema(self) -> Schema:
        names = {"pattern": f"^(?:{self.key_pattern})$"}
        return {"type": ["object", "null"], "additionalProperties": self.value.schema(), "propertyNames": names}


class Section(NamedTuple):
    """A mapping with known keys, described in words by `expected`, read into a dataclass made of `key(...)` fields."""

    spec: type[Any]
    expected: str = "a mapping, {key: value}"

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        with _whole(reading):
            values = self.values(node, path, reading)
            for field in _keys(self.spec):
                if field.name not in values and _required(field):
                    full = _below(path, yaml_name(field))
                    if not reading.is_unread(full):
                        reading.refuse(node.where, full, f"is missing: {field.metadata['doc']}")
                    values[field.name] = None
        return self.spec(**values)

    def values(self, node: Node, path: str, reading: Reading) -> dict[str, Any]:
        """What is written and can be read, by field."""
        if isinstance(node, ScalarNode) and node.is_null:
            return {}
        if not isinstance(node, MapNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write {self.expected}")
        fields = {yaml_name(f): f for f in _keys(self.spec)}
        values = {}
        for name, child in node.entries.items():
            full = _below(path, name)
            if name not in fields:
                self._unknown(node.key_where[name], path, name, reading)
            elif not (isinstance(child, ScalarNode) and child.is_null and not _required(fields[name])):
                with suppress(Invalid):
                    values[fields[name].name] = fields[name].metadata["type"].read(child, full, reading)
        return values

    def _unknown(self, where: Location, path: str, name: str, reading: Reading) -> None:
        known = [yaml_name(f) for f in _keys(self.spec)]
        meant = reading.meant_by(name)
        own = meant.rpartition(".")[2] if meant else None
        if meant and own not in known:
            reading.refuse(where, _below(path, name), f"is not a known key here; write {meant}")
            reading.unread.add(meant)
            return
        near = [own] if own else nearest(name, known)
        hint = f" (did you mean {listed(near)}?)" if near else f"; known here: {', '.join(known)}"
        reading.refuse(where, _below(path, name), f"is not a known key{hint}")
        reading.unread.update(_below(path, word) for word in near)

    def schema(self) -> Schema:
        required = [yaml_name(f) for f in _keys(self.spec) if _required(f)]
        return {
            "type": "object" if required else ["object", "null"],
            "description": (self.spec.__doc__ or "").strip().split("\n")[0],
            "properties": {yaml_name(f): _key_schema(f) for f in _keys(self.spec)},
            "additionalProperties": False,
            "required": required,
        }


@contextmanager
def _whole(reading: Reading) -> Iterator[None]:
    """Raises Invalid after a block that noted a problem, unless the reading is lenient."""
    before = len(reading.problems)
    yield
    if not reading.lenient and len(reading.problems) > before:
        raise Invalid


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _key_schema(field: dataclasses.Field[Any]) -> Schema:
    """The key's schema with its meaning; a key that may be left out may also be written without a value."""
    schema: Schema = field.metadata["type"].schema()
    if not _required(field):
        schema = _or_null(schema)
    return schema | {"description": field.metadata["doc"]}


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return schema | {"type": types if "null" in types else [*types, "null"]}


def _keys(spec: type[Any]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(spec) if "type" in f.metadata]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def described(instance: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of a spec that was read: (dotted key, value, meaning)."""
    for field in _keys(type(instance)):
        full = _below(path, yaml_name(field))
        value = getattr(instance, field.name)
        if isinstance(field.metadata["type"], Section) and value is not None:
            yield from described(value, full)
        else:
            yield full, value, str(field.metadata["doc"])
