"""Records are whole or absent; event logs survive whoever is killed while writing."""

from __future__ import annotations

import json
import os
import stat

import pytest

from cpm_cluster.runs.records import append_event, read_events, read_json, read_lines, write_json, write_text


def test_a_record_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new folder" / "record.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    assert os.listdir(path.parent) == ["record.json"]


def test_the_old_content_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["record.json"]


def test_what_is_no_json_is_refused_before_anything_is_touched(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_the_mode_of_a_file(tmp_path):
    write_text(tmp_path / "secret", "x", 0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", '{"a": 1', "[1]", "null", "\x00"])
def test_what_is_no_object_reads_as_nothing(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    assert read_json(tmp_path / "record.json") is None
    assert read_json(tmp_path / "absent.json") is None


def test_events_of_all_writers_in_the_order_of_time(tmp_path):
    for writer, kind in (("n2", "a"), ("n1", "b"), ("n2", "c")):
        append_event(tmp_path / "events" / f"{writer}.jsonl", kind, attempt=1)
    found = read_events(tmp_path / "events")
    assert [(event["writer"], event["kind"]) for event in found] == [("n2", "a"), ("n1", "b"), ("n2", "c")]
    assert read_events(tmp_path / "nowhere") == []


def test_a_torn_line_is_left_out_and_the_next_event_is_not(tmp_path):
    path = tmp_path / "n1.jsonl"
    append_event(path, "first")
    with path.open("a") as file:
        file.write('{"time": 5, "kind": "to')
    append_event(path, "third")
    assert [event["kind"] for event in read_events(tmp_path)] == ["first", "third"]


def test_a_message_with_any_separator_of_lines_is_one_event(tmp_path):
    message = "one\ntwo\u2028three\x85four\x0cfive\rsix"
    append_event(tmp_path / "n1.jsonl", "error", message=message)
    (event,) = read_events(tmp_path)
    assert event["message"] == message


def test_lines_that_are_no_events(tmp_path):
    (tmp_path / "n1.jsonl").write_text('[]\n{"kind": "x"}\n{"time": "now", "kind": "x"}\n{"time": 1}\n\n\xff\n')
    assert read_events(tmp_path) == []
    assert read_lines(tmp_path / "n1.jsonl")[0] == {"kind": "x"}
    assert read_lines(tmp_path / "absent.jsonl") == []
