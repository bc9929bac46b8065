"""Field types: how a key's value is read, refused with a useful sentence, and described in JSON Schema.

A spec is a frozen dataclass whose fields are made with `key(TYPE, "what it means")`; `Section(Spec)` reads it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cpm_cluster.specs.nodes import ListNode, MapNode, Node, ScalarNode, kind
from cpm_cluster.specs.problems import Location, Problem, did_you_mean, listed, quoted
from cpm_cluster.specs.values import parse_duration, parse_size

Schema = dict[str, Any]


class Invalid(Exception):
    """A value was refused; its problem is already noted."""


@dataclass
class Reading:
    """What one pass over a file notes down. In a `partial` pass (one layer of several) required keys may be missing."""

    problems: list[Problem]
    partial: bool = False

    def refuse(self, where: Location, key: str, what: str) -> Invalid:
        self.problems.append(Problem(where, key, what))
        return Invalid()


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


@dataclass(frozen=True)
class Text:
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
        allowed = "\n\t" if self.multiline else ""
        if any((ord(c) < 32 and c not in allowed) or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in text):
            raise reading.refuse(scalar.where, path, f"{quoted(text)} holds control characters; write {self.expected}")
        if not text.strip() and self.pattern != "":
            raise reading.refuse(scalar.where, path, f"is empty; write {self.expected}")
        if len(text) > self.max_length:
            raise reading.refuse(scalar.where, path, f"is {len(text):,} characters long; at most {self.max_length:,}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise reading.refuse(scalar.where, path, f"{quoted(text)} is not allowed; write {self.expected}")
        return text

    def schema(self) -> Schema:
        scalar: Schema = {"type": ["string", "number", "boolean"] if not self.pattern else ["string", "number"]}
        return scalar | ({"pattern": f"^(?:{self.pattern})$"} if self.pattern else {})


@dataclass(frozen=True)
class Integer:
    minimum: int = 0
    maximum: int = 10**12

    @property
    def expected(self) -> str:
        if self.maximum < 10**12:
            return f"a whole number from {self.minimum} to {self.maximum}"
        return f"a whole number of {self.minimum} or more"

    def read(self, node: Node, path: str, reading: Reading) -> int:
        scalar = _scalar(node, path, reading, self.expected)
        if not re.fullmatch(r"[+-]?\d{1,30}", scalar.text.replace("_", "")) or not scalar.plain:
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not {self.expected}")
        value = int(scalar.text.replace("_", ""))
        if not self.minimum <= value <= self.maximum:
            raise reading.refuse(scalar.where, path, f"{scalar.text} is out of range; write {self.expected}")
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True)
class Number:
    minimum: float = 0.0
    maximum: float = 1e18
    above_minimum: bool = False

    @property
    def expected(self) -> str:
        lower = f"above {self.minimum:g}" if self.above_minimum else f"of {self.minimum:g} or more"
        return f"a number {lower}" + (f" and at most {self.maximum:g}" if self.maximum < 1e18 else "")

    def read(self, node: Node, path: str, reading: Reading) -> float:
        scalar = _scalar(node, path, reading, self.expected)
        try:
            value = float(scalar.text) if scalar.plain else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not {self.expected}")
        if value < self.minimum or value > self.maximum or (self.above_minimum and value == self.minimum):
            raise reading.refuse(scalar.where, path, f"{scalar.text} is out of range; write {self.expected}")
        return value

    def schema(self) -> Schema:
        lower = "exclusiveMinimum" if self.above_minimum else "minimum"
        # YAML 1.1 readers take 1e-4 (no dot) for a string; so do editors
        number: Schema = {"type": "number", lower: self.minimum, "maximum": self.maximum}
        return {"anyOf": [number, {"type": "string", "pattern": r"^\d+(\.\d*)?[eE][-+]?\d+$"}]}


@dataclass(frozen=True)
class Boolean:
    def read(self, node: Node, path: str, reading: Reading) -> bool:
        scalar = _scalar(node, path, reading, "true or false")
        if scalar.text not in ("true", "false") or not scalar.plain:
            raise reading.refuse(scalar.where, path, f"{quoted(scalar.text)} is not allowed; write true or false")
        return scalar.text == "true"

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Choice:
    options: tuple[str, ...]

    def read(self, node: Node, path: str, reading: Reading) -> str:
        scalar = _scalar(node, path, reading, listed(self.options))
        if scalar.text not in self.options:
            hint = did_you_mean(scalar.text, self.options)
            raise reading.refuse(
                scalar.where, path, f"{quoted(scalar.text)} is not allowed; write {listed(self.options)}{hint}"
            )
        return scalar.text

    def schema(self) -> Schema:
        return {"enum": list(self.options)}


@dataclass(frozen=True)
class _Measured:
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


@dataclass(frozen=True)
class ListOf:
    """A list; one value alone stands for a list of one where `or_one`."""

    item: FieldType
    minimum: int = 0
    or_one: bool = False

    def read(self, node: Node, path: str, reading: Reading) -> tuple[Any, ...]:
        if self.or_one and isinstance(node, ScalarNode) and not node.is_null:
            return (self.item.read(node, path, reading),)
        if not isinstance(node, ListNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write a list, [a, b]")
        if len(node.items) < self.minimum:
            raise reading.refuse(node.where, path, f"has {len(node.items)} entries; at least {self.minimum} are needed")
        values, failed = [], False
        for index, item in enumerate(node.items):
            try:
                values.append(self.item.read(item, f"{path}[{index}]", reading))
            except Invalid:
                failed = True
        if failed:
            raise Invalid
        return tuple(values)

    def schema(self) -> Schema:
        array: Schema = {"type": "array", "items": self.item.schema(), "minItems": self.minimum}
        return {"anyOf": [self.item.schema(), array]} if self.or_one else array


@dataclass(frozen=True)
class MapOf:
    """A mapping with free keys of one form."""

    value: FieldType
    key_pattern: str
    key_expected: str

    def read(self, node: Node, path: str, reading: Reading) -> dict[str, Any]:
        if isinstance(node, ScalarNode) and node.is_null:
            return {}
        if not isinstance(node, MapNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write a mapping, {{key: value}}")
        values, failed = {}, False
        for name, child in node.entries.items():
            if not re.fullmatch(self.key_pattern, name) or not name.isprintable():
                reading.refuse(node.key_where[name], path, f"{quoted(name)} is not {self.key_expected}")
                failed = True
                continue
            try:
                values[name] = self.value.read(child, f"{path}.{name}", reading)
            except Invalid:
                failed = True
        if failed:
            raise Invalid
        return values

    def schema(self) -> Schema:
        names = {"pattern": f"^(?:{self.key_pattern})$"}
        return {"type": ["object", "null"], "additionalProperties": self.value.schema(), "propertyNames": names}


@dataclass(frozen=True)
class Section:
    """A mapping with known keys, read into a dataclass made of `key(...)` fields."""

    spec: type[Any]

    def read(self, node: Node, path: str, reading: Reading) -> Any:
        values = self.values(node, path, reading)
        missing = [f for f in _keys(self.spec) if f.name not in values and _required(f)]
        if missing and not reading.partial:
            for field in missing:
                full = f"{path}.{yaml_name(field)}" if path else yaml_name(field)
                reading.refuse(node.where, full, f"is missing: {field.metadata['doc']}")
        if missing:
            raise Invalid
        return self.spec(**values)

    def values(self, node: Node, path: str, reading: Reading) -> dict[str, Any]:
        """What is written, by field; raises Invalid where anything is wrong."""
        if isinstance(node, ScalarNode) and node.is_null:
            return {}
        if not isinstance(node, MapNode):
            raise reading.refuse(node.where, path, f"is {kind(node)}; write a mapping, {{key: value}}")
        fields = {yaml_name(f): f for f in _keys(self.spec)}
        values, failed = {}, False
        for name, child in node.entries.items():
            full = f"{path}.{name}" if path else name
            if name not in fields:
                hint = did_you_mean(name, fields) or f"; known here: {listed(fields)}"
                reading.refuse(node.key_where[name], full, f"is not a known key{hint}")
                failed = True
                continue
            if isinstance(child, ScalarNode) and child.is_null and not _required(fields[name]):
                continue
            try:
                values[fields[name].name] = fields[name].metadata["type"].read(child, full, reading)
            except Invalid:
                failed = True
        if failed:
            raise Invalid
        return values

    def schema(self) -> Schema:
        properties = {
            yaml_name(f): f.metadata["type"].schema() | {"description": f.metadata["doc"]} for f in _keys(self.spec)
        }
        return {
            "type": "object",
            "description": (self.spec.__doc__ or "").strip().split("\n")[0],
            "properties": properties,
            "additionalProperties": False,
            "required": [yaml_name(f) for f in _keys(self.spec) if _required(f)],
        }


def _keys(spec: type[Any]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(spec) if "type" in f.metadata]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def known_paths(spec: type[Any], path: str = "") -> Mapping[str, str]:
    """Every dotted key of a spec with its meaning."""
    found: dict[str, str] = {}
    for field in _keys(spec):
        full = f"{path}.{yaml_name(field)}" if path else yaml_name(field)
        type_ = field.metadata["type"]
        found[full] = str(field.metadata["doc"])
        if isinstance(type_, Section):
            found.update(known_paths(type_.spec, full))
    return found
