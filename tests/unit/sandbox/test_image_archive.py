"""An image archive is what `docker load` reads: a configuration, one layer, and a manifest that joins them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import pytest

from cpm_cluster.sandbox.image_archive import sha256_of, write_archive

CONFIG = {"Env": ["LANG=C.UTF-8"], "Cmd": ["python3"], "Labels": {"cpm.stand-in": "cpu"}}


@pytest.fixture
def archive(tmp_path):
    """Members of an archive of a small root file system, by name, and the id that was returned."""
    rootfs = tmp_path / "rootfs"
    for folder in ("usr/bin", "proc/1", "sys/fs", "dev"):
        (rootfs / folder).mkdir(parents=True)
    (rootfs / "bin").symlink_to("usr/bin")
    (rootfs / "usr/bin/tool").write_bytes(b"#!/bin/sh\n")
    (rootfs / "usr/bin/tool").chmod(0o755)
    os.utime(rootfs / "usr/bin/tool", (1_600_000_000, 1_600_000_000.25))
    (rootfs / "proc/1/stat").write_text("not of the image")
    (rootfs / "dev/null").write_text("")
    path = tmp_path / "image.tar"
    image_id = write_archive(rootfs, CONFIG, "name:1.0", path)
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    return members, image_id, path


def test_the_manifest_joins_tag_configuration_and_layer(archive):
    members, image_id, _ = archive
    (manifest,) = json.loads(members["manifest.json"])
    assert manifest["RepoTags"] == ["name:1.0"]
    assert manifest["Config"] == f"{image_id}.json"
    assert set(members) == {"manifest.json", manifest["Config"], *manifest["Layers"]}


def test_the_image_id_is_the_digest_of_the_configuration(archive):
    members, image_id, _ = archive
    assert hashlib.sha256(members[f"{image_id}.json"]).hexdigest() == image_id
    image = json.loads(members[f"{image_id}.json"])
    assert image["config"] == CONFIG
    assert image["os"] == "linux"


def test_the_configuration_names_the_layer_by_its_digest(archive):
    members, image_id, _ = archive
    (layer,) = (content for name, content in members.items() if name.endswith(".tar"))
    image = json.loads(members[f"{image_id}.json"])
    assert image["rootfs"] == {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}


def test_the_layer_holds_files_as_they_were_and_nothing_of_proc_sys_and_dev(archive):
    members, _, _ = archive
    (layer,) = (content for name, content in members.items() if name.endswith(".tar"))
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        found = {member.name: member for member in tar}
        assert tar.extractfile("usr/bin/tool").read() == b"#!/bin/sh\n"
    assert sorted(found) == ["bin", "dev", "proc", "sys", "usr", "usr/bin", "usr/bin/tool"]
    assert found["bin"].linkname == "usr/bin"
    assert found["usr/bin/tool"].mode == 0o755
    assert found["usr/bin/tool"].mtime == 1_600_000_000  # Python compares its bytecode with this


def test_the_digest_of_a_file_is_that_of_its_content(archive):
    _, _, path = archive
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
