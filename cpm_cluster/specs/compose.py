"""From a job file and what it names to one JobSpec: job ← profile ← cluster defaults ← --set."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.checks import check_job
from cpm_cluster.specs.cluster import Cluster
from cpm_cluster.specs.fields import Invalid, Reading, Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import CONFIG_NAME, JobSpec, Origin, Source
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.nccl import lint_environment
from cpm_cluster.specs.nodes import (
    MAX_DEPTH,
    MapNode,
    Node,
    ScalarNode,
    leaves,
    merged,
    parse_value,
    read_yaml,
    written,
)
from cpm_cluster.specs.problems import Location, Problem, SpecError, did_you_mean, listed, quoted, shortened
from cpm_cluster.specs.profile import Profile
from cpm_cluster.specs.words import meant_by

Spec = TypeVar("Spec")


def load_job(path: Path, overrides: Sequence[str], catalogue: Catalogue, detected_cluster: str) -> JobSpec:
    """The composed job.

    Args:
        path: the job file.
        overrides: `a.b=c` texts of `--set`, the last one winning.
        catalogue: where named configs are looked up.
        detected_cluster: the cluster of a job that names none.

    Raises:
        SpecError: everything that is wrong, with file, line and column.
    """
    problems: list[Problem] = []
    job = read_yaml(path, "job", problems)
    sets = [node for text in overrides if (node := parse_override(text, problems))]
    if job is None:
        raise SpecError(problems)
    return compose_job(path, [job, *sets], catalogue, detected_cluster, problems)


def compose_job(
    path: Path, layers: Sequence[MapNode], catalogue: Catalogue, detected_cluster: str, problems: list[Problem]
) -> JobSpec:
    """As `load_job`, of a job in layers, the last one winning; relative paths start at the folder of `path`.

    Raises:
        SpecError: `problems`, and everything else that is wrong.
    """
    return _Composition(path, layered(layers), catalogue, detected_cluster, problems).compose()


def layered(layers: Sequence[MapNode]) -> MapNode:
    """The layers as one; a part of a model or an image changes what a lower layer names."""
    job, *others = layers
    for node in others:
        job = merged(_expand_references(job, node), node)
    return job


def parse_override(text: str, problems: list[Problem]) -> MapNode | None:
    """`a.b=c` as the mapping {a: {b: c}}; c is YAML."""
    where = Location("--set " + shortened(text, 120))
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts) or len(parts) > MAX_DEPTH:
        problems.append(Problem(where, "", "is not of the form key.subkey=value"))
        return None
    node = parse_value(value.encode("utf-8", "surrogatepass"), where.file, "--set", problems, path)
    for part in reversed(parts):
        if node is not None:
            node = MapNode({part: node}, where, "--set", {part: where})
    return node if isinstance(node, MapNode) else None


def _expand_references(job: MapNode, override: MapNode) -> MapNode:
    """`model: x` becomes `model: {base: x}` where an override changes a part of it."""
    entries = dict(job.entries)
    for name in ("model", "image"):
        below, above = entries.get(name), override.entries.get(name)
        is_name = isinstance(below, ScalarNode) and not below.is_null
        if below and is_name and isinstance(above, MapNode) and "base" not in above.entries:
            entries[name] = MapNode({"base": below}, below.where, below.set_by, {"base": below.where})
    return replace(job, entries=entries)


# What a profile and a cluster bring along: where theirs cannot be read, nothing can be said of these.
BROUGHT = {"profile": ("resources", "time_limit"), "cluster": ("time_limit", "signal_lead", "slurm.partition")}


class _Composition:
    """One job on its way through lookup, merging and checking."""

    def __init__(
        self, path: Path, job: MapNode, catalogue: Catalogue, detected_cluster: str, problems: list[Problem]
    ) -> None:
        self.path, self.job, self.catalogue = path, job, catalogue
        self.reading = Reading(problems, lenient=True, meant_by=meant_by)
        if _is_left_out(job.entries.get("cluster")):
            detected = ScalarNode(detected_cluster, True, Location(str(path)), "detected")
            self.job = replace(job, entries=job.entries | {"cluster": detected})

    def compose(self) -> JobSpec:
        cluster_node, cluster = self._named("cluster", "clusters", Cluster)
        self.catalogue = self.catalogue.beside_archives(cluster.image_folder if cluster else None)
        profile_node, profile = self._named("profile", "profiles", Profile)
        tree = merged(merged(self._cluster_defaults(cluster_node), self._profile_layer(profile_node)), self.job)
        spec: JobSpec = Section(JobSpec).read(tree, "", self.reading)
        model = self._reference("model", "models", Model, tree)
        spec = replace(
            spec,
            cluster=cast(Cluster, cluster),  # None only where a problem is noted
            model=model,
            image=self._reference("image", "images", Image, tree),
            gpu=self._gpu(tree, cluster_node),
            tokenizer=self._tokenizer(spec.tokenizer, tree),
            model_name=_scalar_text(_base(tree.entries.get("model"))) or ("inline" if model else None),
            cluster_name=_scalar_text(tree.entries.get("cluster")) or "",
            origins={**_origins(cluster_node, "cluster"), **_origins(tree)},
        )
        check_job(spec, tree, self.reading)
        if self.reading.problems:
            raise SpecError(self.reading.problems)
        warnings = (profile.warning,) if profile and profile.warning else ()
        return replace(self._with_paths(spec), warnings=(*warnings, *lint_environment(spec)))

    def _named(self, key: str, kind: str, spec: type[Spec]) -> tuple[MapNode | None, Spec | None]:
        """The config that the job names under `key`, as written and as read."""
        name = self.job.entries.get(key)
        if name is None or _is_left_out(name):
            return None, None
        node = self._load(kind, name, key)
        read = self._section(node, spec) if node else None
        if read is None:
            self.reading.unread.update((key, *BROUGHT[key]))
            return None, None
        return node, read

    def _load(self, kind: str, name: Node, key: str) -> MapNode | None:
        """The file that a name or a path stands for."""
        try:
            CONFIG_NAME.read(name, key, self.reading)
        except Invalid:
            return None
        assert isinstance(name, ScalarNode)
        return self.catalogue.load(kind, name, key, self.path.parent, self.reading.problems)

    def _section(self, node: MapNode, spec: type[Spec], path: str = "", reading: Reading | None = None) -> Spec | None:
        try:
            read: Spec = Section(spec).read(node, path, reading or Reading(self.reading.problems))
        except Invalid:
            return None
        return read

    def _reference(self, key: str, kind: str, spec: type[Spec], tree: MapNode) -> Spec | None:
        """A model or an image: a name, a path, a mapping, or a mapping over a base."""
        node = tree.entries.get(key)
        if node is None or _is_left_out(node):
            return None
        read = self._over_base(node, kind, spec, key) if isinstance(node, MapNode) else None
        if isinstance(node, ScalarNode) and (whole := self._load(kind, node, key)):
            read = self._section(whole, spec)
        if read is None:
            self.reading.unread.add(key)
        return read

    def _over_base(self, node: MapNode, kind: str, spec: type[Spec], key: str) -> Spec | None:
        changes = replace(node, entries={k: v for k, v in node.entries.items() if k != "base"})
        # the words of the job's own reading, so that a problem is shown once
        in_job = Reading(self.reading.problems, meant_by=meant_by)
        if "base" not in node.entries:
            return self._section(changes, spec, key, in_job)
        base = self._load(kind, node.entries["base"], f"{key}.base")
        if base is None or self._section(base, spec) is None:
            return None
        return self._section(merged(base, changes), spec, key, in_job)

    def _gpu(self, tree: MapNode, cluster: MapNode | None) -> Gpu | None:
        """The catalogue's entry for the GPU of the job, or of its cluster."""
        resources = tree.entries.get("resources")
        key, node = "resources.gpu", resources.entries.get("gpu") if isinstance(resources, MapNode) else None
        if _is_left_out(node):
            key, node = "gpu", cluster.entries.get("gpu") if cluster else None
        if not isinstance(node, ScalarNode) or node.is_null:
            return None
        known = self.catalogue.gpus(self.reading.problems)
        entry = known.get(node.text)
        read = self._section(entry, Gpu, node.text) if isinstance(entry, MapNode) else None
        if entry is None and not (key == "resources.gpu" and self.reading.is_unread(key)):
            hint = did_you_mean(node.text, known) or f"; known: {listed(known)}"
            self.reading.refuse(node.where, key, f"{quoted(node.text)} is not in configs/gpus.yaml{hint}")
        if read is None:
            self.reading.unread.add("resources.gpu")
        return read

    @staticmethod
    def _cluster_defaults(cluster: MapNode | None) -> MapNode:
        """What a cluster file says of every job, as the lowest layer of the job."""
        where = cluster.where if cluster else Location("cluster")
        entries: dict[str, Node] = {}
        written = cluster.entries if cluster else {}
        if "default_time" in written:
            entries["time_limit"] = written["default_time"]
        if "signal_lead" in written:
            entries["signal_lead"] = written["signal_lead"]
        if "default_partition" in written:
            partition = {"partition": written["default_partition"]}
            entries["slurm"] = MapNode(partition, where, "cluster", {"partition": where})
        return MapNode(entries, where, "cluster", dict.fromkeys(entries, where))

    @staticmethod
    def _profile_layer(profile: MapNode | None) -> MapNode:
        where = profile.where if profile else Location("profile")
        written = profile.entries if profile else {}
        entries: dict[str, Node] = {key: written[key] for key in ("resources", "time_limit") if key in written}
        return MapNode(entries, where, "profile", dict.fromkeys(entries, where))

    def _with_paths(self, spec: JobSpec) -> JobSpec:
        """Paths made absolute: a relative one starts at the job file's folder."""
        changes: dict[str, Any] = {
            "mounts": {os.path.expanduser(host): target for host, target in spec.mounts.items()},
            "origins": {_expanded_mount(key): origin for key, origin in spec.origins.items()},
        }
        if spec.data:
            train, eval_ = map(self._absolute_sources, (spec.data.train, spec.data.eval))
            changes["data"] = replace(spec.data, train=train, eval=eval_)
        if spec.evaluation.choices:
            choices = tuple(map(self._absolute, spec.evaluation.choices))
            changes["evaluation"] = replace(spec.evaluation, choices=choices)
        if spec.generation:
            changes["generation"] = replace(spec.generation, prompts=self._absolute(spec.generation.prompts))
        if spec.code:
            changes["code"] = self._absolute(spec.code)
        if spec.init_from:
            changes["init_from"] = self._absolute(spec.init_from)
        if spec.method and spec.method.init_from:
            changes["method"] = replace(spec.method, init_from=self._absolute(spec.method.init_from))
        return replace(spec, **changes)

    def _absolute_sources(self, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(replace(source, path=self._absolute(source.path)) for source in sources)

    def _absolute(self, source: str) -> str:
        if source.startswith("builtin:"):
            return source
        return str(self.path.absolute().parent / os.path.expanduser(source))

    def _tokenizer(self, name: str, tree: MapNode) -> str:
        if name == "bytes":
            return name
        found = self.catalogue.find("tokenizers", name)
        if found is None and "/" not in name and not name.endswith((".txt", ".json")):
            known = ["bytes", *self.catalogue.names("tokenizers")]
            hint = did_you_mean(name, known)
            what = (
                f"{quoted(name)} is not in configs/tokenizers{hint}; write {listed(known)},"
                " or the path of a vocab.txt, of a tokenizer.json or of ./a_folder with one"
            )
            self.reading.refuse(tree.entries["tokenizer"].where, "tokenizer", what)
        return str(found or self._absolute(name))


def _origins(node: MapNode | None, path: str = "") -> dict[str, Origin]:
    """Who wrote each value below `node`, by its dotted key."""
    return {key: Origin(leaf.set_by, leaf.where, written(leaf)) for key, leaf in leaves(node, path)} if node else {}


def _expanded_mount(key: str) -> str:
    """The dotted key of a mount as `mounts` names it once `~` is a path."""
    host = key.removeprefix("mounts.")
    return f"mounts.{os.path.expanduser(host)}" if host != key else key


def _base(node: Node | None) -> Node | None:
    return node.entries.get("base") if isinstance(node, MapNode) else node


def _is_left_out(node: Node | None) -> bool:
    return node is None or (isinstance(node, ScalarNode) and node.is_null)


def _scalar_text(node: Node | None) -> str | None:
    return node.text if isinstance(node, ScalarNode) and not node.is_null else None
