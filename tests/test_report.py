"""The report as files: safe names and text, plots that plotly knows, a whole folder or none."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from fake_sections import HOSTILE, hostile, report_arguments, surface_data, write_fakes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from brainalign.data.section import Figure, Section, write_section
from brainalign.errors import SchemaError, UnavailableError
from brainalign.report import ZIP_NAME, build_report
from brainalign.report.colours import colour_limits, colour_table
from brainalign.report.figures import draw, frame
from brainalign.report.surface import N_VERTICES, draw_view, inflated, pack_values
from brainalign.report.text import (
    bibliography,
    clean,
    csv_bytes,
    format_interval,
    format_number,
    numbered,
    plot_text,
    safe_name,
    script_json,
)

VOID = {"meta", "link", "img", "br", "hr", "input", "col", "source"}


class Page(HTMLParser):
    """Read a page: every start tag must be closed in order; ids are unique; addresses are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        named = dict(attrs)
        self.tags.append((tag, named))
        if "id" in named:
            self.ids.append(named["id"])
        for key in ("href", "src"):
            if key in named:
                self.links.append((key, named[key]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("report")
    sections = write_fakes(made / "sections", with_hostile=True)
    build_report(sections, made / "report", **report_arguments())
    return made / "report"


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


# --- Text -------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(codec=None), max_size=40))
def test_any_text_can_be_written_and_shown(text):
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert clean(cleaned) == cleaned
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", cleaned)
    assert "<" not in plot_text(text) and ">" not in plot_text(text)
    written = script_json({"held": [text], "key " + text: 1})
    assert not re.search("[<>&\u2028\u2029]", written)
    assert json.loads(written)["held"] == [cleaned]


def test_undecodable_file_names_are_shown_with_a_mark():
    assert clean(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\ufffd.png"


@given(st.lists(st.text(max_size=30), min_size=2, max_size=6, unique=True))
def test_file_names_are_safe_and_stay_different(texts):
    names = [safe_name(t) for t in texts]
    assert len(set(names)) == len(texts)
    assert all(re.fullmatch(r"[a-z0-9]+(-+[a-z0-9]+)*", n) and len(n) <= 57 for n in names)


def test_numbers_become_json_without_nan():
    assert script_json([np.float32(0.5), np.nan, np.inf, np.int64(3), np.bool_(True)]) == (
        "[0.5,null,null,3,true]"
    )


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a", "@x", "\t=1", " =cmd", "＝1"])
def test_formulas_are_quoted_in_csv_and_numbers_are_not(text):
    data = csv_bytes(pd.DataFrame({text: [text, "plain"], "n": [-1.5, 2.0]})).decode()
    rows = list(csv.reader(io.StringIO(data)))
    assert rows[0][0].startswith("'") and rows[1][0].startswith("'")
    assert rows[2] == ["plain", "2"] and rows[1][1] == "-1.5"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.4913, "0.491"),
        (-0.05, "−0.050"),
        (6412, "6,412"),
        (81.44, "81.4"),
        (0.000999, "1.0×10⁻³"),
        (3e9, "3.0×10⁹"),
        (0.0, "0"),
        (float("nan"), "–"),
    ],
)
def test_numbers_are_written_for_readers(value, shown):
    assert format_number(value) == shown


def test_a_narrow_interval_gets_more_decimals():
    assert format_interval(0.4913, 0.42, 0.561) == ("0.491", "[0.420, 0.561]")
    assert format_interval(81.4, 60.2, 99.72) == ("81.4", "[60.2, 99.7]")
    assert format_interval(81.4, 81.38, 81.42) == ("81.400", "[81.380, 81.420]")
    assert format_interval(0.0, 0.0, 11.35) == ("0.0", "[0.0, 11.3]")
    assert format_interval(0.0, 0.0, 0.0) == ("0", "[0, 0]")
    assert format_interval(100.0, 100.0, 100.0) == ("100", "[100, 100]")
    assert format_interval(5, None, None) == ("5", "")


def test_bibtex_becomes_a_line_and_only_a_doi_becomes_an_address():
    line, doi = bibliography(
        '@article{a, author = {Kay, Kendrick N. and Yeatman, Jason D.}, title = "On {FFA}", '
        "journal = {eLife}, volume = 6, pages = {1--9}, year = 2017, doi = {10.7554/eLife.22341}}"
    )
    assert line == "Kendrick N. Kay, Jason D. Yeatman (2017) On FFA. eLife, 6, 1–9"
    assert doi == "https://doi.org/10.7554/eLife.22341"
    for bad in ("javascript:alert(1)", '10.1234/"><script>'):
        assert bibliography(f"@misc{{a, title = {{t}}, doi = {{{bad}}}}}")[1] is None
    assert bibliography("not bibtex {{{")[0] == "not bibtex {{{"
    accents = r"""@article{a, author = {Sch{\"u}tt, J{\'{\i}} and {\v S}ef, S{\o}ren and
        M\"uller, Fran\c{c}ois and Bie{\ss}mann, \AA sa}, title = {Salt \& {EEG}}}"""
    assert bibliography(accents)[0].startswith(
        "Jí Schütt, Søren Šef, François Müller, Åsa Bießmann Salt & EEG."
    )


def test_citations_are_numbered_and_unknown_ones_stay():
    pieces = numbered("As shown [@a; @b]. Not [@c].", {"a": 2, "b": 1})
    assert pieces == [("As shown", [2, 1]), (". Not [@c].", [])]


# --- Figures ----------------------------------------------------------------------------------


def test_every_plot_is_one_that_plotly_knows(folder):
    graph_objects = pytest.importorskip("plotly.graph_objects")

    def plain(value, key=""):
        if isinstance(value, dict):
            return {k: plain(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v, key) for v in value]
        themed = isinstance(value, str) and key.endswith("color") and value.startswith("$")
        return "#123456" if themed else value

    kinds = set()
    for script in (folder / "assets" / "figures").glob("*.js"):
        text = script.read_text(encoding="ascii")
        start = text.index(",") + 1
        spec = json.loads(text[start : text.rindex(");")])
        kinds.add(spec["type"])
        if spec["type"] == "plot":
            graph_objects.Figure(data=plain(spec["data"]), layout=plain(spec["layout"]))
    assert kinds == {"plot", "rdm", "surface"}


def _figure(kind, data, **options):
    return Figure("f", kind, "Title", "Caption", data, options)


def test_intervals_are_drawn_from_the_value():
    data = xr.Dataset(
        {
            "value": ("item", [1.0, 2.0]),
            "low": ("item", [0.5, np.nan]),
            "high": ("item", [3.0, 4.0]),
        },
        {"item": ["a", "b"]},
    )
    trace = draw(_figure("points", data), "p").spec["data"][-1]
    assert trace["error_y"]["array"].tolist() == [2.0, 0.0]
    assert trace["error_y"]["arrayminus"].tolist() == [0.5, 0.0]


def test_items_lie_when_their_names_are_long_and_are_read_from_the_top():
    names = ["a name too long for a column", "b"]
    data = xr.Dataset({"value": ("item", [1.0, 2.0])}, {"item": names})
    spec = draw(_figure("bars", data), "p").spec
    trace = spec["data"][-1]
    order = dict(zip(trace["y"].tolist(), trace["x"].tolist(), strict=True))
    ticks = dict(
        zip(spec["layout"]["yaxis"]["tickvals"], spec["layout"]["yaxis"]["ticktext"], strict=True)
    )
    assert {ticks[y]: x for y, x in order.items()} == {names[0]: 1.0, "b": 2.0}


def test_the_best_cell_is_outlined_and_numbers_contrast_with_their_cell():
    z = np.array([[0.1, 0.9, np.nan], [0.8, 0.2, np.nan]])
    data = xr.Dataset({"value": (("row", "column"), z)}, {"row": ["a", "b"], "column": list("xyz")})
    spec = draw(_figure("heatmap", data, best_in="column"), "p").spec
    marked = {(round(s["y0"] + 0.45), round(s["x0"] + 0.47)) for s in spec["layout"]["shapes"]}
    assert marked == {(1, 0), (0, 1)}
    text = spec["data"][1]
    assert text["text"] == [".10", ".90", ".80", ".20"]
    assert text["textfont"]["color"] == ["#ffffff", "#101010", "#101010", "#ffffff"]
    with pytest.raises(SchemaError, match="best_in"):
        draw(_figure("heatmap", data, best_in="colum"), "p")


def test_distribution_says_what_it_drew():
    value = np.r_[np.linspace(0, 1, 101), np.nan]
    data = xr.Dataset(
        {"value": ("observation", value)},
        {"group": ("observation", ["g"] * 102), "ceiling": ("observation", np.full(102, 0.9))},
    )
    table = draw(_figure("distribution", data), "p").table
    assert table.loc[0].to_dict() == pytest.approx(
        {
            "group": "g",
            "n": 101,
            "lower quartile": 0.25,
            "median": 0.5,
            "upper quartile": 0.75,
            "median ceiling": 0.9,
        }
    )
    with pytest.raises(SchemaError, match="no finite value"):
        draw(
            _figure(
                "distribution",
                data.assign(value=data["value"] * np.nan, ceiling=data["ceiling"] * np.nan),
            ),
            "p",
        )


def test_matrices_of_dissimilarity_are_ranked_and_their_csv_is_not():
    rng = np.random.default_rng(0)
    m = rng.uniform(1, 5, (5, 5))
    m = (m + m.T) / 2
    np.fill_diagonal(m, 0)
    data = xr.Dataset(
        {"rdm": (("rdm_name", "stimulus", "stimulus_2"), m[None])},
        {"rdm_name": ["a"], "stimulus_id": ("stimulus", list("vwxyz"))},
    )
    figure = _figure("rdm", data)
    z = _unpacked(draw(figure, "p").spec["panels"][0]["z"])
    upper = np.triu_indices(5, 1)
    np.testing.assert_allclose(np.sort(z[upper]), np.linspace(0, 100, 10), rtol=1e-6)
    np.testing.assert_array_equal(z, z.T)
    assert np.isnan(np.diag(z)).all()
    table = frame(figure)
    assert len(table) == 10
    row = table[(table.stimulus == "w") & (table.stimulus_2 == "y")]
    assert row["a"].item() == pytest.approx(m[1, 3])
    values = _unpacked(draw(_figure("rdm", data, scale="value"), "p").spec["panels"][0]["z"])
    np.testing.assert_allclose(values[upper], m[upper], rtol=1e-6)


def _unpacked(typed):
    import base64

    shape = [int(n) for n in typed["shape"].split(",")]
    return np.frombuffer(base64.b64decode(typed["bdata"]), "<f4").reshape(shape)


def test_large_matrices_are_drawn_as_block_means():
    n = 420
    m = np.ones((n, n)) - np.eye(n)
    data = xr.Dataset(
        {"rdm": (("rdm_name", "stimulus", "stimulus_2"), m[None])},
        {"rdm_name": ["a"], "stimulus_id": ("stimulus", [f"s{i}" for i in range(n)])},
    )
    drawn = draw(_figure("rdm", data, scale="value"), "p")
    assert _unpacked(drawn.spec["panels"][0]["z"]).shape == (300, 300)
    assert "averages" in drawn.note


def test_many_points_are_thinned_and_the_csv_keeps_all():
    x = np.arange(9000.0)
    data = xr.Dataset({"x": ("observation", x), "y": ("observation", x)})
    figure = _figure("scatter", data, identity_line=True)
    drawn = draw(figure, "p")
    assert sum(len(t["x"]) for t in drawn.spec["data"][1:]) == 4000
    assert "9,000" in drawn.note and len(frame(figure)) == 9000


def test_a_scatter_is_coloured_by_its_values_within_an_outline():
    data = xr.Dataset(
        {
            "x": ("observation", [0.0, 1, 2]),
            "y": ("observation", [0.0, 1, 0]),
            "value": ("observation", [0.1, 0.4, 0.2]),
            "label": ("observation", ["Fz", "<b>Cz", "Pz"]),
        }
    )
    data["value"].attrs = {"long_name": "correlation"}
    outline = {"x": [0, 2, 0], "y": [0, 2, 0]}
    drawn = draw(_figure("scatter", data, outlines=[outline], equal_axes=True), "p")
    line, points = drawn.spec["data"]
    assert line["x"] == [0, 2, 0] and line["hoverinfo"] == "skip"
    marker = points["marker"]
    assert np.asarray(marker["color"]).tolist() == [0.1, 0.4, 0.2]
    assert (marker["cmin"], marker["cmax"]) == (0, 0.4) and marker["showscale"]
    assert "0.4" in points["customdata"][1] and "<b>Cz" not in points["customdata"][1][4:]
    assert drawn.spec["layout"]["yaxis"]["scaleanchor"] == "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hemisphere": ("vertex", ["left", "R"])}, "hemisphere"),
        ({"vertex": ("vertex", [0, N_VERTICES])}, "fsaverage5"),
        ({"vertex": ("vertex", [0.0, 1.5])}, "integers"),
    ],
)
def test_a_map_that_is_not_on_fsaverage5_is_refused(change, says):
    data = xr.Dataset(
        {"m": ("vertex", [0.1, 0.2])},
        {"vertex": ("vertex", [0, 1]), "hemisphere": ("vertex", ["L", "R"])},
    )
    with pytest.raises(SchemaError, match=says):
        draw(_figure("surface", data.assign_coords(change)), "p")


def test_packed_values_keep_four_digits_and_mark_what_is_missing():
    import base64

    values = np.array([-1.2, np.nan, 0.3337, 5.0])
    record = pack_values(values)
    steps = np.frombuffer(base64.b64decode(record["steps"]), "<u2").astype(float)
    assert steps[1] == 65535
    back = float(record["low"]) + float(record["step"]) * steps
    np.testing.assert_allclose(back[[0, 2, 3]], values[[0, 2, 3]], atol=1e-4)
    np.testing.assert_array_equal(pack_values(np.full(3, 2.0))["low"], "2.0")


def test_the_picture_shows_a_vertex_where_it_lies():
    """A patch painted red at the left temporal pole is red on the left of the left lateral view."""
    mesh = inflated()["L"]
    colours = np.full((N_VERTICES, 3), 128.0)
    pole = mesh.coordinates[:, 1] > np.quantile(mesh.coordinates[:, 1], 0.95)
    colours[pole] = (255, 0, 0)
    image = np.asarray(draw_view(0, {"L": colours}, 120).convert("RGBA")).astype(int)
    seen = image[..., 3] > 128
    red = seen & (image[..., 0] > 2 * image[..., 1] + 20)
    assert red.sum() > 50 and 0.3 < seen.mean() < 0.95
    assert np.nonzero(red)[1].mean() < 0.25 * image.shape[1]
    right = np.asarray(draw_view(3, {"R": colours}, 120).convert("RGBA")).astype(int)
    red = (right[..., 3] > 128) & (right[..., 0] > 2 * right[..., 1] + 20)
    assert np.nonzero(red)[1].mean() > 0.75 * right.shape[1]


def test_colour_limits_follow_the_kind_of_map():
    values = np.array([-0.02, 0.1, 0.5, np.nan])
    assert colour_limits(values, "sequential", {}, trim=0) == (0.0, 0.5)
    assert colour_limits(values, "diverging", {}, trim=0) == (-0.5, 0.5)
    assert colour_limits(values, "sequential", {"vmin": -1, "vmax": 2}) == (-1.0, 2.0)
    assert colour_limits(np.array([np.nan]), "sequential", {}) == (0.0, 1.0)
    assert len({tuple(c) for c in colour_table("categorical", 20).tolist()}) == 20


# --- The folder -------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_everything_it_names_is_there(folder, page):
    assert len(set(page.ids)) == len(page.ids)
    local = [a for _, a in page.links if not a.startswith(("#", "https://doi.org/", "data:"))]
    assert len([a for a in local if ".csv" in a]) == 12 + len(hostile().figures)
    for address in local:
        assert (folder / address).is_file(), address
    for _, address in page.links:
        if address.startswith("#"):
            assert address[1:] in page.ids, address
    for name in ("aria-labelledby", "aria-describedby", "for"):
        for tag, attrs in page.tags:
            if name in attrs:
                assert attrs[name] in page.ids, (tag, attrs)


def test_headings_descend_and_pictures_have_words(page):
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(attrs.get("alt") is not None for tag, attrs in page.tags if tag == "img")
    tags = [t for t, _ in page.tags]
    assert tags.count("main") == 1 and tags.count("nav") == 1
    assert tags.count("figure") == tags.count("figcaption") == 12 + len(hostile().figures)


def test_no_text_becomes_markup_or_an_address(folder, page):
    # Every script, address and handler on the page is the template's own.
    scripts = [a for t, a in page.tags if t == "script"]
    assert [s.get("src") for s in scripts] == ["assets/report.js"]
    assert not [a for _, a in page.tags for k in a if k.startswith("on")]
    allowed = ("#", "assets/", "https://doi.org/10.", "data:,")
    assert all(a.startswith(allowed) for _, a in page.links)
    said = "".join(page.text)
    for text in HOSTILE:
        assert clean(text).split("\n")[0] in said
    for file in folder.rglob("*.js"):
        if file.parent.name == "figures":
            assert "<" not in file.read_text(encoding="ascii")
    for file in folder.rglob("*"):
        assert re.fullmatch(r"[a-zA-Z0-9.-]+", file.name), file


def test_policy_forbids_the_network(page):
    policy = next(
        a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {r.split()[0]: r.split()[1:] for r in policy.split(";")}
    assert rules["default-src"] == ["'none'"] and rules["connect-src"] == ["'none'"]
    assert "'unsafe-inline'" not in rules["script-src"]
    assert not any("http" in source for sources in rules.values() for source in sources)


def test_csv_holds_the_data(folder):
    maps = pd.read_csv(
        folder / "assets" / "data" / "encoding--maps.csv", keep_default_na=False, na_values=[""]
    )
    truth = surface_data()
    shown = np.isfinite(truth["r"].values) | np.isfinite(truth["preferred"].values)
    shown |= np.isfinite(truth["people"].values)
    assert len(maps) == shown.sum()
    np.testing.assert_allclose(maps["r"], truth["r"].values[shown], rtol=1e-4)
    for file in (folder / "assets" / "data").iterdir():
        text = file.read_bytes()
        rows = list(
            csv.reader(
                io.StringIO((gzip.decompress(text) if file.suffix == ".gz" else text).decode())
            )
        )
        assert len(rows) > 1 and len({len(r) for r in rows}) == 1
        for cell in (c for row in rows for c in row):
            if cell.lstrip()[:1] in ("=", "+", "@"):
                raise AssertionError(f"{file.name} holds a formula: {cell!r}")


def test_long_csv_are_compressed(tmp_path):
    x = np.random.default_rng(0).normal(size=150_000)
    figure = _figure("scatter", xr.Dataset({"x": ("observation", x), "y": ("observation", x)}))
    section = write_section(Section("s", "S", "", [figure]), tmp_path / "s")
    build_report([section], tmp_path / "report", title="t")
    back = pd.read_csv(tmp_path / "report" / "assets" / "data" / "s--f.csv.gz")
    np.testing.assert_allclose(back["x"], x, rtol=1e-5)


def test_the_zip_holds_the_whole_report(folder, tmp_path):
    with zipfile.ZipFile(folder / ZIP_NAME) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    inside = {
        p.relative_to(tmp_path / "report") for p in (tmp_path / "report").rglob("*") if p.is_file()
    }
    beside = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} - {Path(ZIP_NAME)}
    assert inside == beside


def test_the_report_is_small(folder):
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 15e6
    assert len(list(folder.rglob("plotly*.js"))) == len(list(folder.rglob("mesh.js"))) == 1


def test_pictures_open(folder):
    for file in (folder / "assets" / "images").iterdir():
        with Image.open(file) as image:
            image.load()


def test_sections_are_ordered_and_what_went_wrong_is_said(page):
    said = " ".join("".join(page.text).split())
    at = [
        said.index(t)
        for t in ("How well the responses repeat", "Ridge regression from", "Which images a brain")
    ]
    assert at == sorted(at)
    for text in (
        "Monkey 2: stimulus 17 has no response",
        "38 of 20,484 vertices: constant",
        "set BRAINALIGN_MIRROR",
        "0.612",
        "[0.587, 0.634]",
        "10.1016/j.neuron.2008.10.043",
        "config sha256",
        "brainalign demo --cores 2",
    ):
        assert text.lower() in said.lower(), text


def test_the_same_sections_give_the_same_bytes(tmp_path):
    data = xr.Dataset({"value": ("item", [1.0])}, {"item": ["a"]})
    section = write_section(Section("s", "S", "Intro", [_figure("bars", data)]), tmp_path / "s")
    read = [build_report([section], tmp_path / n / "report", title="t") for n in ("a", "b")]
    zips = [(p.parent / ZIP_NAME).read_bytes() for p in read]
    assert zips[0] == zips[1] and len(zips[0]) > 1e6


def test_nothing_is_written_when_a_figure_cannot_be_drawn(tmp_path):
    data = xr.Dataset({"value": ("item", [1.0])}, {"item": ["a"]})
    good = write_section(Section("good", "S", "", [_figure("bars", data)]), tmp_path / "good")
    bad = write_section(
        Section("bad", "S", "", [_figure("bars", data, width="wide")]), tmp_path / "bad"
    )
    with pytest.raises(SchemaError, match="width"):
        build_report([good, bad], tmp_path / "report", title="t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]
    first = build_report([good], tmp_path / "report", title="t").read_text()
    with pytest.raises(SchemaError, match="one id"):
        build_report([good, good], tmp_path / "report", title="t")
    with pytest.raises(UnavailableError, match="section"):
        build_report([tmp_path], tmp_path / "report", title="t")
    assert (tmp_path / "report" / "index.html").read_text() == first


def test_a_report_of_nothing_still_reads(tmp_path):
    path = build_report(
        [], tmp_path / "report", title="Empty", left_out=[{"name": "All", "reason": "no data"}]
    )
    said = "".join(Page(path.read_text()).text)
    assert "no data" in said and "No errors were recorded" in said
    assert not (path.parent / "assets" / "mesh.js").exists()
