"""OUT.run: what is finished of a run, on the disk beside OUT until that is whole."""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimfit.calibration import SelfSample
from trimfit.checkpoints import is_disk_full, rename_durably, write_durably
from trimfit.checkpoints.atomic import old_beside, put_back
from trimfit.checkpoints.patch import Checksums
from trimfit.checkpoints.shards import tensor_checksum
from trimfit.errors import InputError, RunError
from trimfit.pipelines.runs.journal import Journal
from trimfit.pipelines.windows import digest

log = logging.getLogger(__name__)

REQUEST = "run.json"
_JOURNAL = "journal.jsonl"
_WINDOWS = "windows.safetensors"
_RESULT = "result"
_WHOLE = "whole"
_MARKS = (_JOURNAL, Path(_JOURNAL).with_suffix(".lock").name, REQUEST)  # removed in this order
_LEFT_OVER = ("states-*", "*.tmp", ".tmp??????")  # by a run that was killed; the last is safetensors' own, then renamed
_OLD = tuple(old_beside(Path(name)).name for name in (_RESULT, _WHOLE))  # outputs, while they are replaced
_OURS = (*_MARKS, *_LEFT_OVER, *_OLD, _WINDOWS, _RESULT, _WHOLE, "part-*.safetensors")


def run_path(out: Path) -> Path:
    """Where the run that writes `out` keeps what is finished."""
    return out.with_name(f"{out.name}.run")


def check_run_path(out: Path) -> None:
    """Raises `InputError` when something else than a run is there."""
    path = run_path(out)
    if path.exists() and not _is_run(path):
        raise InputError(f"{path} is in the way: it is not the directory of a run; choose another output")


@dataclass(frozen=True)
class Part:
    """Something that is finished: tensors in a file, and what is recorded of it, as JSON.

    `file` is None when the tensors were put into the result.
    """

    file: Path | None
    record: Any

    def tensors(self) -> dict[str, Tensor]:
        """By their names, on the CPU, mapped from the file."""
        assert self.file is not None
        return load_file(self.file)


class RunDirectory:
    """Parts, notes and windows of a run that writes `out`, as a context manager; one process at a time.

    - `out`: the directory to write in the end; the run directory is `out` with `.run` behind it.
    - `request`: what was asked for, so that `trimfit resume` can ask again.

    `parts` are what is finished, by their keys, in the order in which they were kept; `notes` what was noted, by name;
    `in_result` the checksums of tensors in files of the result; `seconds` those that earlier runs have spent on the
    parts; `threads` the number that the run began with. What is in them is for those who keep it to know.

    The directory is removed when the context ends well, and when nothing is finished that another run could use.
    Otherwise the error gets a note that says where what is finished lies. Raises `InputError` for a directory of
    something else, and one that another process works in.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]):
        self.path = run_path(out)
        self.id = uuid.uuid4().hex
        self.seconds = 0.0
        self.threads = torch.get_num_threads()
        self.parts: dict[tuple[str, ...], Part] = {}
        self.notes: dict[str, Any] = {}
        self.in_result: dict[str, dict[str, str]] = {}
        self._out, self._request = out, request
        self._journal = Journal(self.path / _JOURNAL)
        self._kept = 0  # parts, also those that were kept again
        self._windows: dict[str, Any] | None = None
        self._is_new = not self._journal.path.exists() and not (self.path / REQUEST).exists()
        self._opened = False

    @property
    def result(self) -> Path:
        """Where to put the output together, block by block."""
        return self.path / _RESULT

    @property
    def whole(self) -> Path:
        """Where to write the output as a whole, while something is in `result`."""
        return self.path / _WHOLE

    @property
    def written(self) -> int:
        """Bytes of what earlier runs have left that can be used."""
        files = (file for file in self.path.rglob("*") if not any(file.match(name) for name in _LEFT_OVER))
        return sum(file.stat().st_size for file in files if file.is_file())

    def __enter__(self) -> Self:
        check_run_path(self._out)
        self._journal.__enter__()
        for beside in (self.result, self.whole):
            put_back(beside, self._out)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            keep = self._is_useful if self._opened else not self._is_new  # another run is left as it is
            if error is None or not keep:
                _remove(self.path)
            elif self._opened:
                error.add_note(
                    f"what is finished is in {self.path}: the same command, or trimfit resume {self._out}, goes on"
                )
        finally:
            self._journal.__exit__()

    @property
    def _is_useful(self) -> bool:
        """Whether anything is kept that took its time. The journal tells: a signal may come right after its line."""
        return any("part" in one or one.get("sample") or one.get("costly") for one in self._journal.kept())

    def open(self, identity: Mapping[str, Any]) -> None:
        """Reads what is finished. What is damaged is dropped with all that came after it, and the log says so.

        `identity` is what must be the same. Raises `InputError` when what is there is of another run.
        """
        for name in _LEFT_OVER:
            for file in self.path.glob(name):
                file.unlink()
        records = self._journal.open(identity)
        if not records:
            self._journal.append({"run": self.id, "threads": self.threads})
        moved = {tuple(key): record for record in records if "moved" in record for key in record["moved"]}
        for number, record in enumerate(records):
            try:
                whole = self._take(record, moved)
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"{self._journal.path} is of another trimfit; remove {self.path} to begin again"
                ) from error
            if not whole:
                gone = "part" in record and tuple(record["part"]) in moved
                damaged = self.result if gone else self.path / record["file"]
                log.warning("%s is damaged: it is done again, and what came after it", damaged)
                self._journal.forget(number)
                break
        self._clear_result()
        request = {"run": self.id, "directory": str(Path.cwd()), **self._request}
        write_durably(self.path / REQUEST, json.dumps(request, indent=1).encode())
        self._opened = True

    def windows(
        self, draw: Callable[[SelfSample | None], tuple[Tensor, SelfSample | None]]
    ) -> tuple[Tensor, SelfSample | None]:
        """The calibration windows (N, L): those that the model itself wrote are kept, all are checked.

        `draw` is given what the model has written already, if it has.
        """
        kept = self._windows
        written = None
        if kept is not None and kept["sample"] is not None:
            written = SelfSample(windows=load_file(self.path / _WINDOWS)["windows"], **kept["sample"])
        windows, sample = draw(written)
        if kept is None:
            record: dict[str, Any] = {"tokens": digest(windows), "sample": sample.record() if sample else None}
            if sample is not None:
                record |= self._write(_WINDOWS, {"windows": sample.windows})
            self._journal.append(record)
            self._windows = record
        elif digest(windows) != kept["tokens"]:
            self._opened = False  # it is another run's
            raise InputError(
                f"the calibration windows are not those with which the run in {self.path} began, so their text has "
                "changed; remove that directory to begin again"
            )
        return windows, sample

    def note(self, name: str, value: Any, *, costly: bool) -> None:
        """Keeps something small, JSON; `costly` if it took so long that the run directory should stay for it."""
        record = {"note": name, "value": value, "costly": costly}
        self._journal.append(record)
        self._take(record, {})

    def keep(self, key: Sequence[str], tensors: Mapping[str, Tensor], record: Any, seconds: float) -> None:
        """Writes the tensors of a part, waits until they are on the disk, and only then says so.

        `record`: JSON. `seconds`: that have passed since the run began, earlier ones included.
        """
        written = self._write(
            f"part-{self._kept:05d}.safetensors",
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        )
        self._journal.append({"part": list(key), "record": record, "seconds": seconds, **written})
        self.parts[tuple(key)] = Part(self.path / written["file"], record)
        self._kept += 1

    def move(self, keys: Iterable[tuple[str, ...]], checksums: Checksums) -> None:
        """Says that tensors of parts are in files of the result, on the disk, and removes the files of the parts.

        `checksums` are those of what was written for them. Parts are moved once.
        """
        keys = list(keys)
        record = {"moved": keys, "checksums": checksums}
        self._journal.append(record)
        for key in keys:
            file = self.parts[key].file
            self.parts[key] = Part(None, self.parts[key].record)
            if file is not None:
                file.unlink()
        self._take(record, {})

    def _take(self, record: dict[str, Any], moved: Mapping[tuple[str, ...], dict[str, Any]]) -> bool:
        """Whether a record stands for something that is there. `moved`: records that tell where parts have gone."""
        if "part" in record and (gone := moved.get(tuple(record["part"]))):
            record = record | {"file": None}
            if not self._is_in_result(gone):
                return False
        elif "file" in record and not _is_whole(self.path / record["file"], record["sha256"]):
            return False
        if "run" in record:
            self.id, self.threads = record["run"], record["threads"]
        elif "tokens" in record:
            self._windows = record
        elif "note" in record:
            self.notes[record["note"]] = record["value"]
        elif "moved" in record:
            for file, tensors in record["checksums"].items():
                self.in_result.setdefault(file, {}).update(tensors)
        else:
            file = record["file"]
            self.parts[tuple(record["part"])] = Part(file and self.path / file, record["record"])
            self._kept += 1
            self.seconds = record["seconds"]
        return True

    def _clear_result(self) -> None:
        """Removes what no record tells of from the result: another run's files, and damaged ones, are copied anew."""
        for path in self.result.glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.in_result:
                path.unlink()

    def _is_in_result(self, record: dict[str, Any]) -> bool:
        """Whether what a record says was moved there is whole; looked at once."""
        if "whole" not in record:
            record["whole"] = all(_holds(self.result / file, tensors) for file, tensors in record["checksums"].items())
        return record["whole"]

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Name and checksum of a file, once it is on the disk."""
        beside = self.path / f"{name}.tmp"
        try:
            save_file(tensors, beside, {"format": "pt"})  # which transformers asks of a file of a result
            written = {"file": name, "sha256": _checksum(beside)}
            rename_durably(beside, self.path / name)
        except Exception as error:
            if is_disk_full(error):
                raise RunError(f"the disk of {self.path} is full; free space there") from error
            raise
        return written


def _is_run(path: Path) -> bool:
    """Whether a directory holds what runs leave behind, and nothing else."""
    return path.is_dir() and all(any(inner.match(name) for name in _OURS) for inner in path.iterdir())


def _remove(path: Path) -> None:
    """Removes a run directory, and what is not of a run never; until the very end it can be told that it is one."""
    for inner in (inner for inner in path.iterdir() if any(inner.match(name) for name in _OURS)):
        if inner.is_dir():
            shutil.rmtree(inner, ignore_errors=True)
        elif inner.name not in _MARKS:
            inner.unlink()
    for name in _MARKS:
        (path / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody has put something in it
        path.rmdir()


def _holds(file: Path, tensors: Mapping[str, str]) -> bool:
    """Whether a safetensors file holds tensors with these checksums."""
    try:
        return file.is_file() and all(tensor_checksum(file, name) == known for name, known in tensors.items())
    except (SafetensorError, OSError):
        return False


def _is_whole(file: Path, checksum: str) -> bool:
    return file.is_file() and _checksum(file) == checksum


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
