"""From a job file and what it names to one JobSpec: job ← profile ← cluster defaults ← --set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cpm_cluster.specs.catalogue import Catalogue
from cpm_cluster.specs.checks import check_job
from cpm_cluster.specs.cluster import Cluster
from cpm_cluster.specs.fields import Invalid, Reading, Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import JobSpec, Origin
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.nodes import MapNode, Node, ScalarNode, leaves, merged, parse_value, read_yaml
from cpm_cluster.specs.problems import Location, Problem, SpecError, did_you_mean, quoted
from cpm_cluster.specs.profile import Profile

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
    for node in sets:
        job = merged(_expand_references(job, node), node)
    return _Composition(path, job, catalogue, detected_cluster, problems).compose()


def parse_override(text: str, problems: list[Problem]) -> MapNode | None:
    """`a.b=c` as the mapping {a: {b: c}}; c is YAML."""
    where = Location("--set " + text)
    path, equals, value = text.partition("=")
    if not equals or not path or not all(part.replace("_", "").replace("-", "").isalnum() for part in path.split(".")):
        problems.append(Problem(where, "", "write --set key.subkey=value"))
        return None
    node = parse_value(value.encode("utf-8", "surrogateescape"), where.file, "--set", problems)
    for part in reversed(path.split(".")):
        if node is not None:
            node = MapNode({part: node}, where, "--set", {part: where})
    return node if isinstance(node, MapNode) else None


def _expand_references(job: MapNode, override: MapNode) -> MapNode:
    """`model: x` becomes `model: {base: x}` where an override changes a part of it."""
    entries = dict(job.entries)
    for name in ("model", "image"):
        below, above = entries.get(name), override.entries.get(name)
        if isinstance(below, ScalarNode) and isinstance(above, MapNode) and "base" not in above.entries:
            entries[name] = MapNode({"base": below}, below.where, below.set_by, {"base": below.where})
    return replace(job, entries=entries)


class _Composition:
    """One job on its way through lookup, merging and checking."""

    def __init__(
        self, path: Path, job: MapNode, catalogue: Catalogue, detected_cluster: str, problems: list[Problem]
    ) -> None:
        self.path, self.job, self.catalogue, self.problems = path, job, catalogue, problems
        self.beside = path.absolute().parent
        if "cluster" not in job.entries:
            detected = ScalarNode(detected_cluster, True, Location("detected"), "detected")
            self.job = replace(job, entries=job.entries | {"cluster": detected})

    def compose(self) -> JobSpec:
        cluster_node, cluster = self._named("cluster", "clusters", Cluster)
        profile_node, profile = self._named("profile", "profiles", Profile)
        tree = merged(merged(self._cluster_defaults(cluster_node), self._profile_layer(profile_node)), self.job)
        spec = self._read(tree)
        model, image = self._reference("model", "models", Model, tree), self._reference("image", "images", Image, tree)
        gpu = self._gpu(tree, cluster, cluster_node)
        if spec is not None and cluster is not None:
            spec = replace(
                spec,
                cluster=cluster,
                model=model,
                image=image,
                gpu=gpu,
                model_name=_scalar_text(self._base(tree.entries.get("model"))) or ("inline" if model else None),
                cluster_name=_scalar_text(tree.entries.get("cluster")) or "",
                origins={path: Origin(node.set_by, node.where) for path, node in leaves(tree)},
                warnings=(profile.warning,) if profile and profile.warning else (),
            )
            spec = check_job(self._with_paths(spec), tree, self.problems)
        if self.problems or spec is None:
            raise SpecError(self.problems)
        return spec

    def _read(self, tree: MapNode) -> JobSpec | None:
        try:
            Section(JobSpec).values(self.job, "", Reading(self.problems, partial=True))
        except Invalid:
            pass
        try:
            spec: JobSpec = Section(JobSpec).read(tree, "", Reading(self.problems))
        except Invalid:
            return None
        return spec

    def _named(self, key: str, kind: str, spec: type[Spec]) -> tuple[MapNode | None, Spec | None]:
        """The config that the job names under `key`, as written and as read."""
        name = self.job.entries.get(key)
        if not isinstance(name, ScalarNode) or name.is_null:
            return None, None
        node = self.catalogue.load(kind, name, key, self.beside, self.problems)
        return node, self._section(node, spec) if node else None

    def _section(self, node: MapNode, spec: type[Spec], path: str = "") -> Spec | None:
        try:
            read: Spec = Section(spec).read(node, path, Reading(self.problems))
        except Invalid:
            return None
        return read

    def _reference(self, key: str, kind: str, spec: type[Spec], tree: MapNode) -> Spec | None:
        """A model or an image: a name, a path, a mapping, or a mapping over a base."""
        node = tree.entries.get(key)
        if node is None or (isinstance(node, ScalarNode) and node.is_null):
            return None
        base = self._base(node)
        written: MapNode | None = None
        if isinstance(base, ScalarNode):
            written = self.catalogue.load(kind, base, key, self.beside, self.problems)
            if written is None:
                return None
        if isinstance(node, MapNode):
            changes = replace(node, entries={k: v for k, v in node.entries.items() if k != "base"})
            if written is None:
                return self._section(changes, spec, key)
            written = merged(written, changes)
        return self._section(written, spec) if written else None

    @staticmethod
    def _base(node: Node | None) -> Node | None:
        return node.entries.get("base") if isinstance(node, MapNode) else node

    def _gpu(self, tree: MapNode, cluster: Cluster | None, cluster_node: MapNode | None) -> Gpu | None:
        resources = tree.entries.get("resources")
        node = resources.entries.get("gpu") if isinstance(resources, MapNode) else None
        if node is None and cluster_node is not None:
            node = cluster_node.entries.get("gpu")
        if not isinstance(node, ScalarNode) or node.is_null:
            return None
        known = self.catalogue.gpus(self.problems)
        entry = known.get(node.text)
        if not isinstance(entry, MapNode):
            hint = did_you_mean(node.text, known) or f"; known: {', '.join(known)}"
            self.problems.append(
                Problem(node.where, "resources.gpu", f"{quoted(node.text)} is not in configs/gpus.yaml{hint}")
            )
            return None
        return self._section(entry, Gpu, node.text)

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
            "mounts": {str(Path(host).expanduser()): target for host, target in spec.mounts.items()},
            "tokenizer": self._tokenizer(spec.tokenizer),
        }
        if spec.data:
            changes["data"] = replace(
                spec.data, train=self._absolute(spec.data.train), eval=self._absolute(spec.data.eval)
            )
        if spec.code:
            changes["code"] = self._absolute((spec.code,))[0]
        if spec.init_from:
            changes["init_from"] = self._absolute((spec.init_from,))[0]
        return replace(spec, **changes)

    def _absolute(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            source if source.startswith("builtin:") else str(self.beside / Path(source).expanduser())
            for source in sources
        )

    def _tokenizer(self, name: str) -> str:
        if name == "bytes":
            return name
        found = self.catalogue.find("tokenizers", name)
        if found is None and "/" not in name and not name.endswith(".txt"):
            known = ["bytes", *self.catalogue.names("tokenizers")]
            node = self.job.entries.get("tokenizer")
            self.problems.append(
                Problem(
                    node.where if node else Location(str(self.path)),
                    "tokenizer",
                    f"{quoted(name)} is not in configs/tokenizers{did_you_mean(name, known)}; write {', '.join(known)}"
                    " or the path of a vocab.txt",
                )
            )
        return str(found or self._absolute((name,))[0])


def _scalar_text(node: Node | None) -> str | None:
    return node.text if isinstance(node, ScalarNode) and not node.is_null else None
