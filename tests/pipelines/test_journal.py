"""A journal survives a kill at any byte, and is never another run's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trimfit import InputError, RunError
from trimfit.pipelines.journal import Journal

IDENTITY = {"model": "a" * 64, "limit": None, "versions": {"torch": "2.13.0"}}
RECORDS: list[dict[str, Any]] = [{"cell": 1}, {"cell": 2, "text": "two\nlines, ü"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        assert journal.records == []
        for record in RECORDS:
            journal.append(record)
    return path


def test_records_come_back(path: Path) -> None:
    with Journal(path, IDENTITY) as journal:
        assert journal.records == RECORDS


def test_cut_anywhere_it_goes_on_with_what_is_whole(path: Path) -> None:
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    sizes = {*range(0, len(data), 9), *(end + by for end in (0, *ends) for by in (-1, 0, 1))}
    for size in sorted(sizes.intersection(range(len(data) + 1))):
        path.write_bytes(data[:size])
        with Journal(path, IDENTITY) as journal:
            whole = max(0, sum(end <= size for end in ends) - 1)
            assert journal.records == RECORDS[:whole]
            journal.append({"cell": "next"})
        with Journal(path, IDENTITY) as journal:
            assert journal.records == [*RECORDS[:whole], {"cell": "next"}]


def test_each_record_is_on_the_disk_before_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with Journal(path, IDENTITY) as journal:
        journal.append({"cell": 3})
        assert synced == [path.stat().st_size]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "b" * 64}, "model (was aaaaaaaaaaaa…, is bbbbbbbbbbbb…)"),
        ({"limit": 5}, "limit (was None, is 5)"),
        ({"versions": {"torch": "2.14.0"}}, "versions (was {'torch': '2.13.0'}, is {'torch': '2.14.0'})"),
    ],
)
def test_another_run_is_refused_and_named(path: Path, change: dict[str, Any], named: str) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError) as caught, Journal(path, IDENTITY | change):
        pass
    assert f"differs in {named}; choose another output" in str(caught.value)
    assert path.read_bytes() == before


def test_one_process_at_a_time(path: Path) -> None:
    with Journal(path, IDENTITY), pytest.raises(InputError, match="another process is at work in"):
        Journal(path, IDENTITY).__enter__()
    with Journal(path, IDENTITY):
        pass


def test_damaged_in_the_middle(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\x00garbage", lines[2], b""]))
    with pytest.raises(InputError, match="line 2, is damaged"), Journal(path, IDENTITY):
        pass


def test_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(path, IDENTITY) as journal:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="is full"):
            journal.append({"cell": 3})


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), Journal(tmp_path / "file" / "j.jsonl", IDENTITY):
        pass


def test_lines_are_plain_json(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"format": 1, **IDENTITY}, *RECORDS]
