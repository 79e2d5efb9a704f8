"""Category and template models: planted parameters, and the known answers of Kay & Yeatman 2017."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.data.section import read_section, write_section
from brainalign.encoding import parametric as pm
from brainalign.errors import SchemaError


def images(n: int = 20, m: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Template match and energy of images of all contrasts."""
    rng = np.random.default_rng(seed)
    energy = rng.uniform(0.02, 3, (n, 1)) * rng.uniform(0.8, 1.2, (n, m))
    return pm.template_inputs(energy * rng.uniform(0.3, 1.2, (n, m)), energy)


def test_r2_is_relative_to_zero():
    y = np.array([[3.0, 1.0], [4.0, 2.0]])
    np.testing.assert_allclose(pm.r2_from_zero(y, 0 * y), 0)
    np.testing.assert_allclose(pm.r2_from_zero(y, y), 100)
    np.testing.assert_allclose(pm.r2_from_zero(y, y.mean(0) + 0 * y), [98, 90])


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 15), st.integers(1, 3), st.integers(1, 4), st.integers(0, 100))
def test_leave_one_out_equals_refitting(n, k, targets, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, k)), rng.standard_normal((n, targets))
    by_hand = np.empty_like(y)
    for i in range(n):
        keep = np.arange(n) != i
        by_hand[i] = x[i] @ np.linalg.lstsq(x[keep], y[keep], rcond=None)[0]
    np.testing.assert_allclose(pm.leave_one_out(x, y), by_hand, atol=1e-8)


def test_category_model_predicts_the_mean_of_the_others():
    labels = ["WORD", "WORD", "WORD", "FACE", "OTHER"]
    y = np.array([[1.0], [2.0], [6.0], [10.0], [20.0]])
    found = pm.leave_one_out(pm.category_design(labels, "WORD"), y)
    np.testing.assert_allclose(found[:, 0], [4, 3.5, 1.5, 20, 10])
    found = pm.leave_one_out(pm.category_design(labels, None), y)
    np.testing.assert_allclose(found[0], y[1:].mean())


def test_unusable_designs_are_refused():
    with pytest.raises(SchemaError, match="alone decides"):
        pm.leave_one_out(pm.category_design(["WORD", "FACE", "FACE"], "WORD"), np.ones((3, 1)))
    with pytest.raises(SchemaError, match="'WROD'"):
        pm.category_design(["WORD", "FACE"], "WROD")
    with pytest.raises(SchemaError, match="Expected"):
        pm.leave_one_out(np.ones((3, 1)), np.ones((4, 1)))
    a, b = images()
    with pytest.raises(SchemaError, match="Expected a and b"):
        pm.fit_template(a, b[:, :2], np.ones(len(a)))


@pytest.mark.parametrize(
    ("gain", "sigma", "c"), [(0.4, 0.05, 0.1), (1.1, 0.3, 0.6), (0.2, 0.02, -0.8), (0.5, 2.0, 0.0)]
)
def test_planted_parameters_come_back(gain, sigma, c):
    a, b = images()
    y = pm.template_response(a, b, gain, sigma, c)
    found = pm.fit_template(a, b, y)
    assert found.gain == pytest.approx(gain, rel=2e-3)
    assert found.sigma == pytest.approx(sigma, rel=2e-3)
    assert found.c == pytest.approx(c, abs=2e-3)
    np.testing.assert_allclose(found.fit, y, atol=1e-4)
    np.testing.assert_allclose(found.prediction, y, atol=1e-3)


def test_left_out_stimulus_does_not_reach_its_prediction():
    a, b = images()
    y = pm.template_response(a, b, 0.4, 0.05, 0.1)
    y = y + 0.02 * np.random.default_rng(1).standard_normal(len(y))
    before = pm.fit_template(a, b, y).prediction
    y[7] += 5
    after = pm.fit_template(a, b, y).prediction
    assert after[7] == pytest.approx(before[7], abs=1e-12)
    assert np.abs(after - before).max() > 0.01


def test_energy_alone_is_the_limit_of_c():
    a, b = images(seed=2)
    y = 0.7 * (b / (0.1 + b)).mean(axis=1)
    found = pm.fit_template(a, b, y)
    assert found.c < -50 and np.abs(found.fit - y).max() < 1e-3


def test_responses_below_zero_get_no_negative_gain():
    a, b = images()
    found = pm.fit_template(a, b, -pm.template_response(a, b, 1, 0.1, 0.2))
    assert found.gain == 0 and not found.fit.any() and not found.prediction.any()


def test_section_from_a_bundle_of_another_study(tmp_path):
    from brainalign.data.bundle import write_bundle
    from brainalign.data.studies import Study

    write_bundle(Study("other", extras={"experiment1": xr.Dataset()}), tmp_path / "b")
    with pytest.raises(SchemaError, match="'projections'"):
        pm.section_from_folder(tmp_path / "b")


# Kay & Yeatman 2017: the known answers.


@pytest.fixture(scope="module")
def kay(kay2017_study):
    return kay2017_study.extras


@pytest.fixture(scope="module")
def evaluated(kay) -> pm.ParametricResult:
    return pm.evaluate_parametric(
        kay["experiment1"], kay["projections"], kay["models"], n_bootstrap=200
    )


def score(result: pm.ParametricResult, model: str) -> list[float]:
    return [round(float(v), 2) for v in result.scores["r2"].sel(model=model)]


def inputs(kay, template: str) -> tuple[np.ndarray, np.ndarray]:
    match = kay["projections"]["template_match"].sel(template_name=template).values
    energy = kay["projections"]["energy"].values
    return pm.template_inputs(match.reshape(23, 10), energy.reshape(23, 10))


def test_category_models(evaluated):
    assert score(evaluated, "Flat") == [74.59, 57.68]
    assert score(evaluated, "CategoryWord") == [87.80, 55.95]
    assert score(evaluated, "CategoryFace") == [73.88, 75.32]


def test_category_predictions_are_the_stored_ones(kay, evaluated):
    for model in ("Flat", "CategoryWord", "CategoryFace"):
        own = evaluated.predictions["prediction"].sel(model=model)
        stored = kay["models"]["prediction"].sel(model=model)
        np.testing.assert_allclose(own.values, stored.values, atol=1e-3)


def test_stored_predictions_have_the_stored_performance(kay, evaluated):
    y = kay["experiment1"]["responses"].values
    for model in kay["models"]["model"].values:
        found = pm.r2_from_zero(y, kay["models"]["prediction"].sel(model=model).values.T)
        expected = kay["models"]["performance"].sel(model=model).values
        np.testing.assert_allclose(found, expected, atol=1e-6)
    known = {
        "TemplateWordOnlySub": (60.64, 30.14),
        "TemplateWordOnlyDiv": (91.26, 53.30),
        "TemplateFaceOnlySub": (62.26, 43.34),
        "TemplateFaceOnlyDiv": (77.39, 80.43),
        **{m: v for m, v in pm.PUBLISHED.items() if m != "ceiling"},
    }
    assert set(known) == set(kay["models"]["model"].values)
    for model, values in known.items():
        stored = kay["models"]["performance"].sel(model=model).values
        np.testing.assert_allclose(stored, values, atol=0.006)


@pytest.mark.parametrize(("model", "template"), pm.TEMPLATE_MODELS.items())
def test_stored_parameters_reproduce_the_stored_fit(kay, model, template):
    a, b = inputs(kay, template)
    for roi in range(2):
        gain, sigma, c = kay["models"]["parameters"].sel(model=model).values[roi]
        fit = kay["models"]["fit"].sel(model=model).values[roi]
        np.testing.assert_allclose(pm.template_response(a, b, gain, sigma, c), fit, atol=1e-6)


def test_template_models_refitted(kay, evaluated):
    """Known from random starts: 90.8, 78.1, 86.3; and 59.5 for words in FFA, a local minimum.

    There the search goes on to c = -inf, where the squared error is lower still.
    """
    word, face = score(evaluated, "TemplateWord"), score(evaluated, "TemplateFace")
    assert [round(v, 1) for v in (word[0], *face)] == [90.8, 78.1, 86.3]
    assert word[1] == pytest.approx(63.03, abs=0.02)
    assert evaluated.fits["TemplateWord", "FFA"].c == -np.inf
    y = kay["experiment1"]["responses"].values
    for (model, roi), fit in evaluated.fits.items():
        i = ("VWFA", "FFA").index(roi)
        theirs = kay["models"]["fit"].sel(model=model).values[i]
        assert ((fit.fit - y[:, i]) ** 2).sum() < ((theirs - y[:, i]) ** 2).sum()


def test_no_random_start_finds_a_better_fit(kay):
    from scipy.optimize import least_squares

    rng = np.random.default_rng(0)
    y = kay["experiment1"]["responses"].values
    for template, roi in (("WORD", 0), ("FACE", 0), ("FACE", 1)):
        a, b = inputs(kay, template)
        own = ((pm.fit_template(a, b, y[:, roi]).fit - y[:, roi]) ** 2).sum()

        def residual(p, a=a, b=b, roi=roi):
            return pm.template_response(a, b, p[0], abs(p[1]) + 1e-9, p[2]) - y[:, roi]

        starts = rng.uniform([0.1, 0.01, -2], [1.5, 1, 2], (10, 3))
        costs = [2 * least_squares(residual, p, method="lm").cost for p in starts]
        assert own <= min(costs) * (1 + 1e-6)


def test_noise_ceilings(kay, evaluated):
    own = evaluated.scores["ceiling"].values
    np.testing.assert_allclose(own, [97.88, 97.66], atol=0.05)
    stored = kay["noise_ceiling"]
    np.testing.assert_allclose(stored["ceiling"], [97.85, 97.62], atol=0.006)
    np.testing.assert_allclose(np.median(stored["samples"], axis=0), stored["ceiling"], atol=1e-9)
    np.testing.assert_allclose(own, stored["ceiling"], atol=0.1)


def test_kay_section(evaluated, tmp_path):
    section = read_section(write_section(pm.section(evaluated), tmp_path / "s"))
    assert [f.kind for f in section.figures] == ["bars", "scatter"]
    by_label = {e.label: e for e in section.summary}
    assert by_label["CategoryWord, VWFA"].reference == "authors' 87.80"
    assert by_label["TemplateFace, FFA"].reference == "authors' 84.79"
    for e in section.summary:
        assert e.low is None or e.low <= e.value <= e.high
    assert "c → −∞" in section.methods
    lines = section.figures[0].options["reference_lines"]
    assert [line["label"] for line in lines] == ["ceiling VWFA", "ceiling FFA"]
