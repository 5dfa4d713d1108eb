"""Text that lies on every machine with Python: the source of the standard library.

The embedded model is trained on all modules but the ones named here, calibrated on `CALIBRATION` and
evaluated on `EVALUATION`. The three sets are disjoint.
"""

import logging
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimfit.errors import InputError

log = logging.getLogger(__name__)

CALIBRATION = (
    "difflib",
    "optparse",
    "mailbox",
    "ipaddress",
    "shutil",
    "configparser",
    "smtplib",
    "statistics",
)
EVALUATION = (
    "argparse",
    "tarfile",
    "typing",
    "subprocess",
    "dataclasses",
    "textwrap",
    "fractions",
    "tempfile",
    "heapq",
    "csv",
)

# Tests of the library, vendored copies, and files that are tables rather than programs.
_NOT_PROGRAMS = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3", "encodings", "pydoc_data"}


def library_root() -> Path:
    """Folder that holds the standard library's Python source."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_modules(names: Sequence[str]) -> list[str]:
    """Sources of the named single-file modules. One that this Python lacks is skipped, with a warning.

    Raises `InputError` when it has none of them.
    """
    texts: list[str] = []
    for name in names:
        path = library_root() / f"{name}.py"
        if path.is_file():
            texts.append(path.read_text(encoding="utf-8"))
        else:
            log.warning("this Python has no source of the module %s: skipped", name)
    if not texts:
        raise InputError(f"no source of the standard library lies in {library_root()}; give a text file instead")
    return texts


def training_files() -> Iterator[Path]:
    """Every program of the standard library, in a fixed order, without calibration and evaluation modules."""
    root = library_root()
    held_out = {root / f"{name}.py" for name in (*CALIBRATION, *EVALUATION)}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if path in held_out or _NOT_PROGRAMS.intersection(relative.parts):
            continue
        if relative.name.startswith("_sysconfigdata"):  # build settings of one machine
            continue
        yield path


def describe() -> str:
    """One line naming the Python whose library is read, for records."""
    return f"standard library of Python {sys.version.split()[0]}"
