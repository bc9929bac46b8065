"""The LaunchPlan: everything that will run, as data. Its renderings are what people read and what is executed.

The node agent reads plans on the nodes, so this module needs nothing but Python 3.8's standard library.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import (
    Any,
    Dict,
    Iterable,
    List,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

FORMAT = 1
EXIT_STOPPED = 85  # stopped on request with a checkpoint; free in sysexits.h, and no shell or docker run code
# Pinned memory, deep stacks and sockets of NCCL and torch; soft and hard alike.
WANTED_ULIMITS = ("memlock=-1", "stack=67108864", "nofile=1048576")


@dataclass(frozen=True)
class Setting:
    """One option of a program, or one variable, with who set it and why. `value` None: an option without a value."""

    name: str
    value: Optional[str]
    set_by: str
    why: str = ""


@dataclass(frozen=True)
class Mount:
    """A host folder or file inside the container."""

    source: str
    target: str
    read_only: bool
    set_by: str


@dataclass(frozen=True)
class Archive:
    """The tar file that an image is loaded from; a size or digest that is not known is None."""

    path: str
    bytes: Optional[int]
    sha256: Optional[str]


@dataclass(frozen=True)
class Container:
    """What the runtime is told, apart from what only the node knows. `shm_bytes` None: the host's /dev/shm.

    `sm` and `ptx` are the image's machine code and newest PTX, in compute capabilities × 10; none where not known.
    """

    image: str
    archive: Optional[Archive]
    shm_bytes: Optional[int]
    shm_set_by: str
    shm_why: str
    infiniband: bool
    host_sys: bool
    user: Optional[str]
    mounts: Tuple[Mount, ...]
    min_driver: Optional[str] = None
    sm: Tuple[int, ...] = ()
    ptx: Optional[int] = None


@dataclass(frozen=True)
class Program:
    """What a node starts. `launcher` torchrun starts `arguments` once for each rank; none starts them once."""

    launcher: str
    python: str
    processes_per_node: int
    arguments: Tuple[str, ...]


@dataclass(frozen=True)
class LaunchPlan:
    """See the module's docstring. Paths are absolute; `batch` are sbatch directives, `step` srun options."""

    run_id: str
    run_dir: str
    job_name: str
    scheduler: str
    runtime: str
    nodes: int
    gpus_per_node: int
    time_limit_s: Optional[int]
    signal_lead_s: int
    requeue: bool
    batch: Tuple[Setting, ...]
    step: Tuple[Setting, ...]
    interactive: Tuple[Setting, ...]
    modules: Tuple[str, ...]
    conda_environment: Optional[str]
    agent_python: str
    container: Optional[Container]
    program: Program
    environment: Tuple[Setting, ...]
    secrets: Tuple[str, ...]
    workdir: str
    workdir_set_by: str
    data_root: Optional[str] = None
    trainer: Optional[Dict[str, Any]] = None
    warnings: Tuple[str, ...] = ()
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LaunchPlan:
        """The plan in a launch.json.

        Raises:
            ValueError: the text is no plan, or one of another format.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"is not a launch plan of format {FORMAT}, the only one that this version reads")
        return _read(cls, raw, "")


@dataclass(frozen=True)
class NodeFacts:
    """What only the node knows, once it has been allocated. `index` counts from 0; node 0 is the master."""

    name: str
    index: int
    job_id: str
    attempt: int
    master_address: str
    master_port: str
    gpu_uuids: Tuple[str, ...]
    environment_file: str
    container_id_file: str
    ulimits: Tuple[str, ...] = WANTED_ULIMITS


Item = TypeVar("Item")
_KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
}


def _read(type_: Type[Item], raw: Any, path: str) -> Item:
    """One of the dataclasses above; keys that it does not have are passed over."""
    hints = get_type_hints(type_)
    found = _checked(dict, raw, path)
    names = [f.name for f in dataclasses.fields(type_)]  # type: ignore[arg-type]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"is not a launch plan: {path or 'it'} has no {', '.join(missing)}")
    return type_(**{name: _value(hints[name], found[name], f"{path}.{name}" if path else name) for name in names})


def _value(type_: Any, raw: Any, path: str) -> Any:
    origin = get_origin(type_)
    if origin is Union:
        inner = next(t for t in get_args(type_) if t is not type(None))
        return None if raw is None else _value(inner, raw, path)
    if origin is tuple:
        items = _checked(list, raw, path)
        return tuple(_value(get_args(type_)[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    if dataclasses.is_dataclass(type_):
        return _read(cast(Type[Any], type_), raw, path)
    return _checked(origin or type_, raw, path)


def _checked(type_: Any, raw: Any, path: str) -> Any:
    """`raw` itself; JSON's numbers, texts, lists and mappings have exactly these types."""
    if type(raw) is not type_:
        is_, expected = _KINDS[type(raw)], _KINDS[type_]
        raise ValueError(f"is not a launch plan: {path or 'it'} is {is_} instead of {expected}")
    return raw


def option(setting: Setting) -> str:
    """`--name=value`, or `--name`, as one element of an argv list."""
    return f"--{setting.name}" if setting.value is None else f"--{setting.name}={setting.value}"


def options(settings: Iterable[Setting]) -> List[str]:
    """The settings as argv elements."""
    return [option(setting) for setting in settings]
