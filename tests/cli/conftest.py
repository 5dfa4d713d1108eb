"""A tiny model on disk, texts for it, and two ways to run the command."""

import logging
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cli_helpers import Outcome, save_model, write_text
from transformers.utils import logging as transformers_logging

from trimfit.cli.main import run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny Llama. Not to be written to."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 40 windows of 32 tokens."""
    return write_text(tmp_path_factory.mktemp("texts") / "words.txt", words=600)


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Two commands at a time: each spends seconds on imports."""
    with ThreadPoolExecutor(2) as executor:
        yield executor
        executor.shutdown(cancel_futures=True)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs the command in this process, which spares the imports."""
    log = logging.getLogger("trimfit")
    before, verbosity = (log.handlers, log.propagate), transformers_logging.get_verbosity()

    def here(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    yield here
    log.handlers, log.propagate = before
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty file system in memory with the options given; only root can."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        directory = tmp_path / "mounted"
        directory.mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", directory], check=True)
