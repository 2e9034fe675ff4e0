"""`make matrix`: the tests on the lowest and the newest versions of the core packages, on every Python that is found.

A virtual environment a set, made once and used again: `.matrix/python3.11-lowest`, `.matrix/python3.11-newest-tv`, ...
The lowest versions are those that `pyproject.toml` declares; what is not among the core packages is the newest that
fits them. A set that cannot be installed is a row of the table with pip's reason, and the command then ends with 1.

    python tests/matrix.py --python 3.11 --set lowest tests/test_artifact.py
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("torch", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TOOLS = ("pytest", "pytest-xdist")
_COLUMNS = ("python", "set", "torchvision", *CORE, "tests", "minutes")
_VERSIONS = "import sys, importlib.metadata as m; print(*[m.version(name) for name in sys.argv[1:]])"


@dataclass(frozen=True)
class Setting:
    """One environment: which Python, which versions, and whether torchvision is there too."""

    python: str
    versions: str
    torchvision: bool

    @property
    def name(self) -> str:
        return f"python{self.python}-{self.versions}{'-tv' if self.torchvision else ''}"

    def requirements(self) -> list[str]:
        """What pip is asked for, in one go, so that it finds versions that fit each other."""
        pins = [f"{name}=={lowest}" for name, lowest in lowest_versions().items()]
        wanted = pins if self.versions == "lowest" else list(CORE)
        return [*wanted, *(["torchvision"] if self.torchvision else []), *TOOLS, "--editable", f"{ROOT}[plots,heif]"]


def lowest_versions() -> dict[str, str]:
    """The lowest declared version of each core package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {name: re.search(rf'^    "{name}>=([0-9.]+)",$', text, re.MULTILINE) for name in CORE}
    return {name: match.group(1) for name, match in found.items() if match}


def interpreter(version: str) -> str | None:
    """A Python of a version, such as 3.11: on the path, of pyenv or of uv; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}*/bin/python{version}")))]
    if uv := shutil.which("uv"):
        answer = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
        candidates.append(answer.stdout.strip())
    for candidate in filter(None, candidates):  # a shim may be there for a Python that is not
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if answer.stdout.strip() == version:
            return candidate
    return None


def install(setting: Setting, folder: Path, log: Path) -> str:
    """Make the environment unless it is there; returns why it cannot be made, or nothing."""
    python, done = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(setting.requirements())
    if done.exists() and done.read_text() == wanted:
        return ""
    found = interpreter(setting.python)
    if found is None:
        return f"no Python {setting.python} here"
    for command in (
        [found, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *setting.requirements()],
    ):
        with log.open("a") as stream:
            if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode:
                lines = log.read_text(errors="replace").splitlines()
                errors = [line for line in lines if line.startswith("ERROR")] or lines or ["?"]
                return f"not installed: {errors[0][:100]}"
    done.write_text(wanted)
    return ""


def row_of(setting: Setting, into: Path, tests: list[str]) -> tuple[list[str], bool]:
    """Install, test, and say what happened: a row of the table, and whether all is well."""
    folder, log = into / setting.name, into / f"{setting.name}.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    head = [setting.python, setting.versions, "yes" if setting.torchvision else "no"]
    problem = install(setting, folder, log)
    if problem:
        return [*head, *[""] * len(CORE), problem, ""], False
    python = str(folder / "bin" / "python")
    versions = subprocess.run([python, "-c", _VERSIONS, *CORE], capture_output=True, text=True).stdout.split()
    base = folder / "pytest"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={base}", *tests]
    with log.open("a") as stream:
        code = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT).returncode
    shutil.rmtree(base, ignore_errors=True)
    last = (log.read_text(errors="replace").splitlines() or ["?"])[-1]
    summary = re.sub(r"^=+ | in [0-9.]+s.*$| =+$", "", last)
    return [*head, *versions, summary, f"{(time.monotonic() - start) / 60:.1f}"], code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=["tests"], help="what to run; default: all")
    parser.add_argument("--python", nargs="+", default=[v for v in PYTHONS if interpreter(v)], metavar="3.X")
    parser.add_argument("--set", nargs="+", default=["lowest", "newest"], choices=["lowest", "newest"])
    parser.add_argument("--torchvision", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--into", type=Path, default=ROOT / ".matrix", help="folder of the environments")
    options = parser.parse_args()
    into = options.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    rows, well = [list(_COLUMNS)], True
    for python in options.python:
        for versions in options.set:
            for torchvision in options.torchvision:
                setting = Setting(python, versions, torchvision == "yes")
                print(f"{setting.name} ...", file=sys.stderr, flush=True)
                row, fine = row_of(setting, into, options.tests or ["tests"])
                rows.append(row)
                well &= fine
                widths = [max(len(line[index]) for line in rows) for index in range(len(_COLUMNS))]
    for line in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"Logs: {into}/*.log")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
