"""A terminal, Ctrl-C, a full or read-only disk."""

import os
import pty
import re
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import COMMAND, Outcome, environment, is_one_sentence, nothing_but, trimfit
from transformers import PreTrainedTokenizerFast

Here = Callable[..., Outcome]
Mount = Callable[[str], Path]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLUMNS = 80
PATIENCE = 240.0


class Terminal:
    """A pseudo-terminal and what was written to it, without the escape codes."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, COLUMNS))
        self._bytes = b""

    @property
    def shown(self) -> str:
        return ESCAPE.sub("", self._bytes.decode("utf-8", errors="replace"))

    def read(self) -> bool:
        """Waits for more; False when the program has closed its end."""
        try:
            more = os.read(self.master, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self._bytes += more
        return bool(more)

    def read_until(self, expected: re.Pattern[str]) -> bool:
        end = time.monotonic() + PATIENCE
        while not expected.search(self.shown):
            if time.monotonic() > end or not self.read():
                return False
        return True


def test_progress_on_a_terminal_and_ctrl_c(tmp_path: Path) -> None:
    terminal = Terminal()
    arguments = ("prune", "demo", "-o", tmp_path / "out", "--samples", "64", "--sequence-length", "256")
    process = subprocess.Popen(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        text=True,
        env=environment(),
    )
    os.close(terminal.slave)
    try:
        # Block, share done, time since the start, time left, layer, error: all in one line of 80 columns.
        line = re.compile(r"block \d of 6 \S+ +\d+% [\d:]+ [\d:-]+ (self_attn|mlp)\.\w+_proj +error 0\.\d{4}")
        assert terminal.read_until(line), terminal.shown
        process.send_signal(signal.SIGINT)
        while terminal.read():
            pass
        stdout, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        os.close(terminal.master)
    assert process.returncode == 130
    assert "loading " in terminal.shown
    assert terminal.shown.rstrip().splitlines()[-1].endswith("error: interrupted; nothing was written")
    assert "Traceback" not in terminal.shown
    assert stdout == ""
    assert nothing_but(tmp_path)


def test_ctrl_c_while_writing(
    here: Here, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        assert any(tmp_path.glob(".out.*/model.safetensors"))  # the weights are written already
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
    outcome = here("prune", tiny, "-o", tmp_path / "out", "--calibration", text, "--sequence-length", "32")
    assert outcome.status == 130
    assert outcome.stderr.splitlines()[-1] == "error: interrupted; nothing was written"
    assert nothing_but(tmp_path)


def test_disk_full_halfway(tiny: Path, text: Path, mount: Mount) -> None:
    disk = mount("size=80k")  # enough for the weights, not for the tokenizer too
    sizes = ("--samples", "12", "--sequence-length", "32")
    outcome = trimfit("prune", tiny, "-o", disk / "out", "--calibration", text, *sizes)
    assert outcome.status == 1
    assert is_one_sentence(outcome), outcome.stderr
    assert "disk is full" in outcome.stderr
    assert str(disk / "out") in outcome.stderr
    assert nothing_but(disk)


def test_disk_too_small_from_the_start(here: Here, tiny: Path, text: Path, mount: Mount) -> None:
    disk = mount("size=32k")
    sizes = ("--samples", "12", "--sequence-length", "32")
    outcome = here("prune", tiny, "-o", disk / "out", "--calibration", text, *sizes)
    assert outcome.status == 1
    assert is_one_sentence(outcome), outcome.stderr
    assert "MiB free" in outcome.stderr
    assert nothing_but(disk)


def test_read_only_parent(here: Here, tiny: Path, text: Path, mount: Mount) -> None:
    disk = mount("ro")
    outcome = here("prune", tiny, "-o", disk / "out", "--calibration", text)
    assert outcome.status == 2
    assert is_one_sentence(outcome), outcome.stderr
    assert "not writable" in outcome.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_on_a_full_disk(tiny: Path, text: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [COMMAND, "eval", tiny, "--text", text, "--window", "32", "--limit", "2", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 1
    assert is_one_sentence(Outcome(done.returncode, "", done.stderr)), done.stderr
