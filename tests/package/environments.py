"""What we would publish, built as it is published, and environments that have nothing but it.

Each is made once for all the processes that test, below the directory that they share. What is installed beside streamkeep has the version,
and the hash, that requirements.lock says; it comes from uv's cache, where `./dev install` has put it.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
UV: Final = Path(sys.executable).with_name("uv")
WAIT_SECONDS: Final = 240
ALL: Final = "all"
_PROGRAM: Final = Path(__file__).with_name("imports.py")


@dataclass(frozen=True, slots=True)
class Built:
    """What a build has made.

    Attributes:
        wheel: from the sdist, as `python -m build` does it.
        sdist: from this checkout.
    """

    wheel: Path
    sdist: Path


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, and the modules of ours that can be imported in it.

    Attributes:
        directory: where it is.
        imported: for each public module None, or what its import has raised.
    """

    directory: Path
    imported: Mapping[str, str | None]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.directory / "bin" / "python"

    def run(self, *arguments: str | Path, cwd: Path, **variables: str) -> str:
        """Run its interpreter, warnings being errors, and give what it prints; AssertionError with all of it if it fails."""
        return ran([self.python, "-W", "error", *arguments], cwd, **variables)


def ran(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """Run a command that knows nothing of this checkout, and give what it prints; AssertionError with all of it if it fails."""
    unset = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "COVERAGE_PROCESS_START"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in unset} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command} has ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(directory: Path, source: Path = ROOT, *, only: str | None = None, epoch: str | None = None) -> Sequence[Path]:
    """Build the sdist, and the wheel from it, or only one of them, without a network; give the files."""
    which = [] if only is None else [f"--{only}"]
    isolation = ["--no-build-isolation", "--python", sys.executable, "--offline", "--no-config"]
    ran(
        [UV, "build", "--quiet", *isolation, *which, "--out-dir", directory, source],
        directory.parent,
        **{} if epoch is None else {"SOURCE_DATE_EPOCH": epoch},
    )
    return sorted(path for path in directory.iterdir() if path.suffix != ".gitignore" and path.name != ".gitignore")


class Workshop:
    """Gives what is built, and environments, each made when somebody asks for it first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def built(self) -> Built:
        """Give the wheel and the sdist of this checkout."""
        directory = self._once("dist", build)
        (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
        return Built(wheel, sdist)

    def environment(self, *extras: str, beside: Sequence[str] = ()) -> Environment:
        """Give the environment with these extras, all of them for `ALL`, and with what else is to be installed beside."""
        name = "-".join(["env", *extras]) + (f"-{sha256(' '.join(beside).encode()).hexdigest()[:8]}" if beside else "")
        directory = self._once(name, lambda directory: self._install(directory, extras, beside))
        return Environment(directory, json.loads((directory / "imported.json").read_text()))

    def _install(self, directory: Path, extras: Sequence[str], beside: Sequence[str]) -> None:
        wheel = self.built().wheel
        names = sorted(extras_of(wheel)) if extras == (ALL,) else extras
        ran([UV, "venv", "--quiet", "--no-project", "--no-config", "--python", sys.executable, directory], directory.parent)
        python = directory / "bin" / "python"
        lock = f"--constraint={ROOT / 'requirements.lock'}"
        what = f"streamkeep[{','.join(names)}] @ {wheel.as_uri()}"
        ran([UV, "pip", "install", "--quiet", "--no-config", "--python", python, lock, what, *beside], directory.parent)
        (directory / "imported.json").write_text(ran([python, _PROGRAM, *modules_of(wheel)], directory.parent))

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        directory, done = self._directory / name, self._directory / f"{name}.done"
        with (self._directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(directory)
                done.touch()
        return directory


def names_in(wheel: Path) -> Sequence[str]:
    """Give the names of the files in a wheel."""
    from zipfile import ZipFile

    with ZipFile(wheel) as archive:
        return archive.namelist()


def metadata_of(wheel: Path) -> bytes:
    """Give the text that an index would read."""
    from zipfile import ZipFile

    with ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))


def extras_of(wheel: Path) -> Sequence[str]:
    """Give the extras that a wheel says it has."""
    lines = metadata_of(wheel).decode().splitlines()
    return [line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")]


def modules_of(wheel: Path) -> Sequence[str]:
    """Give the public modules in a wheel: those with no underscore in their path."""
    paths = [name.removesuffix(".py").removesuffix("/__init__") for name in names_in(wheel) if name.endswith(".py")]
    return sorted(path.replace("/", ".") for path in paths if not any(part.startswith("_") for part in path.split("/")))
