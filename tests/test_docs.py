"""What the documentation shows is true: its code runs, its configurations and commands are taken.

A block marked ``python`` is run, page by page, in one namespace and an empty folder; ``py`` is a
sketch and must only compile. A ``yaml`` block is a whole configuration, or parts of one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from brainalign.cli import _parser
from brainalign.config import validate_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MINIMAL = {
    "title": "t",
    "question": "q",
    "output": "o",
    "studies": {"s": {"loader": "kay2017", "analyses": ["encoding"]}},
    "models": {"v1": {"name": "v1", "layers": ["*"]}},
}
TUTORIAL = ROOT / "docs" / "tutorial_bids.md"

pages = pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a page in these languages, with their first lines."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in found if m[1] in languages]


def with_blocks(language: str) -> list:
    return [
        pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in PAGES if blocks(p, language)
    ]


@pytest.fixture(scope="module")
def practice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what docs/practice_data.py writes."""
    script = ROOT / "docs" / "practice_data.py"
    folder = tmp_path_factory.mktemp("practice")
    with contextlib.chdir(folder):
        exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {})
    return folder


@pytest.fixture
def at_practice(practice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(practice, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def table(text: str) -> dict[str, list[float]]:
    """Return the numbers at the end of each line, by what stands before them."""
    rows = re.findall(r"^(\S.*?)((?:\s+-?\d\.\d+)+)\s*$", text, flags=re.M)
    return {name: [float(n) for n in numbers.split()] for name, numbers in rows}


@pytest.mark.parametrize("page", with_blocks("python"))
def test_code_runs(page: Path, request, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if page == TUTORIAL:
        request.getfixturevalue("at_practice")
    namespace: dict = {"__name__": "docs"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    if page.name == "README.md":
        (_, shown), *_ = blocks(page, "text")
        assert table(shown) == {
            name: pytest.approx(numbers, abs=0.03)
            for name, numbers in table(capsys.readouterr().out).items()
        }


@pages
def test_sketches_compile(page: Path) -> None:
    for line, code in blocks(page, "py"):
        compile("\n" * (line - 1) + code, str(page), "exec")


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_configurations_are_valid(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        block = yaml.safe_load(text)
        whole = "title" in block
        completed = validate_config(block if whole else {**MINIMAL, **block})
        for study in completed["studies"].values():
            assert not whole or study["loader"] != "bids" or study["parameters"]["root"]


def commands(page: Path) -> list[str]:
    """Return the lines of shell blocks, and the inline code, that call brainalign."""
    lines = [
        line.removeprefix("$ ")
        for _, text in blocks(page, "shell")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines += re.findall(r"`(brainalign [^`\n]+)`", prose)
    return [line for line in lines if line.startswith("brainalign ")]


@pages
def test_commands_are_known(page: Path, capsys) -> None:
    for command in commands(page):
        words = shlex.split(command)[1:]
        if words[0] in ("CONFIG", "COMMAND"):
            continue
        # A command named in a sentence may lack what it needs, but must be there.
        try:
            _parser().parse_args(words)
        except SystemExit as stop:
            said = capsys.readouterr().err
            inline = f"`{command}`" in page.read_text(encoding="utf-8")
            lacks = "the following arguments are required" in said
            assert stop.code == 0 or (inline and lacks), f"{command}: {said}"


def test_the_commands_of_the_tutorial_run(at_practice) -> None:
    from brainalign.cli import main
    from brainalign.data.store import read

    steps = [shlex.split(c)[1:] for c in commands(TUTORIAL) if not c.startswith("brainalign run")]
    assert [s[0] for s in steps] == ["responses", "features", "encode"]
    for step in steps:
        assert main(step) == 0
    best = read("practice/encoded/best.zarr", "scores")
    assert best.sizes["neuroid"] == 240 and float(best["r"].mean()) > 0.2


def test_the_configuration_of_the_tutorial_loads(at_practice) -> None:
    from brainalign.data.studies import local

    (_, text), *_ = blocks(TUTORIAL, "yaml")
    mine = yaml.safe_load(text)["studies"]["mine"]
    study = local.load(subjects=mine["subjects"], **mine["parameters"])
    assert set(study.responses["01"]["roi"].values) == {"V1", "FFA"}


@pages
def test_links_and_pictures_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {target}; there are {slugs}"


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for page in PAGES[1:]:
        for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.S):
            names = [n for n in body.split() if not n.startswith(":") and not n.isdigit()]
            listed |= {(page.parent / f"{n}.md").resolve() for n in names}
    pages_of_docs = {p.resolve() for p in PAGES[1:]} - {(ROOT / "docs" / "index.md").resolve()}
    assert pages_of_docs <= listed


def test_every_public_module_is_in_the_reference() -> None:
    import brainalign

    shown = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        shown |= set(re.findall(r"automodule:: (\S+)", page.read_text()))
    # Rooms document their modules; the report's and the small models' inner parts are no interface.
    inner = re.compile(r"brainalign\.(report\.(?!build|from_run)|small_models|_workflow)")
    modules = {
        m.name
        for m in pkgutil.walk_packages(brainalign.__path__, "brainalign.")
        if not m.ispkg and not inner.match(m.name)
    }
    assert modules <= shown, sorted(modules - shown)


def test_every_name_of_the_kernels_is_in_the_reference() -> None:
    import brainalign_kernels

    text = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("kernels*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"auto\w+:: (\S+)", text)}
    names = set(brainalign_kernels.__all__)
    for module in mechanisms():
        names |= set(importlib.import_module(f"brainalign_kernels.{module}").__all__)
    for module in ("adapters", "probes", "golden"):
        assert module in shown
        names -= set(importlib.import_module(f"brainalign_kernels.{module}").__all__)
    assert names <= shown, sorted(names - shown)


def mechanisms() -> list[str]:
    """Return the packages of brainalign_kernels that hold a mechanism."""
    import brainalign_kernels

    packages = [m.name for m in pkgutil.iter_modules(brainalign_kernels.__path__) if m.ispkg]
    return sorted({*packages} - {"adapters", "probes", "golden"})


MECHANISM_PAGES = [p for p in PAGES if p.parent.name == "attention" and p.stem != "index"]


def test_every_mechanism_has_a_page() -> None:
    assert {*mechanisms(), "heads"} == {p.stem for p in MECHANISM_PAGES}
    index = (ROOT / "docs" / "attention" / "index.md").read_text()
    for name in (p.stem for p in MECHANISM_PAGES):
        assert re.search(rf"^\| \[[^\]]+\]\({name}\.md\) \|", index, flags=re.M), name


@pytest.mark.parametrize("page", MECHANISM_PAGES, ids=lambda p: p.stem)
def test_pages_of_mechanisms_are_complete(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.M) == [
        "Equation",
        "Its pattern",
        "Example",
        "Cost",
        "When to use it",
        "Differences from the published code",
        "Source",
    ]
    assert "$$" in text and "| symbol | shape | is |" in text and blocks(page, "python")
    assert re.search(r"!\[[^\]]{20,}\]\(\.\./images/attention/\w+\.png\)", text)
    links = re.findall(r"\[arXiv:(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(\S+?)\)", text)
    assert links and all(shown == linked for shown, linked in links)


def test_specifications_in_the_table_are_those_there_are() -> None:
    from brainalign_kernels.adapters import describe

    index = (ROOT / "docs" / "attention" / "index.md").read_text()
    named = re.findall(r"^\| \[.*\| `(\w+)` \|$", index, flags=re.M)
    assert sorted(named) == sorted(spec.partition(":")[0] for spec in describe())


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """Return docs/attention_pictures.py as a module."""
    pytest.importorskip("matplotlib")
    path = ROOT / "docs" / "attention_pictures.py"
    spec = importlib.util.spec_from_file_location("attention_pictures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_what_the_code_draws(drawing: ModuleType) -> None:
    from PIL import Image

    files = {p.stem: p for p in drawing.FOLDER.glob("*.png")}
    assert files.keys() == drawing.PICTURES.keys()
    for name, draw in drawing.PICTURES.items():
        shown = json.loads(Image.open(files[name]).text["arrays"])
        drawn = drawing.summary(draw())
        assert len(shown) == len(drawn) > 0, name
        for one, other in zip(shown, drawn, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-8), name
        assert files[name].stat().st_size < 40_000


def test_a_picture_has_the_pixels_that_are_drawn(drawing: ModuleType) -> None:
    from PIL import Image

    def pixels(png: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)

    shown = pixels((drawing.FOLDER / "halo.png").read_bytes())
    drawn = pixels(drawing.png(drawing.PICTURES["halo"]()))
    other = pixels(drawing.png(drawing.PICTURES["softmax"]()))
    assert shown.shape == drawn.shape and abs(shown - drawn).mean() < 1.0
    assert shown.shape != other.shape or abs(shown - other).mean() > 2.0
