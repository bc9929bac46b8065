"""The CPU stand-in: when its archive counts as there, and what the catalogue says of it."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import yaml

from cpm_cluster.runs.records import write_json
from cpm_cluster.sandbox import image
from cpm_cluster.sandbox.image import Manifest
from cpm_cluster.sandbox.state import Sandbox
from cpm_cluster.specs.catalogue import packaged_configs

TAG = "cpmlive-flash:0.0.4"
CONTENT = b"an archive"
SOFTWARE = {"python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.4.6", "debian": "12.15"}
MANIFEST = Manifest(
    tag=TAG,
    image_id="sha256:" + "1" * 64,
    file="cpmlive-flash-0.0.4.tar",
    bytes=len(CONTENT),
    sha256="2" * 64,
    stand_in="cpu",
    software=SOFTWARE,
    recipe="3" * 64,
)


@pytest.fixture
def state(tmp_path):
    """A sandbox whose image is there."""
    state = Sandbox(root=tmp_path)
    image.folder(state).mkdir()
    image.archive(state, MANIFEST).write_bytes(CONTENT)
    write_json(image.folder(state) / "cpmlive-flash-0.0.4.json", asdict(MANIFEST))
    return state


def test_an_archive_with_its_manifest_is_there(state):
    assert image.read_manifest(state) == MANIFEST


@pytest.mark.parametrize("content", [b"an arch", b""])
def test_a_truncated_archive_is_not(state, content):
    image.archive(state, MANIFEST).write_bytes(content)
    assert image.read_manifest(state) is None


def test_nor_is_one_without_archive_or_manifest(state):
    image.archive(state, MANIFEST).unlink()
    assert image.read_manifest(state) is None
    assert image.read_manifest(Sandbox(root=state.root / "elsewhere")) is None


@pytest.mark.parametrize("record", [{"tag": TAG}, {**asdict(MANIFEST), "unknown": 1}])
def test_a_manifest_of_another_version_of_the_program_does_not_count(state, record):
    write_json(image.folder(state) / "cpmlive-flash-0.0.4.json", record)
    assert image.read_manifest(state) is None


def test_the_catalogue_entry_has_the_name_of_what_it_stands_for_and_no_gpu():
    entry = yaml.safe_load(image.catalogue_entry(MANIFEST))
    packaged = yaml.safe_load((packaged_configs() / "images" / "cpmlive-flash-0.0.4.yaml").read_text())
    assert entry["tag"] == packaged["tag"]
    assert entry["archive"]["file"] == packaged["archive"]["file"]
    assert entry["gpu"] is False


def test_the_catalogue_entry_tells_a_broken_archive():
    archive = yaml.safe_load(image.catalogue_entry(MANIFEST))["archive"]
    assert archive == {"file": MANIFEST.file, "bytes": MANIFEST.bytes, "sha256": MANIFEST.sha256}


def test_the_catalogue_entry_lists_the_software_of_the_manifest():
    other = replace(MANIFEST, software={**SOFTWARE, "torch": "2.14.0+cpu"})
    entry = yaml.safe_load(image.catalogue_entry(other))
    assert (entry["python"], entry["torch"]) == ("3.11.2", "2.14.0+cpu")
    assert entry["packages"] == {"numpy": "2.4.6", "debian": "12.15"}
