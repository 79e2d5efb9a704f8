"""The report as a reader meets it: opened from disk in Chromium, without a network."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from chromium import Browser, chromium
from fake_sections import HOSTILE, hostile, report_arguments, write_fakes

from brainalign.report import build_report

pytestmark = pytest.mark.browser

WIDTHS = (375, 1440)
TAB, ENTER, RIGHT = "\ue004", "\ue007", "\ue014"

# Contrast by WCAG 2, of every visible text with the nearest opaque ground behind it.
CONTRAST = """
const rgb = (text) => {
  const m = text.match(/[\\d.]+/g).map(Number);
  return [m[0], m[1], m[2], m[3] ?? 1];
};
const linear = (v) => v <= 10.31 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c;
  }
  return [255, 255, 255, 1];
};
const bad = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const box = e.getBoundingClientRect();
  if (!own || !box.width || !e.checkVisibility()) continue;
  if (e.closest("svg, .js-plotly-plot, .sr, .skip")) continue;
  const a = light(rgb(getComputedStyle(e).color)), b = light(ground(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.push([e.tagName, e.className, e.textContent.trim().slice(0, 40), ratio]);
}
for (const e of document.querySelectorAll(".js-plotly-plot text")) {
  if (e.closest(".textpoint, .scatterlayer") || !e.textContent.trim()) continue;
  const a = light(rgb(getComputedStyle(e).fill)), b = light(ground(e.closest("figure")));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5)
    bad.push(["plot", e.closest("figure").id, e.textContent.slice(0, 40), ratio]);
}
return bad;
"""

ALL_DRAWN = """
const all = [...document.querySelectorAll("[data-figure]")];
const next = all.find((e) => !e.dataset.drawn);
next?.scrollIntoView({ behavior: "instant", block: "center" });
return !next;
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("report")
    sections = write_fakes(made / "sections", with_hostile=True)
    return build_report(sections, made / "report", **report_arguments())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def opened(browser: Browser, report: Path) -> Browser:
    """Return the browser with the report open and every figure drawn, logs from its opening on."""
    browser.go("about:blank")
    browser.size(1440)
    browser.theme("light")
    browser.log("browser")
    browser.log("performance")
    browser.go(report.as_uri())
    browser.wait(ALL_DRAWN, 180)
    return browser


def _show(browser: Browser, width: int, theme: str) -> None:
    browser.size(width)
    browser.theme(theme)
    time.sleep(0.8)
    browser.wait(ALL_DRAWN)


def test_no_error_no_request_leaves_and_pictures_load(opened: Browser, report: Path):
    opened.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    opened.run("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
    opened.wait("return [...document.images].every((i) => i.complete)")
    assert (
        opened.run("return [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)")
        == []
    )
    assert opened.run("return document.images.length") > 60
    opened.run("document.querySelectorAll('details.alt').forEach((d) => { d.open = false; })")
    errors = [e for e in opened.log("browser") if e["level"] in ("SEVERE", "ERROR")]
    assert errors == []
    asked = set()
    for entry in opened.log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    here = report.parent.as_uri()
    assert [u for u in asked if not u.startswith((here, "data:", "blob:"))] == []
    assert any(u.endswith("plotly.min.js") for u in asked)


def test_a_request_would_be_stopped(opened: Browser):
    stopped = opened.run(
        "return new Promise((done) => { document.addEventListener('securitypolicyviolation',"
        " (e) => done(e.violatedDirective), { once: true });"
        " fetch('http://127.0.0.1:9/').catch(() => {}); })"
    )
    assert stopped == "connect-src"
    opened.log("browser")


def test_hostile_text_stays_text(opened: Browser):
    assert opened.run("return document.title") == report_arguments()["title"]
    # What plotly draws shows names letter by letter: no element, no link, no bold is made of them.
    titles = opened.run(
        'return [...document.querySelectorAll(\'[id$="--heatmap"] .js-plotly-plot .ytick text,'
        ' [id$="--bars"] .js-plotly-plot .ytick text\')].map((t) => t.textContent)'
    )
    assert any(t.startswith("<script>") for t in titles)
    assert any("<img" in t for t in titles)
    assert any(t.startswith("%{") for t in titles)
    # Plotly's own scripts and links would live inside its plots.
    made = "a, script, foreignObject, iframe"
    within = ", ".join(f".js-plotly-plot {x}" for x in made.split(", "))
    count = "return document.querySelectorAll(arguments[0]).length"
    assert opened.run(count, within + ", main script, main iframe, figure b") == 0
    legend = opened.run(
        "return [...document.querySelectorAll('[id$=\"--curve\"] .legendtext')].map((t) => "
        "t.textContent)"
    )
    assert HOSTILE[0] in legend and HOSTILE[5] in legend
    words = opened.run(
        "return [...document.querySelectorAll('.tile-label')].map((t) => t.textContent)"
    )
    assert HOSTILE[1] in words


def test_hover_text_stays_text(opened: Browser):
    said = opened.run(
        'const plot = document.querySelector(\'[id$="--points"] .js-plotly-plot[data-figure^="x-"],'
        ' [id*="script"][id$="--points"] .js-plotly-plot\');'
        "Plotly.Fx.hover(plot, [{ curveNumber: plot.data.length - 1, pointNumber: 5 }]);"
        "return plot.querySelector('.hoverlayer').textContent"
    )
    assert "<a href=" in said
    assert opened.run("return document.querySelectorAll('.hoverlayer a').length") == 0
    opened.run(
        "document.querySelectorAll('.js-plotly-plot.plot').forEach((p) => Plotly.Fx.unhover(p))"
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_and_contrasts(opened: Browser, width: int, theme: str):
    _show(opened, width, theme)
    assert opened.run("return document.documentElement.scrollWidth") <= width
    wide = opened.run(
        "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, "
        ".static, pre, svg, .small-tiles')"
        " && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map((e) => "
        "e.outerHTML.slice(0, 90))"
    )
    assert wide == []
    gaps = opened.run(
        "return [...document.querySelectorAll('figure')].filter((f) => {"
        " const at = (s, edge) => f.querySelector(s).getBoundingClientRect()[edge];"
        " return at('.drawing', 'top') - at('h3', 'bottom') > 24"
        " || f.getBoundingClientRect().bottom - Math.max(at('figcaption', 'bottom'),"
        " at('.drawing', 'bottom')) > 40; }).map((f) => f.id)"
    )
    assert gaps == [], "figures with empty room in them"
    assert opened.run(CONTRAST) == []
    smallest = opened.run(
        "return Math.min(...[...document.querySelectorAll('main p, main td, main li, main dd')]"
        ".filter((e) => e.checkVisibility()).map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11


def test_plots_follow_the_theme_button(opened: Browser):
    _show(opened, 1440, "light")
    ink = "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    before = opened.run(ink)
    opened.run("document.querySelector('.theme').click()")
    opened.wait(f"return ({ink.removeprefix('return ')}) !== {json.dumps(before)}")
    assert opened.run("return document.documentElement.dataset.theme") == "dark"
    opened.run("document.querySelector('.theme').click()")
    opened.wait(f"return ({ink.removeprefix('return ')}) === {json.dumps(before)}")
    opened.run("delete document.documentElement.dataset.theme")


def test_everything_is_reached_by_keyboard(opened: Browser):
    _show(opened, 1440, "light")
    opened.run("document.activeElement.blur(); scrollTo(0, 0)")
    opened.key(TAB)
    assert opened.run("return document.activeElement.className") == "skip"
    assert opened.run("return document.activeElement.getBoundingClientRect().left") >= 0
    opened.key(ENTER)
    assert opened.run("return document.activeElement.id") == "main"
    # What can be clicked can be tabbed to, and shows it.
    opened.run("window.reached = new Set(); document.activeElement.blur();")
    missing = opened.run(
        "return [...document.querySelectorAll('a[href], button, select, summary, [role=region], "
        "[role=application]')]"
        ".filter((e) => e.checkVisibility() && e.tabIndex < 0).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert missing == []
    opened.run("document.querySelector('figure .button').focus()")
    opened.key(TAB)
    style = opened.run(
        "const s = getComputedStyle(document.activeElement); return "
        "[document.activeElement.tagName, s.outlineStyle, parseFloat(s.outlineWidth)]"
    )
    assert style[0] == "BUTTON" and style[1] == "solid" and style[2] >= 2


def test_the_cortex_turns_by_keyboard_and_switches_maps(opened: Browser):
    _show(opened, 1440, "light")
    find = "const box = document.querySelector('#encoding--maps .surface');"
    if not opened.run("return Boolean(document.createElement('canvas').getContext('webgl'))"):
        pytest.fail("this Chromium has no WebGL, not even in software")
    eye = find + "return JSON.stringify(box.querySelector('.plot3d').layout.scene.camera.eye)"
    before = opened.run(eye)
    opened.run(find + "box.querySelector('.plot3d').focus()")
    opened.key(RIGHT)
    opened.wait(f"{eye.replace('return ', 'return (')}) !== {json.dumps(before)}")
    colours = find + "return box.querySelector('.plot3d').data[0].vertexcolor.join()"
    first = opened.run(colours)
    opened.run(
        find + "const s = box.querySelector('select'); s.value = '3'; s.dispatchEvent(new "
        "Event('change', { bubbles: true }))"
    )
    opened.wait(colours.replace("return ", "return (") + ".length > 0)")
    opened.wait(
        f"{find} return box.querySelector('.plot3d').data[0].text.some((t) => t.endsWith('people'))"
    )
    assert opened.run(colours) != first
    shown = opened.run(
        find + "return [...box.querySelectorAll('.map')].map((m) => m.checkVisibility())"
    )
    assert shown == [False, False, False, True]
    opened.run(find + "box.querySelector('[data-view=left]').click()")
    opened.wait(find + "return box.querySelector('.plot3d').data[1].visible === false")


def test_a_pair_of_images_is_shown_with_its_dissimilarity(opened: Browser):
    _show(opened, 1440, "light")
    said = opened.run(
        "const box = document.querySelector('#rsa--rdms .rdm');"
        "const plot = box.querySelector('.matrix');"
        "plot.emit('plotly_hover', { points: [{ x: 3, y: 30 }], event: { clientX: 300, clientY: "
        "300 } });"
        "const tip = box.querySelector('.tip');"
        "return [tip.hidden, tip.textContent, [...tip.querySelectorAll('img')].map((i) => "
        "i.getAttribute('src'))]"
    )
    assert said[0] is False
    assert "place-06" in said[1] and "face-03" in said[1] and "dissimilarity" in said[1]
    assert len(said[2]) == 2 and all((s or "").startswith("assets/images/") for s in said[2])


def test_text_is_copied_from_a_file(opened: Browser):
    opened.cdp(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    opened.run(
        "window.copied = null; const write = navigator.clipboard?.writeText;"
        "if (navigator.clipboard) navigator.clipboard.writeText = (t) => { window.copied = t; "
        "return Promise.resolve(); };"
    )
    opened.run("document.querySelector('[data-from=bibtex]').click()")
    opened.wait("return window.copied && window.copied.includes('@article{kriegeskorte2008')")
    opened.run("document.querySelector('[data-from=methods-source]').click()")
    opened.wait("return window.copied.includes('[@kriegeskorte2008; @kay2017]')")
    opened.run("document.querySelector('[data-from=methods-text]').click()")
    opened.wait(
        "return window.copied.includes('References') && !window.copied.includes('[@kay2017]')"
    )
    assert opened.run("return document.querySelector('.said').textContent") == "Copied"


def test_nothing_went_wrong_in_all_that(opened: Browser):
    assert [e for e in opened.log("browser") if e["level"] in ("SEVERE", "ERROR")] == []
    assert opened.run("return document.querySelectorAll('[data-figure]').length") >= len(
        hostile().figures
    )


def test_without_scripts_words_pictures_and_tables_remain(browser: Browser, report: Path):
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.go(report.as_uri())
        assert browser.run("return document.querySelector('noscript p').textContent").startswith(
            "Scripts are off"
        )
        assert (
            browser.run("return getComputedStyle(document.querySelector('.viewer')).display")
            == "none"
        )
        assert browser.run("return document.querySelectorAll('.map').length") >= 4
        hidden = "(m) => !m.checkVisibility()"
        count = f"return [...document.querySelectorAll('.map')].filter({hidden}).length"
        assert browser.run(count) == 0
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)
