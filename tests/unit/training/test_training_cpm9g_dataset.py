"""CPM-9G's binary datasets, as OpenBMB's ``distributed_dataset.py`` describes them, written here by hand."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_cluster.training.data.corpus import Row
from cpm_cluster.training.data.cpm9g_dataset import list_blocks
from cpm_cluster.training.data.token_index import Ranks, open_samples
from cpm_cluster.training.data.tokenizer import load_tokenizer
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement

BYTES = load_tokenizer("bytes")
BLOCK = 256
ROWS = [{"input": "who?" * (number % 3), "output": f"number {number}"} for number in range(20)]


class Runs:
    """A pickle of this leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def record(value: object, protocol: int = 4) -> bytes:
    payload = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    return b"\x1f" + struct.pack("<I", len(payload)) + payload


def write_dataset(folder: Path, files: dict[str, list], size: int = BLOCK, **described: object) -> Path:
    """Write a dataset: records fill a block while they and its end fit, the rest of it is zero."""
    folder.mkdir(exist_ok=True)
    lines, end = [], 0
    for name, values in files.items():
        blocks = [b""]
        for part in map(record, values):
            if len(blocks[-1]) + len(part) + 1 > size:
                blocks.append(b"")
            blocks[-1] += part
        (folder / name).write_bytes(b"".join(block.ljust(size, b"\0") for block in blocks))
        begin, end = end, end + len(blocks)
        meta = {"file_name": name, "block_begin": begin, "block_end": end, "nbytes": 0, "nlines": len(values)}
        lines.append(json.dumps({**meta, "mask": False, "block_size": size, **described}) + "\n")
    (folder / "meta.bin").write_text("".join(lines))
    return folder


def read(folder: Path) -> list:
    problems: list[str] = []
    parts = list_blocks(str(folder), problems)
    assert problems == []
    return [row for part in parts for row in part.read()]


def problem_of(folder: Path) -> str:
    """Return the one problem, of the description or of a record."""
    problems: list[str] = []
    parts = list_blocks(str(folder), problems)
    wrong = [
        f"{part.place(number, 0)}: {row}"
        for part in parts
        for number, row in enumerate(part.read(), 1)
        if isinstance(row, str)
    ]
    (problem,) = problems + wrong
    return problem


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30), st.integers(0, 5))
def test_all_rows_come_in_order_from_all_blocks(tmp_path_factory, texts, protocol):
    folder = tmp_path_factory.mktemp("cpm9g")
    values = [pickle.dumps({"input": "", "output": text}, protocol) for text in texts]

    write_dataset(folder, {"data": values, "more": values[:3]}, size=300)

    assert read(folder) == [Row("", text) for text in [*texts, *texts[:3]]]


def test_blocks_are_the_parts_that_ranks_share(tmp_path):
    parts = list_blocks(str(write_dataset(tmp_path, {"data": ROWS})), [])

    assert len(parts) == (tmp_path / "data").stat().st_size // BLOCK > 3
    assert {part.nbytes for part in parts} == {BLOCK}
    assert len({part.identity for part in parts}) == len(parts)


def test_masked_files_are_not_used(tmp_path):
    write_dataset(tmp_path, {"data": ROWS, "old": ROWS})
    first, second = (tmp_path / "meta.bin").read_text().splitlines()
    (tmp_path / "meta.bin").write_text(first + "\n" + second.replace("false", "true") + "\n")
    (tmp_path / "old").unlink()

    assert len(read(tmp_path)) == len(ROWS)


@pytest.mark.parametrize("hostile", ["reduce", "numpy", "class"])
def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path, hostile):
    trap = tmp_path / "trap"
    value = {"reduce": Runs(trap), "numpy": np.arange(3), "class": {"input": "", "output": Path("x")}}[hostile]

    problem = problem_of(write_dataset(tmp_path / "set", {"data": [ROWS[0], value]}))

    assert f"{tmp_path}/set/data: block 0, record 2: is not a pickle of plain values: it names " in problem
    assert "a row needs no code" in problem
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"input": "x"}, 'has no "output"'),
        (["input", "output"], "is not an object"),
        (b"garbage", "is not a pickle of plain values"),
        (b"", "is not a pickle of plain values"),
        (b"\x80\x04", "is not a pickle of plain values"),
    ],
)
def test_a_wrong_row_is_named_by_file_block_and_record(tmp_path, value, says):
    problem = problem_of(write_dataset(tmp_path, {"data": [*ROWS[:2], value]}))

    assert problem.startswith(f"{tmp_path}/data: block 0, record 3: {says}")


@given(st.binary(max_size=BLOCK))
@settings(max_examples=60, deadline=None)
def test_no_bytes_whatever_end_the_program(tmp_path_factory, content):
    folder = write_dataset(tmp_path_factory.mktemp("cpm9g"), {"data": ROWS[:1]})
    (folder / "data").write_bytes(content.ljust(BLOCK, b"\xff"))

    for part in list_blocks(str(folder), []):
        assert all(isinstance(row, (Row, str)) for row in part.read())


def test_a_block_without_an_end_is_noticed(tmp_path):
    folder = write_dataset(tmp_path, {"data": ROWS[:1]})
    content = (folder / "data").read_bytes()

    (folder / "data").write_bytes(content.rstrip(b"\0").ljust(BLOCK, b"\x1f"))
    assert "block 0, record 2: is no record: it starts with byte 0x1F and claims 522133279 bytes" in problem_of(folder)
    (folder / "data").write_bytes(content.rstrip(b"\0").ljust(BLOCK, b"\x07"))
    assert "starts with byte 0x07" in problem_of(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_end": 9}, "data: has {size} bytes, not 9 blocks of 256"),
        ({"block_end": 0}, "meta.bin:1: block_end or block_size is out of range"),
        ({"block_size": 1 << 40}, "meta.bin:1: block_end or block_size is out of range"),
        ({"block_begin": 1}, "meta.bin:1: block_begin is not 0, where the file before ends"),
        ({"file_name": "../data"}, 'meta.bin:1: "file_name" is not the name of a file in this folder'),
        ({"file_name": "absent"}, "absent: cannot be read: No such file"),
        ({"mask": 0}, 'meta.bin:1: "mask" is missing or of the wrong type'),
        ({"mask": True}, "meta.bin: names no data"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, change, says):
    folder = write_dataset(tmp_path, {"data": ROWS}, **change)

    assert says.format(size=(folder / "data").stat().st_size) in problem_of(folder)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "meta.bin:1: is not JSON"), ("[]", "meta.bin:1: is not an object"), ("", "names no data")]
)
def test_a_broken_description_is_refused(tmp_path, text, says):
    write_dataset(tmp_path, {"data": ROWS})
    (tmp_path / "meta.bin").write_text(text)

    assert says in problem_of(tmp_path)
    (tmp_path / "meta.bin").unlink()
    assert "meta.bin: cannot be read: No such file" in problem_of(tmp_path)


def test_training_reads_it_with_trust_alone(tmp_path, tiny_settings):
    folder = write_dataset(tmp_path / "set", {"data": ROWS})
    changes = {
        "output_dir": str(tmp_path / "run"),
        "data.train": [{"path": str(folder), "weight": None}],
        "data.format": "cpm9g",
    }

    def opened(trusted: bool):
        parsed = tiny_settings(**changes, **{"data.trust_pickle": trusted})
        ranks = Ranks(Placement(0, 1, 0), lambda value: [value], lambda done, of: None, lambda: False)
        return open_samples(parsed, "train", BYTES, ranks)

    with pytest.raises(UserError, match="data.trust_pickle: true if you trust the files"):
        opened(False)
    samples = opened(True)
    assert [BYTES.decode(samples[number].ids).split("<AI>")[-1] for number in range(len(samples))] == [
        row["output"] for row in ROWS
    ]
