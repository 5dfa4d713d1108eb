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
from cli_helpers import COMMAND, Outcome, environment, is_one_sentence, nothing_but
from transformers import PreTrainedTokenizerFast

Here = Callable[..., Outcome]
Mount = Callable[[str], Path]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLUMNS = 80
END = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PATIENCE = 240.0


def goes_on(run: Path) -> str:
    """What is said of a run directory that stays."""
    out = run.with_suffix("")
    return f"what is finished is in {run}: the same command, or trimfit resume {out}, goes on"


def hears_ctrl_c() -> None:
    """In a process to be: a shell's jobs in the background, as these tests may be, are born deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


@pytest.mark.parametrize(
    ("arguments", "number", "status"),
    [
        (("prune", "--samples", "64", "--sequence-length", "256"), signal.SIGINT, 130),
        (("prune", "--samples", "64", "--sequence-length", "256", "--selector", "wanda"), signal.SIGTERM, 143),
        (("quantize", "--transform", "online"), signal.SIGINT, 130),
        (("quantize", "--format", "dense"), signal.SIGTERM, 128 + signal.SIGTERM),
    ],
    ids=["prune and Ctrl-C", "prune and SIGTERM", "quantize and Ctrl-C", "quantize and SIGTERM"],
)
def test_progress_on_a_terminal_and_its_end(
    tmp_path: Path, arguments: tuple[str, ...], number: signal.Signals, status: int
) -> None:
    terminal = Terminal()
    process = subprocess.Popen(
        [COMMAND, arguments[0], "demo", "-o", tmp_path / "out", *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        text=True,
        env=environment(),
        preexec_fn=hears_ctrl_c,
    )
    os.close(terminal.slave)
    try:
        # Block, share done, time since the start, time left, layer, error: all in one line of 80 columns.
        layer = r"mlp\.\w+_proj" if arguments[0] == "prune" else r"(self_attn|mlp)\.\w+_proj"  # when some are kept
        line = re.compile(rf"block \d of 6 \S+ +\d+% [\d:]+ [\d:-]+ {layer} +error 0\.\d{{4}}")
        assert terminal.read_until(line), terminal.shown
        process.send_signal(number)
        while terminal.read():
            pass
        stdout, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        os.close(terminal.master)
    assert process.returncode == status
    assert "loading " in terminal.shown
    assert "Traceback" not in terminal.shown
    assert stdout == ""
    run = tmp_path / "out.run"
    assert terminal.shown.rstrip().splitlines()[-1].endswith(f"error: {END[number]}; {goes_on(run)}")
    assert nothing_but(tmp_path, ["out.run"])
    assert (run / "part-00000.safetensors").is_file()


PRUNE = ("prune", "--samples", "12", "--sequence-length", "32")
COMMANDS = {"prune": PRUNE, "packed": ("quantize",), "dense": ("quantize", "--format", "dense")}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_writing(
    here: Here, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        assert (tmp_path / "out.run" / "result" / "model.safetensors").is_file()  # the weights are written already
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
    name, *options = COMMANDS[command]
    outcome = here(name, tiny, "-o", tmp_path / "out", "--calibration", text, "--sequence-length", "32", *options)
    assert outcome.status == 130
    assert outcome.stderr.splitlines()[-1] == f"error: interrupted; {goes_on(tmp_path / 'out.run')}"
    assert nothing_but(tmp_path, ["out.run"])
    parts = {"prune": 2 * 4, "packed": 2 * 2, "dense": 2}[command]
    assert nothing_but(tmp_path / "out.run", [*JOURNAL, *(f"part-{i:05d}.safetensors" for i in range(parts))])


JOURNAL = ["journal.jsonl", "journal.lock", "run.json"]


@pytest.mark.parametrize("size", ["116k", "124k", "132k", "140k", "148k"])
def test_disk_full_while_pruning(tiny: Path, text: Path, here: Here, mount: Mount, size: str) -> None:
    """In the middle of the layers or of the output: once there is space, the same command goes on."""
    disk = mount(f"size={size}")
    command = (*PRUNE, tiny, "-o", disk / "out", "--calibration", text)
    outcome = here(*command)
    assert outcome.status == 1
    assert is_one_sentence(outcome), outcome.stderr
    assert "is full" in outcome.stderr or "MiB free" in outcome.stderr
    assert outcome.stderr.rstrip().endswith(goes_on(disk / "out.run"))
    parts = {path: path.stat().st_mtime_ns for path in (disk / "out.run").glob("part-*.safetensors")}
    assert parts
    assert subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
    assert here("resume", disk / "out").status == 0


@pytest.mark.parametrize(
    ("command", "size", "kept"), [("packed", "52k", 4), ("packed", "24k", 2), ("dense", "96k", 2), ("dense", "116k", 2)]
)
def test_disk_full_while_quantizing(
    tiny: Path, here: Here, mount: Mount, monkeypatch: pytest.MonkeyPatch, command: str, size: str, kept: int
) -> None:
    """In the middle of the blocks, as something else fills the disk, or of the output; then as for `prune`."""
    monkeypatch.setattr("trimfit.pipelines.opened.check_space", lambda parent, needed: None)
    disk = mount(f"size={size}")
    name, *options = COMMANDS[command]
    outcome = here(name, tiny, "-o", disk / "out", *options)
    assert outcome.status == 1
    assert is_one_sentence(outcome), outcome.stderr
    assert "is full" in outcome.stderr or "MiB free" in outcome.stderr
    assert outcome.stderr.rstrip().endswith(goes_on(disk / "out.run"))
    parts = {path: path.stat().st_mtime_ns for path in (disk / "out.run").glob("part-*.safetensors")}
    assert len(parts) == kept
    assert nothing_but(disk / "out.run", [*JOURNAL, *(path.name for path in parts)])
    subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
    assert here("resume", disk / "out").status == 0
    assert nothing_but(disk, ["out"])


@pytest.mark.parametrize("command", ["prune", "packed", "dense"])
def test_disk_too_small_from_the_start(here: Here, tiny: Path, text: Path, mount: Mount, command: str) -> None:
    disk = mount("size=32k")
    name, *options = COMMANDS[command]
    data = ("--calibration", text) if name == "prune" else ()
    outcome = here(name, tiny, "-o", disk / "out", *data, *options)
    assert outcome.status == 1
    assert is_one_sentence(outcome), outcome.stderr
    assert "MiB free" in outcome.stderr
    assert nothing_but(disk)


@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_read_only_parent(here: Here, tiny: Path, text: Path, mount: Mount, command: str) -> None:
    disk = mount("ro")
    outcome = here(command, tiny, "-o", disk / "out", "--calibration", text)
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
