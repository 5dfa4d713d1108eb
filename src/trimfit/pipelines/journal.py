"""A file of finished work that survives a kill: one line of JSON for each piece, on the disk before the next begins."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from trimfit.checkpoints import is_disk_full
from trimfit.errors import InputError, RunError

FORMAT = 1


class Journal:
    """Records of one run, as a context manager; one process at a time.

    - `path`: the file, made with its folder when it is not there.
    - `identity`: what must be the same for records to be comparable. It is the first line of a new journal.

    `records` are those that were there already. Entering raises `InputError` when the journal is another run's, open in
    another process, damaged, or cannot be written. A last line that a kill cut short is dropped.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self._identity = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it will be read back
        self._lock = FileLock(path.with_suffix(".lock"))
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another process is at work in {self.path.parent}; wait or choose another output"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.path.parent} cannot be written: {error.strerror}; choose another output"
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line and waits until it is on the disk. Raises `RunError` when the disk is full."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise RunError(f"the disk of {self.path} is full; free space and run again to go on") from error

    def _open(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        lines = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), start=1)]
        if not lines:
            self.append(self._identity)
            return
        _check_same(self.path, lines[0], self._identity)
        self.records = lines[1:]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record: object = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{self.path}, line {number}, is damaged; remove the file to begin again")
        return record


def _check_same(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} (was {_short(was.get(name))}, is {_short(now.get(name))})" for name in names)
        raise InputError(
            f"{path} is of another run, which differs in {changes}; choose another output, or remove it to begin again"
        )


def _short(value: object, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:12]}…"
