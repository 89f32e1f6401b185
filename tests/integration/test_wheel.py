"""The wheel and the sdist: what is in them, and whether the wheel works in an environment that has nothing else.

In that environment torch and what it requires are links to the ones here, to save half a minute. The workflow
.github/workflows/wheels.yml installs torch too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import amos_dist
from tests.distributed.harness import ROOT

SOURCES = ("amos_dist", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def sources() -> Iterator[Path]:
    for each in (ROOT / name for name in SOURCES):
        yield from (path for path in ([each] if each.is_file() else each.rglob("*")) if path.is_file())


def run(*command: str | Path, folder: Path, limit: float = 200) -> str:
    """In `folder`, without this process's PYTHONPATH; what is built is for the CPU, or as AMOS_CUDA says.

    Returns its output. Nothing that it has started goes on after `limit` seconds.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env={"AMOS_CUDA": "0", **inherited},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {limit} s: {command}\n{output[-3000:]}") from None
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that launch/install.sh has built from these sources, or a new one: that takes a minute."""
    newest = max(path.stat().st_mtime for path in sources() if path.suffix not in (".so", ".pyc"))
    found = [path for path in (ROOT / "dist").glob("amos_dist-*.whl") if path.stat().st_mtime > newest]
    if not found:
        folder = tmp_path_factory.mktemp("wheel")
        options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
        run(sys.executable, "-m", "pip", "wheel", "-q", *options, ROOT, folder=folder, limit=580)
        found = list(folder.glob("*.whl"))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.timeout(600)  # for the build
def test_wheel_is_for_every_python_from_3_10_on(wheel: Path) -> None:
    name, version, python, abi, _ = wheel.stem.split("-")
    assert (name, version, python, abi) == ("amos_dist", amos_dist.__version__, "cp310", "abi3")
    with zipfile.ZipFile(wheel) as archive:
        files = {file: archive.read(file) for file in archive.namelist() if ".dist-info/" not in file}
        metadata = archive.read(f"{name}-{version}.dist-info/METADATA").decode()
        assert archive.read(f"{name}-{version}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata and "\nRequires-Dist: torch>=2.11\n" in metadata
    assert files.pop("amos_dist/_C.abi3.so")
    modules = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "amos_dist").rglob("*.py")}
    assert files == modules


def required(name: str, known: dict[str, Distribution]) -> dict[str, Distribution]:
    """A distribution that is installed here, and all that it requires."""
    known[name] = distribution(name)
    for line in known[name].requires or []:
        requirement = Requirement(line)
        if requirement.name not in known and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            required(requirement.name, known)
    return known


@pytest.fixture
def clean_python(tmp_path: Path) -> Path:
    """Of an environment with torch and what that requires: no NumPy, no DeepSpeed, none of the sources."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean", folder=tmp_path)
    (packages,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    for each in required("torch", {}).values():
        for top in {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(each.locate_file(top))))
    return tmp_path / "clean" / "bin" / "python"


def test_wheel_works_in_a_clean_environment(wheel: Path, clean_python: Path, tmp_path: Path) -> None:
    # Without an index: everything that the wheel asks for has to be there.
    run(sys.executable, "-m", "pip", "--python", clean_python, "install", "-q", "--no-index", wheel, folder=tmp_path)
    smoke = ROOT / "tests" / "integration" / "smoke.py"
    said = run(clean_python, "-W", "ignore", smoke, folder=tmp_path)
    assert said.startswith(f"amos_dist {amos_dist.__version__}, torch ") and said.endswith(": works\n"), said


def test_sdist_has_all_that_a_build_needs(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    for path in sources():  # a copy: in a folder where one was built, setuptools adds what its old list has
        if path.suffix not in (".so", ".pyc"):
            (clean / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, clean / path.relative_to(ROOT))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, folder=clean)
    with tarfile.open(tmp_path / f"amos_dist-{amos_dist.__version__}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(clean).as_posix() for path in clean.rglob("*") if path.is_file()}
    needed = {name for name in needed if ".egg-info/" not in name}
    assert len(needed) > 60 and needed <= packed, needed - packed
