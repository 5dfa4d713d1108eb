"""A directory appears complete or not at all."""

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimfit.checkpoints import atomic, atomic_directory, check_output, is_disk_full
from trimfit.errors import InputError, RunError


def write_model(directory: Path, text: str) -> None:
    (directory / "model").write_text(text)
    (directory / "more").mkdir()
    (directory / "more" / "tokens").write_text(text)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint where the output shall be."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "trimfit.json").write_text("{}")
    write_model(out, "old")
    return out


def is_untouched(old: Path) -> bool:
    """The old output is whole, and nothing lies beside it."""
    whole = (old / "model").read_text() == "old" and (old / "more" / "tokens").read_text() == "old"
    return whole and list(old.parent.iterdir()) == [old]


def test_success(tmp_path: Path):
    out = tmp_path / "out"
    with atomic_directory(out, overwrite=False) as beside:
        assert beside.parent == tmp_path and beside.is_dir() and not list(beside.iterdir())
        write_model(beside, "new")
        assert not out.exists()
    assert (out / "model").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_of_it_has_the_rights_of_any_other(tmp_path: Path, umask: int):
    """Sub-folders too: without the right to enter them their files cannot be read."""
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "out", overwrite=False) as beside:
            write_model(beside, "new")
            for file in (beside / "model", beside / "more" / "tokens"):
                file.chmod(0o600)
        (tmp_path / "plain").mkdir()
        write_model(tmp_path / "plain", "new")
    finally:
        os.umask(before)
    rights = [
        {path.relative_to(top): stat.S_IMODE(path.stat().st_mode) for path in (top, *top.rglob("*"))}
        for top in (tmp_path / "out", tmp_path / "plain")
    ]
    assert rights[0] == rights[1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_all_of_it_is_on_the_disk(old: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool):
    """Every file before the directory gets its name, and the name itself in the end, before the old one is removed."""
    out = old if overwrite else old.with_name("other")
    calls: list[str] = []
    sync, remove = atomic.sync, shutil.rmtree

    def note(path: Path) -> None:
        calls.append(path.name)
        sync(path)

    monkeypatch.setattr(atomic, "sync", note)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (calls.append("remove"), remove(path, **options)))
    with atomic_directory(out, overwrite) as beside:
        write_model(beside, "new")
    assert set(calls[:4]) == {"model", "more", "tokens", beside.name}
    assert calls[4:6] == [out.parent.name, "remove"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), atomic_directory(tmp_path / "out", overwrite=False) as beside:
        write_model(beside, "half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(old: Path):
    with (
        pytest.raises(InputError, match=r"out exists already; choose another output or give --overwrite"),
        atomic_directory(old, overwrite=False),
    ):
        pytest.fail("it was entered")
    assert is_untouched(old)


def test_an_empty_directory_exists_too(tmp_path: Path):
    with pytest.raises(InputError, match="exists already"):
        check_output(tmp_path, overwrite=False)


def test_overwriting_replaces_all(old: Path):
    (old / "leftover").write_text("old")
    with atomic_directory(old, overwrite=True) as beside:
        (beside / "model").write_text("new")
        assert (old / "model").read_text() == "old"
    assert {path.name: path.read_text() for path in old.iterdir()} == {"model": "new"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_the_old_one_survives_an_error(old: Path, error: BaseException):
    with pytest.raises(BaseException), atomic_directory(old, overwrite=True) as beside:  # noqa: B017
        write_model(beside, "half")
        raise error
    assert is_untouched(old)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("which", ["old", "part"])
def test_the_old_one_survives_an_error_while_renaming(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, which: str
):
    """The old directory steps aside just before the new one takes its place."""
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.suffix == f".{which}" or self.suffix == f".{which}":
            monkeypatch.undo()  # once
            if which == "old":
                plain(self, target)  # it was done, but the interrupt came before the next step
            raise error
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)), atomic_directory(old, overwrite=True) as beside:
        write_model(beside, "new")
    assert is_untouched(old)


def test_only_our_own_output_is_replaced(tmp_path: Path):
    """Or an empty directory: --overwrite with a slip of the hand must not cost a home directory."""
    home = tmp_path / "home"
    home.mkdir()
    check_output(home, overwrite=True)
    (home / "thesis").write_text("")
    with pytest.raises(InputError, match="home was not written by trimfit, so it is not replaced"):
        check_output(home, overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_refused(tmp_path: Path, exists: bool):
    (tmp_path / "link").symlink_to(tmp_path if exists else tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is a symbolic link; give the directory that it points to"):
        check_output(tmp_path / "link", overwrite=True)


def test_a_name_that_is_too_long(tmp_path: Path):
    check_output(tmp_path / ("x" * 200), overwrite=False)
    with pytest.raises(InputError, match="the name of the output is longer than 200 bytes"):
        check_output(tmp_path / ("x" * 201), overwrite=False)


def test_outputs_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, not a directory"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="file is not a directory, so out cannot be written there; create it first"):
        check_output(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(InputError, match="missing is not a directory, so out cannot be written there"):
        check_output(tmp_path / "missing" / "out", overwrite=False)


def test_a_parent_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match="is not writable; choose another output"):
        check_output(tmp_path / "out", overwrite=False)


def test_a_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path("out"), overwrite=False) as beside:
        write_model(beside, "new")
    assert (tmp_path / "out" / "model").read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_one(tmp_path: Path, code: int):
    message = rf"the disk is full: {tmp_path}/out was not written; free space there or choose another output"
    with pytest.raises(RunError, match=message), atomic_directory(tmp_path / "out", overwrite=False) as beside:
        write_model(beside, "half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_below_other_errors():
    """safetensors gives it as text, others as the cause."""
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as cause:
            raise ValueError("could not save") from cause
    except ValueError as error:
        assert is_disk_full(error)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "trimfit-test", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path):
    with pytest.raises(RunError, match="the disk is full"), atomic_directory(small_disk / "out", False) as beside:
        (beside / "model").write_bytes(bytes(1 << 20))
    assert list(small_disk.iterdir()) == []
