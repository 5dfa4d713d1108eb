"""A journal survives a kill at any byte, and is never another run's."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from trimfit import InputError, RunError
from trimfit.pipelines.runs.journal import Journal

IDENTITY = {"model": "a" * 64, "limit": None, "versions": {"torch": "2.13.0"}}
RECORDS: list[dict[str, Any]] = [{"cell": 1}, {"cell": 2, "text": "two\nlines, ü"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.open(IDENTITY) == []
        for record in RECORDS:
            journal.append(record)
    return path


def test_records_come_back(path: Path) -> None:
    with Journal(path) as journal:
        assert journal.open(IDENTITY) == RECORDS


def test_cut_anywhere_it_goes_on_with_what_is_whole(path: Path) -> None:
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    sizes = {*range(0, len(data), 9), *(end + by for end in (0, *ends) for by in (-1, 0, 1))}
    for size in sorted(sizes.intersection(range(len(data) + 1))):
        path.write_bytes(data[:size])
        with Journal(path) as journal:
            whole = max(0, sum(end <= size for end in ends) - 1)
            assert journal.open(IDENTITY) == RECORDS[:whole]
            journal.append({"cell": "next"})
        with Journal(path) as journal:
            assert journal.open(IDENTITY) == [*RECORDS[:whole], {"cell": "next"}]


def test_each_record_is_on_the_disk_before_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with Journal(path) as journal:
        journal.append({"cell": 3})
        assert synced == [path.stat().st_size]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "b" * 64}, "model (was aaaaaaaaaaaa…, is bbbbbbbbbbbb…)"),
        ({"limit": 5}, "limit (was None, is 5)"),
        (dict.fromkeys("abcdefghij", 1), ", ".join(f"{name} (was None, is 1)" for name in "abcdefgh") + " and 2 more"),
        ({"versions": {"torch": "2.14.0"}}, "versions.torch (was 2.13.0, is 2.14.0)"),
    ],
)
def test_another_run_is_refused_and_named(path: Path, change: dict[str, Any], named: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError) as caught, Journal(path) as journal:
        journal.open(IDENTITY | change)
    assert f"differs in {named}; choose another output" in str(caught.value)
    assert path.read_bytes() == before


def test_one_process_at_a_time(path: Path) -> None:
    with Journal(path), pytest.raises(InputError, match="another process is at work in"):
        Journal(path).__enter__()
    with Journal(path):
        pass


def test_damaged_in_the_middle(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\x00garbage", lines[2], b""]))
    with pytest.raises(InputError, match="line 2, is damaged"), Journal(path) as journal:
        journal.open(IDENTITY)


def test_any_flipped_bit_is_seen(path: Path) -> None:
    """Never a record that was not written: damaged, of another run, or a last line cut off."""
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with Journal(path) as journal, suppress(InputError):
            found = journal.open(IDENTITY)
            assert found == RECORDS[: len(found)]


def test_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(path) as journal:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="is full"):
            journal.append({"cell": 3})


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), Journal(tmp_path / "file" / "j.jsonl"):
        pass


def test_lines_are_plain_json(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("crc32") for line in lines)
    assert lines == [{"format": 2, **IDENTITY}, *RECORDS]
