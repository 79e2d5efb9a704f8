"""What must hold of any install: from a checkout, and from the wheel outside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata, resources
from pathlib import Path

import pytest

import brainalign
from brainalign.config import read_config, workflow_root
from brainalign.data import studies

#: packages that `import brainalign` must leave alone
HEAVY = (
    *("numpy", "scipy", "pandas", "xarray", "zarr", "sklearn", "torch", "torchvision", "timm"),
    *("open_clip", "transformers", "diffusers", "nibabel", "nilearn", "rsatoolbox", "matplotlib"),
    *("plotly", "jinja2", "snakemake", "mne", "pooch", "PIL", "yaml", "jsonschema"),
)
#: packages that come with an extra only
EXTRA = (
    *("torchvision", "timm", "open_clip", "transformers", "diffusers", "mne", "mne_bids"),
    *("soundfile", "snakemake", "plotly", "jinja2", "pytest", "hypothesis"),
)


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "brainalign"
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, timeout=300, **kwargs
    )


def loaded_by(statement: str, names: Iterable[str]) -> list[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    return sorted(set(names) & set(json.loads(python(code))))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import brainalign", HEAVY) == []


def test_importing_the_package_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import brainalign; print(time.perf_counter() - t)"
    # The best of three: another job on the machine says nothing about the package.
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_the_command_line_starts_without_torch() -> None:
    names = ("torch", "nilearn", "xarray", "sklearn", "plotly", "snakemake")
    assert loaded_by("import brainalign.cli", names) == []


def test_every_module_imports_without_the_extras() -> None:
    code = """
import importlib, json, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import brainalign
modules = [m.name for m in pkgutil.walk_packages(brainalign.__path__, "brainalign.")]
for name in modules:
    importlib.import_module(name)
print(json.dumps(modules))
"""
    modules = json.loads(python(code, *EXTRA))
    assert {"brainalign.cli", "brainalign.data.schema", "brainalign.report"} <= set(modules)


def test_version_is_one() -> None:
    assert metadata.version("brainalign") == brainalign.__version__
    assert run("--version").stdout.strip() == brainalign.__version__


def test_rooms_are_attributes_and_unknown_ones_are_not() -> None:
    assert brainalign.data.__name__ == "brainalign.data"
    assert set(brainalign.__all__) <= set(dir(brainalign))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = brainalign.nothing


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    commands = ("fetch", "layers", "features", "encode", "evaluate", "report", "demo", "doctor")
    for command in commands:
        assert f"\n    {command} " in done.stdout
        assert run(command, "--help").returncode == 0


def test_doctor_looks_at_this_machine(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path, env=os.environ | {"BRAINALIGN_MIRROR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert metadata.version("torch") in done.stdout
    assert str(tmp_path) in done.stdout


def test_an_error_is_one_line_with_a_remedy_and_a_traceback_on_demand() -> None:
    done = run("fetch", "haxby201")
    assert done.returncode != 0
    assert "haxby2001" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("fetch", "haxby201", "--debug").stderr


def test_the_workflow_is_shipped() -> None:
    root = workflow_root()
    assert (root / "Snakefile").is_file()
    included = [
        line.split('"')[1]
        for line in (root / "Snakefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("include:")
    ]
    assert included and all((root / name).is_file() for name in included)
    assert read_config(root / "configs" / "demo.yaml")["output"]
    for profile in ("local", "slurm"):
        assert (root / "workflows" / "profiles" / profile / "config.yaml").is_file()


def test_the_demo_plans_from_any_folder(tmp_path: Path) -> None:
    done = run("demo", "--cores", "1", "--", "--dry-run", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", studies.names())
def test_the_registries_of_the_studies_are_shipped(name: str) -> None:
    # No hashes of the Natural Scenes Dataset are published: its files are the user's own copy. The
    # archives of three others publish theirs, which `fetch` asks for.
    without = {"allen2022", "biesmans2016", "fuglsang2017", "zada2025"}
    assert bool(studies.get(name).REGISTRY) == (name not in without)


def test_the_small_model_is_shipped_and_small() -> None:
    folder = resources.files("brainalign") / "small_models" / "weights" / "small_clip"
    weights = [f for f in folder.iterdir() if f.name.endswith(".safetensors")]
    assert len(weights) == 1
    assert 0 < len(weights[0].read_bytes()) < 8e6
