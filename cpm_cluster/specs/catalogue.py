"""Where named configs are found: the user's own before those that ship with the package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cpm_cluster.specs.nodes import MapNode, Node, ScalarNode, read_yaml
from cpm_cluster.specs.problems import Problem, did_you_mean, listed, quoted, shortened

SUFFIX = {"tokenizers": ".txt"}


@dataclass(frozen=True)
class Catalogue:
    """Config folders, the first wins; each holds profiles/, clusters/, models/, images/, tokenizers/, gpus.yaml.

    The last is what ships with the package; before it, `image_folder` (see `beside_archives`) may describe images.
    """

    folders: tuple[Path, ...]
    image_folder: Path | None = None
    shipped_images_first: bool = False

    def beside_archives(self, image_folder: str | None) -> Catalogue:
        """The same with the files that a cluster keeps beside its image archives: NAME.yaml of NAME.tar."""
        return replace(self, image_folder=Path(image_folder) if image_folder else None)

    def without_stand_ins(self) -> Catalogue:
        """The same where an image that ships with the package is described as it is published, whoever changed that."""
        return replace(self, shipped_images_first=True)

    def find(self, kind: str, name: str) -> Path | None:
        """The file of a named config; an image's name has `-` for `:` and `/` in its file."""
        stem = name.replace(":", "-").replace("/", "-") if kind == "images" else name
        if "/" in stem:
            return None
        candidates = (folder / (stem + SUFFIX.get(kind, ".yaml")) for folder in self._places(kind))
        return next((path for path in candidates if os.path.isfile(path)), None)  # Path.is_file raises on long names

    def names(self, kind: str) -> list[str]:
        suffix = SUFFIX.get(kind, ".yaml")
        return sorted({path.name.removesuffix(suffix) for f in self._places(kind) for path in f.glob("*" + suffix)})

    def _places(self, kind: str) -> list[Path]:
        """The folders of one kind of config, the first wins."""
        *own, shipped = (folder / kind for folder in self.folders)
        if kind != "images":
            return [*own, shipped]
        beside = [self.image_folder] if self.image_folder else []
        return [shipped, *own, *beside] if self.shipped_images_first else [*own, *beside, shipped]

    def load(self, kind: str, name: ScalarNode, key: str, beside: Path, problems: list[Problem]) -> MapNode | None:
        """The config that a job file names, or the path that it gives (relative to `beside`)."""
        set_by = kind.removesuffix("s")
        if name.text.endswith((".yaml", ".yml")) or name.text.startswith(("/", "./", "../", "~")):
            path = Path(os.path.normpath(beside / os.path.expanduser(name.text)))
            if os.path.isfile(path):
                return read_yaml(path, set_by, problems)
            problems.append(Problem(name.where, key, f"there is no file {shortened(str(path), 200)}"))
            return None
        found = self.find(kind, name.text)
        if found is None:
            known = self.names(kind)
            most = 3 if kind == "models" else 1  # the nearest to a 10b may be a 100b
            hint = did_you_mean(name.text.replace(":", "-"), known, most) or f"; known here: {listed(known)}"
            problems.append(Problem(name.where, key, f"{quoted(name.text)} is not in configs/{kind}{hint}"))
            return None
        return read_yaml(found, set_by, problems, shown_as=self.shown(found))

    def gpus(self, problems: list[Problem]) -> Mapping[str, Node]:
        """All entries of the gpus.yaml files, the first file winning by name."""
        entries: dict[str, Node] = {}
        for folder in reversed(self.folders):
            path = folder / "gpus.yaml"
            if path.is_file():
                node = read_yaml(path, "gpus", problems, shown_as=self.shown(path))
                entries.update(node.entries if node else {})
        return entries

    def shown(self, path: Path) -> str:
        """A path as messages show it: short, where it is a packaged file."""
        for folder in self.folders:
            if path.is_relative_to(folder) and folder.name == "configs":
                return str(Path("configs") / path.relative_to(folder))
        return str(path)


def packaged_configs() -> Path:
    """The folder of the configs that ship with cpm-cluster."""
    return _packaged("configs")


def packaged_jobs() -> Path:
    """The folder of the job files that ship with cpm-cluster."""
    return _packaged("jobs")


def _packaged(name: str) -> Path:
    """A data folder: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def default_catalogue(working_folder: Path, config_home: Path) -> Catalogue:
    """./configs, then ~/.config/cpm-cluster, then what ships with the package."""
    return Catalogue((working_folder / "configs", config_home / "cpm-cluster", packaged_configs()))
