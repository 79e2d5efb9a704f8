"""What makes the project installable: metadata, tested versions, the lock, `make`, the checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import brainalign

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13")
FAMILIES = {"features", "generation", "auditory", "workflow", "report", "test"}


def _lines(name: str) -> list[str]:
    joined = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


@cache
def constraints() -> dict[str, Requirement]:
    pins = [Requirement(line) for line in _lines("constraints.txt")]
    named = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(named) == len(pins)
    return named


@cache
def lock() -> dict[str, tuple[Requirement, list[str]]]:
    named = {}
    for line in _lines("requirements.lock"):
        pin, *hashes = line.split(" --hash=")
        named[canonicalize_name(Requirement(pin).name)] = Requirement(pin), hashes
    return named


def version_of(pin: Requirement) -> str:
    (only,) = pin.specifier
    assert only.operator == "=="
    return only.version


def needed(*extras: str) -> list[Requirement]:
    """Return what the project and these extras name, with extras of extras followed."""
    project = PROJECT["project"]
    found, seen, queue = [], set(), [""]
    queue += extras
    while queue:
        extra = queue.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
            requirement = Requirement(text)
            if requirement.name == "brainalign":
                queue += requirement.extras
            else:
                found.append(requirement)
    return found


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_metadata() -> None:
    project = PROJECT["project"]
    assert project["name"] == "brainalign"
    assert project["license"] == "BSD-3-Clause"
    assert all(
        Version(f"{python}.0") in SpecifierSet(project["requires-python"]) for python in PYTHONS
    )
    assert Version("3.10.14") not in SpecifierSet(project["requires-python"])
    for python in PYTHONS:
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    for field in ("readme", "license-files"):
        for name in [project[field]] if isinstance(project[field], str) else project[field]:
            assert (ROOT / name).is_file()


def test_extras_per_family_and_all_of_them() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) >= FAMILIES
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == FAMILIES
    torch = next(r for r in needed() if r.name == "torch")
    assert "2.11" in torch.specifier
    assert "2.10.9" not in torch.specifier


@pytest.mark.parametrize("extra", PROJECT["project"]["optional-dependencies"])
def test_every_dependency_has_a_tested_version_in_its_range(extra: str) -> None:
    for requirement in needed(extra):
        name = canonicalize_name(requirement.name)
        assert name in constraints(), f"{name} is not in constraints.txt: run `make lock`"
        version = version_of(constraints()[name])
        assert version in requirement.specifier, f"{requirement}, but tested {version}: `make lock`"


def test_every_constraint_is_a_version_that_public_indexes_can_hold() -> None:
    for name, pin in constraints().items():
        assert Version(version_of(pin)).local is None, f"{name} is a local build"
        assert pin.marker is None and pin.url is None


def test_lock_agrees_with_constraints_and_is_whole() -> None:
    for name, (pin, hashes) in lock().items():
        assert version_of(pin) == version_of(constraints()[name]), f"{name}: run `make lock`"
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", h) for h in hashes), name
    for requirement in needed("all"):
        name = canonicalize_name(requirement.name)
        assert name in lock(), f"{name} is not in requirements.lock: run `make lock`"
        for python in PYTHONS:
            marker = lock()[name][0].marker
            linux = {"python_full_version": f"{python}.5", "sys_platform": "linux"}
            assert marker is None or marker.evaluate(linux), f"{name} on Python {python}"


def test_licence_citation_and_changelog_name_this_version() -> None:
    version = brainalign.__version__
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("BSD 3-Clause License")
    assert "The brainalign developers" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == version
    assert citation["license"] == PROJECT["project"]["license"]
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_room_has_its_place_in_the_order_of_imports() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
    placed = set(re.findall(r"brainalign\.(\w+)", " ".join(layers)))
    package = ROOT / "brainalign"
    rooms = {p.parent.name for p in package.glob("*/__init__.py")}
    modules = {p.stem for p in package.glob("*.py")} - {"__init__"}
    assert rooms | modules <= placed
    methods = rooms - {"data", "report", "small_models"}
    (forbidden,) = (
        c["forbidden_modules"]
        for c in contracts
        if c.get("source_modules") == ["brainalign.report"]
    )
    assert methods == {name.removeprefix("brainalign.") for name in forbidden}


def test_nothing_tracked_names_a_machine_or_a_package_index() -> None:
    hosts = ("py" + "pi.org", "python" + "hosted.org", "npm" + "js.org", "deb." + "debian.org")
    hosts += ("download.py" + "torch.org",)
    folders = ("/wo" + "rk/", "/fa" + "rm", "/ro" + "ot/", "/ho" + "me/")
    words = re.compile("|".join(re.escape(word) for word in chain(hosts, folders)).encode())
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip().decode(errors='replace')}"
        for path in tracked()
        if path.suffix not in {".safetensors", ".png", ".nc", ".gz", ".npz"}
        for n, line in enumerate(path.read_bytes().splitlines(), 1)
        if words.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """Return a folder with what `make` looks at before it sets up."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    if program is None:
        pytest.skip("there is no make")
    # The environment of a `make` above this test must not reach the one below it.
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run(
        [program, *arguments],
        cwd=folder,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("goal", ["demo", "test"])
def test_make_without_a_suitable_python_says_what_to_do(sandbox: Path, goal: str) -> None:
    done = make(sandbox, goal, "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "No Python from 3.11 to 3.13" in done.stderr
    assert "no-such-python" in done.stderr
    assert f"make {goal} PYTHON=" in done.stderr
    assert not (sandbox / ".venv").exists()


def test_make_refuses_a_python_out_of_range(sandbox: Path) -> None:
    old = sandbox / "python-old"
    old.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 10); $2"\n'
    )
    old.chmod(0o755)
    done = make(sandbox, "demo", f"PYTHON={old}")
    assert done.returncode != 0 and "No Python from 3.11 to 3.13" in done.stderr


def test_make_sets_up_once_and_again_only_when_dependencies_change(sandbox: Path) -> None:
    first = make(sandbox, "-n", "demo").stdout
    assert "-m venv" in first and "pip install --constraint constraints.txt" in first
    for name in (".venv/bin/python", ".venv/.ready"):
        (sandbox / name).parent.mkdir(parents=True, exist_ok=True)
        (sandbox / name).touch()
    assert make(sandbox, "-n", "demo").stdout == ".venv/bin/brainalign demo\n"
    assert "pip" not in make(sandbox, "-n", "test").stdout
    later = (sandbox / ".venv/.ready").stat().st_mtime + 5
    os.utime(sandbox / "constraints.txt", (later, later))
    again = make(sandbox, "-n", "demo").stdout
    assert "pip install" in again and "-m venv" not in again


def test_make_keeps_another_environment_out(sandbox: Path) -> None:
    (sandbox / "show.mk").write_text(
        "include Makefile\nshow:\n"
        '\t@echo "[$$PYTHONPATH][$$VIRTUAL_ENV][$$PIP_TARGET][$$PIP_USER]"\n'
    )
    leak = {"PYTHONPATH": "/a", "VIRTUAL_ENV": "/b", "PIP_TARGET": "/c", "PIP_USER": "1"}
    assert make(sandbox, "-f", "show.mk", "show", **leak).stdout == "[][][][0]\n"


@pytest.mark.parametrize("script", [".ci/run", "tests/wheel.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert "set -euo pipefail" in (ROOT / script).read_text(encoding="utf-8")


def test_the_checks_are_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
