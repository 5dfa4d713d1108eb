"""A directory that appears complete or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from trimfit.errors import InputError, RunError

SIDECAR = "trimfit.json"
_LONGEST_NAME = 200  # bytes; file systems take 255, and the name beside it is longer


def check_output(out: Path, overwrite: bool) -> None:
    """Raises `InputError` when `out` cannot be written: it exists, is no checkpoint, or its parent is no directory."""
    if out.is_symlink():
        raise InputError(f"{out} is a symbolic link; give the directory that it points to, or another output")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; choose another output or give --overwrite")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a directory; choose another output")
    if out.exists() and any(out.iterdir()) and not (out / SIDECAR).is_file():
        raise InputError(f"{out} was not written by trimfit, so it is not replaced; choose another output or remove it")
    if len(out.name.encode()) > _LONGEST_NAME:
        raise InputError(f"the name of the output is longer than {_LONGEST_NAME} bytes; choose a shorter one")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory, so {out.name} cannot be written there; create it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} is not writable; choose another output")


@contextmanager
def atomic_directory(out: Path, overwrite: bool, beside: Path | None = None, *, begun: bool = False) -> Generator[Path]:
    """Gives an empty sibling of `out` to write to, and renames it to `out` when the context ends well.

    `beside` is what to call it, on the same disk; what is there is removed. On any error, an interrupt included, the
    sibling is removed and `out` is as it was. With `begun` it is neither emptied nor removed: others work in it too. A
    full disk is a `RunError`.
    """
    check_output(out, overwrite)
    if beside is None:
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
        beside.chmod(0o777 & ~_umask())
    else:
        if not begun:
            shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(exist_ok=begun)
    try:
        yield beside
        _replace(beside, out)
    except Exception as error:
        if is_disk_full(error):
            raise RunError(
                f"the disk is full: {out} was not written; free space there or choose another output"
            ) from error
        raise
    finally:
        if not begun:
            shutil.rmtree(beside, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one it came from, says that there is no space left."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(link):  # safetensors reports it as text
            return True
        link = link.__cause__ or link.__context__
    return False


def _replace(beside: Path, out: Path) -> None:
    """A directory cannot be renamed onto a full one, so an old `out` steps aside first."""
    inner, rights = list(beside.rglob("*")), ~_umask()
    for path in inner:  # safetensors makes files that only their owner can read
        path.chmod((0o777 if path.is_dir() else 0o666) & rights)
    for path in (*inner, beside):
        sync(path)
    old = old_beside(beside)
    try:
        if out.exists():
            out.rename(old)
        beside.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def old_beside(beside: Path) -> Path:
    """Where an old output is while the new one, which was written to `beside`, takes its place."""
    return beside.with_suffix(".old")


def put_back(beside: Path, out: Path) -> None:
    """Ends what a kill has cut short: an old output that had stepped aside is `out` again, unless the new one is."""
    old = old_beside(beside)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(out)


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file: after a kill at any moment it is the old one or the new one, and whole."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(data)
    rename_durably(beside, path)


def rename_durably(old: Path, new: Path) -> None:
    """Gives a written file its name, replacing what has it, when all of it is on the disk."""
    sync(old)
    old.replace(new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
