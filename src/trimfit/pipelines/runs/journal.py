"""A file of finished work that survives a kill: one line of JSON for each piece, on the disk before the next begins."""

import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from trimfit.checkpoints import is_disk_full
from trimfit.errors import InputError, RunError

FORMAT = 2


class Journal:
    """Records of one run, as a context manager; one process at a time.

    - `path`: the file, made with its folder when it is not there.

    Entering raises `InputError` when the journal is open in another process or its folder cannot be written. Each line
    has a checksum, so that what a disk has changed is noticed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path.with_suffix(".lock"))
        self._ends: list[int] = []  # of the lines that were there, in bytes

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is at work in {self.path.parent}; wait or choose another output"
            ) from None
        except OSError as error:
            if is_disk_full(error):
                raise RunError(f"the disk of {self.path.parent} is full; free space and run again") from error
            raise InputError(
                f"{self.path.parent} cannot be written: {error.strerror}; choose another output"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def open(self, identity: Mapping[str, Any], *, replace_empty: bool = False) -> list[dict[str, Any]]:
        """The records that are there already.

        `identity` is what must be the same for records to be comparable; it is the first line of a new journal. A last
        line that a kill cut short is dropped. Raises `InputError` when the journal is another run's, or damaged; with
        `replace_empty` a journal that has no records yet is begun again, whatever run it is of.
        """
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it will be read back
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        raw = whole.splitlines(keepends=True)
        lines = [self._parse(number, line) for number, line in enumerate(raw, start=1)]
        self._ends = list(itertools.accumulate(len(line) for line in raw))
        if replace_empty and len(lines) == 1:
            os.truncate(self.path, 0)
            lines, self._ends = [], []
        if not lines:
            self.append(identity)
            return []
        _check_same(self.path, lines[0], identity)
        return lines[1:]

    def kept(self) -> Iterator[dict[str, Any]]:
        """The records that another run would find now."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines[1:], start=2):
            try:
                yield self._parse(number, line)
            except InputError:  # cut short, or damaged
                return

    def forget(self, kept: int) -> None:
        """Drops all but the first so many of the records that were there when the journal was opened."""
        os.truncate(self.path, self._ends[kept])

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line and waits until it is on the disk. Raises `RunError` when the disk is full."""
        line = json.dumps({**record, _CHECKSUM: _checksum(record)}, allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise RunError(f"the disk of {self.path} is full; free space and run again to go on") from error

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record: object = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.pop(_CHECKSUM, None) != _checksum(record):
            raise InputError(f"{self.path}, line {number}, is damaged; remove the file to begin again")
        return record


_CHECKSUM = "crc32"
_MOST = 8  # differences that are told


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, allow_nan=False).encode()):08x}"


def _check_same(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, now = _flat(was), _flat(now)
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names:
        changes = ", ".join(
            f"{name} (was {_short(was.get(name))}, is {_short(now.get(name))})" for name in names[:_MOST]
        )
        changes += f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        raise InputError(
            f"{path} is of another run, which differs in {changes}; choose another output, or remove it to begin again"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """With those inside others by name, such as "calibration.samples"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{n}": v for n, v in _flat(value).items()} if isinstance(value, dict) else {name: value}
    return flat


def _short(value: object, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:12]}…"
