"""Representational similarity and CKA as a section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from brainalign.data.bundle import read_bundle
from brainalign.data.section import Estimate, Figure, Section
from brainalign.data.stimuli import StimulusSet
from brainalign.errors import SchemaError, UnknownNameError, near
from brainalign.evaluation.layer_roi import layer_roi_cka, layer_roi_rsa
from brainalign.evaluation.rsa import (
    average_rdms,
    average_sessions,
    choose_layer_rsa,
    compare_rdms,
    evaluate_rdms,
    rdm,
    stack_rdms,
)
from brainalign.features import read_manifest

__all__ = ["layer_roi_section", "rsa_section", "rsa_section_from_folders"]

_THUMBNAIL = 64
_LEAST_SUBJECTS = 4


def rsa_section_from_folders(
    features: Sequence[str | Path],
    *,
    data: str | Path,
    stimuli: StimulusSet,
    titles: Mapping[str, str],
    baselines: Sequence[str] = (),
    target: str = "human_it",
    bootstraps: int = 1000,
    seed: int = 0,
) -> Section:
    """Compare the layers of models with the RDMs of a bundle, or with the regions of its responses.

    Parameters
    ----------
    features : sequence of path
        Feature manifests, named after their models.
    data : path
        The bundle. Its extras of the ``rdms`` schema other than the target are shown beside it; a
        bundle that has none, but responses, gives `layer_roi_section`.
    stimuli : StimulusSet
        The images.
    titles : mapping of str to str
        Title by model.
    baselines : sequence of str
        Models that others are compared with.
    target : str
        The extra to explain: one RDM a subject, or several with a coordinate ``subject``.
    bootstraps, seed : int
        See `brainalign.evaluation.rsa.evaluate_rdms`.

    Raises
    ------
    UnknownNameError
        If the bundle has no such RDMs.
    """
    bundle = read_bundle(data)
    extras = {k: v for k, v in bundle.extras.items() if "rdm" in v}
    if not extras and bundle.responses:
        return layer_roi_section(
            {Path(path).stem: read_manifest(path) for path in features},
            bundle.responses,
            titles=titles,
            baselines=baselines,
            bootstraps=bootstraps,
            seed=seed,
        )
    if target not in extras:
        raise UnknownNameError(
            f"The study in {data} has no RDMs {target!r}.{near(target, extras)}",
            f"It has: {', '.join(extras) or 'none'}.",
        )
    layers = {
        Path(path).stem: {
            layer: rdm(ds, stimulus_id=stimuli.ids) for layer, ds in read_manifest(path).items()
        }
        for path in features
    }
    others = {k: v for k, v in extras.items() if k not in (target, f"{target}_mean")}
    return rsa_section(
        layers,
        extras[target],
        others,
        stimuli=stimuli,
        titles=titles,
        baselines=baselines,
        target=target.replace("_it", " IT").replace("_", " "),
        bootstraps=bootstraps,
        seed=seed,
    )


def _points(evaluated: xr.Dataset, names: Sequence[tuple[str, str]], label: str) -> xr.Dataset:
    """Lay the rows of an evaluation out as (layer, model)."""
    items = list(dict.fromkeys(layer for _, layer in names))
    series = list(dict.fromkeys(model for model, _ in names))
    out = {k: np.full((len(items), len(series)), np.nan) for k in ("value", "low", "high")}
    for k, values in out.items():
        for (model, layer), x in zip(names, evaluated[k].values, strict=True):
            values[items.index(layer), series.index(model)] = x
    ds = xr.Dataset(
        {k: (("item", "series"), v) for k, v in out.items()},
        coords={"item": items, "series": series},
    )
    ds["value"].attrs = {"long_name": label, "units": ""}
    return ds


def _thumbnails(stimuli: StimulusSet) -> dict[str, object]:
    images: dict[str, object] = {}
    for i, name in enumerate(stimuli.ids):
        image = stimuli.open(i)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        images[name] = image
    return images


def rsa_section(
    layers: Mapping[str, Mapping[str, xr.Dataset]],
    target_rdms: xr.Dataset,
    others: Mapping[str, xr.Dataset],
    *,
    stimuli: StimulusSet,
    titles: Mapping[str, str],
    baselines: Sequence[str] = (),
    target: str = "the target",
    bootstraps: int = 1000,
    seed: int = 0,
) -> Section:
    """Describe how well the layers of models explain the RDMs of subjects.

    Parameters
    ----------
    layers : mapping of model to mapping of layer to xarray.Dataset
        RDMs of the ``rdms`` schema.
    target_rdms : xarray.Dataset
        RDMs of subjects; sessions of one ``subject`` are averaged.
    others : mapping of str to xarray.Dataset
        More RDMs to compare the target with (another species, behaviour, published models).
    stimuli : StimulusSet
        The images.
    titles : mapping of str to str
        Title by model.
    baselines : sequence of str
        Models that others are compared with.
    target : str
        Name of the target.
    bootstraps, seed : int
        See `brainalign.evaluation.rsa.evaluate_rdms`.

    Raises
    ------
    SchemaError
        If there are no layers.
    """
    names = [(titles.get(m, m), layer) for m, by in layers.items() for layer in by]
    if not names:
        raise SchemaError("There are no layers to compare.")
    subjects = average_sessions(target_rdms)
    mean = average_rdms(subjects, f"mean {target}")
    every = stack_rdms({f"{m}:{n}": r for m, by in layers.items() for n, r in by.items()})
    on_mean = evaluate_rdms(every, mean, n_bootstrap=bootstraps, seed=seed)
    over = "both" if subjects.sizes["rdm_name"] > 1 else "stimuli"
    on_each = evaluate_rdms(every, subjects, over=over, n_bootstrap=bootstraps, seed=seed)
    lower, upper = (float(x) for x in on_each["ceiling"].values)

    known: dict[str, xr.Dataset] = {}
    headline: list[str] = []
    for name, ds in others.items():
        if "subject" in ds.coords:
            known[f"{name} (mean)"] = average_rdms(ds, name)
            headline.append(f"{name} (mean)")
            continue
        rows = ds["rdm_name"].values.astype(str).tolist()
        known |= {row: ds.isel(rdm_name=[i]) for i, row in enumerate(rows)}
        headline += rows if len(rows) == 1 else []

    figures = [
        Figure(
            "layers",
            "points",
            f"Layers against the mean {target} RDM",
            f"Spearman correlation of each layer's RDM with the RDM averaged over "
            f"{subjects.sizes['rdm_name']} subjects, with the 95 % interval of a bootstrap over "
            f"{len(stimuli)} stimuli. Look for a peak in the deeper layers of a trained network "
            "that its untrained twin, pixels and the V1 model do not reach.",
            _points(on_mean, names, "Spearman ρ"),
            {"y_label": "Spearman ρ", "connect": True},
        ),
        Figure(
            "subjects",
            "points",
            "Layers against each subject, and the noise ceiling",
            "Mean over subjects of the Spearman correlation with that subject's own RDM; "
            "intervals of a bootstrap over subjects and stimuli together. The band is the "
            "noise ceiling: what the true RDM would reach given how much subjects differ. A layer "
            "inside it explains all that can be explained.",
            _points(on_each, names, "mean Spearman ρ"),
            {
                "y_label": "mean Spearman ρ",
                "connect": True,
                "reference_bands": [{"label": "noise ceiling", "low": lower, "high": upper}]
                if np.isfinite(lower)
                else [],
            },
        ),
    ]
    summary: list[Estimate] = []
    chosen_rdms: dict[str, xr.Dataset] = {f"mean {target}": mean}
    for model, by in layers.items():
        title = titles.get(model, model)
        own = [i for i, (t, _) in enumerate(names) if t == title]
        best = max(own, key=lambda i: float(on_mean["value"][i]))
        peak = names[best][1]
        chosen_rdms[f"{title}, {peak}"] = by[peak]
        if len(by) > 1 and model not in baselines:
            nested = choose_layer_rsa(stack_rdms(by), mean, seed=seed)
            often = float(nested["share"].max())
            layer = str(nested["model"].values[int(nested["share"].values.argmax())])
            summary.append(
                Estimate(
                    f"{title}, layer chosen on other stimuli",
                    float(nested["value"]),
                    float(nested["low"]),
                    float(nested["high"]),
                    "ρ",
                    f"random halves of the stimuli; {layer} was chosen {often:.0%} of the time; "
                    "jackknife interval",
                    f"noise ceiling {lower:.2f} to {upper:.2f} per subject"
                    if np.isfinite(lower)
                    else "",
                )
            )
        summary.append(
            Estimate(
                f"{title}, highest of {len(by)} layers ({peak})"
                if len(by) > 1
                else f"{title} ({peak})",
                float(on_mean["value"][best]),
                float(on_mean["low"][best]),
                float(on_mean["high"][best]),
                "ρ",
                f"Spearman with the mean {target} RDM, bootstrap over stimuli",
                "baseline" if model in baselines else "",
            )
        )
    if known:
        stacked = stack_rdms(known)
        series = {
            label: evaluate_rdms(stacked, mean, method=method, n_bootstrap=bootstraps, seed=seed)
            for label, method in (("Pearson", "corr"), ("Spearman", "spearman"))
        }
        ds = xr.Dataset(
            {
                k: (("item", "series"), np.stack([e[k].values for e in series.values()], axis=1))
                for k in ("value", "low", "high")
            },
            coords={"item": list(known), "series": list(series)},
        )
        figures.append(
            Figure(
                "others",
                "points",
                f"Other RDMs against the mean {target} RDM",
                "Correlation with the RDMs that came with the data, with 95 % bootstrap intervals "
                "over stimuli: what another species, behaviour and simple models reach.",
                ds,
                {"y_label": "correlation"},
            )
        )
        pearson = series["Pearson"]
        for i, name in enumerate(known):
            if name in headline:
                summary.append(
                    Estimate(
                        f"{name} and mean {target}",
                        float(pearson["value"][i]),
                        float(pearson["low"][i]),
                        float(pearson["high"][i]),
                        "r",
                        "Pearson over all pairs of stimuli, bootstrap over stimuli",
                    )
                )
                chosen_rdms[name] = known[name]
    if subjects.sizes["rdm_name"] > 1:
        between = compare_rdms(subjects, subjects, method="spearman").values
        pairs = between[np.triu_indices(len(between), 1)]
        summary.append(
            Estimate(
                "Agreement between subjects",
                float(pairs.mean()),
                float(pairs.min()),
                float(pairs.max()),
                "ρ",
                f"mean Spearman over {len(pairs)} pairs of subjects, smallest and largest",
            )
        )
    shown = stack_rdms(chosen_rdms)
    figures.append(
        Figure(
            "rdms",
            "rdm",
            "Representational dissimilarity matrices",
            "Each matrix shows the dissimilarity of every pair of stimuli, in ranks. Blocks along "
            "the diagonal are categories that the region or layer holds together; compare the "
            "blocks of the recordings with those of each model's best layer.",
            shown,
            {},
            _thumbnails(stimuli),
        )
    )
    return Section(
        id="rsa",
        title="Representational similarity",
        intro=f"Do the layers of a network order {len(stimuli)} images as {target} does? Each "
        "comparison is between the dissimilarities of all pairs of images.",
        figures=figures,
        summary=summary,
        methods="RDMs of layers were 1 − Pearson correlation between the features of two images. "
        f"They were compared with the RDM of {target}, averaged over subjects, and with that of "
        f"each of {subjects.sizes['rdm_name']} subjects (sessions averaged), by Spearman "
        "correlation over all pairs, with rsatoolbox [@schuett2023]. Intervals come from "
        f"{bootstraps} bootstrap samples over stimuli, or over stimuli and subjects with the "
        "two-factor correction, pairs of a stimulus with its own copy left out. The noise ceiling "
        "is the mean correlation of each subject's RDM with that of the others (lower bound) and "
        "with that of all (upper bound) [@nili2014]. Where one number is given for a model with "
        "several layers, the layer was chosen on one random half of the stimuli and scored on the "
        "other; the highest of all layers is shown beside it and is biased upwards.",
        references={k: v for k, v in _REFERENCES.items() if k in ("schuett2023", "nili2014")},
        facts={
            "stimuli": str(len(stimuli)),
            "subjects": str(subjects.sizes["rdm_name"]),
            "layers": str(len(names)),
        },
        order=40,
    )


def layer_roi_section(
    features: Mapping[str, Mapping[str, xr.Dataset]],
    responses: Mapping[str, xr.Dataset],
    *,
    titles: Mapping[str, str],
    baselines: Sequence[str] = (),
    bootstraps: int = 1000,
    seed: int = 0,
) -> Section:
    """Describe every layer against every region of interest, by RSA and by CKA.

    Parameters
    ----------
    features : mapping of model to mapping of layer to xarray.Dataset
        ``features`` schema.
    responses : mapping of subject to xarray.Dataset
        ``responses`` schema.
    titles : mapping of str to str
        Title by model.
    baselines : sequence of str
        Models that others are compared with.
    bootstraps : int
        Samples of the intervals, and permutations of the p-values.
    seed : int
        Seed.

    Raises
    ------
    SchemaError
        If there are no layers, or see `brainalign.evaluation.layer_roi.layer_roi_rsa`.
    """
    layers = {
        (model, f"{titles.get(model, model)}, {layer}"): ds
        for model, by in features.items()
        for layer, ds in by.items()
    }
    if not layers:
        raise SchemaError("There are no layers to compare.")
    named = {name: ds for (_, name), ds in layers.items()}
    # Over fewer subjects t has at most 2 degrees of freedom, and an interval says nothing.
    over = "both" if len(responses) >= _LEAST_SUBJECTS else "stimuli"
    tables = {
        name: table(
            named,
            responses,
            over=over,
            n_bootstrap=bootstraps,
            n_permutations=bootstraps,
            seed=seed,
        )
        for name, table in (("rsa", layer_roi_rsa), ("cka", layer_roi_cka))
    }
    n_subjects, n_stimuli = (int(tables["rsa"].attrs[k]) for k in ("n_subjects", "n_stimuli"))
    rivals = np.array([model in baselines for model, _ in layers])
    resampled = "subjects and stimuli" if over == "both" else "stimuli"
    words = {
        "rsa": (
            "RSA",
            "Spearman ρ",
            "Spearman correlation of a layer's RDM with that of a region: do they order the pairs "
            "of stimuli alike?",
            "Look for regions that a trained network's layers reach and the baselines' do not, and "
            "for early layers in early regions.",
        ),
        "cka": (
            "CKA",
            "debiased CKA",
            "Debiased linear CKA of the features of a layer with the responses of a region: do "
            "their large dimensions agree? It is 0 on average for unrelated data, however many "
            "features there are.",
            "CKA weighs directions by their variance where RSA takes ranks of distances: a layer "
            "that leads in both is a safer finding than one that leads in either.",
        ),
    }
    figures, summary = [], []
    for key, table in tables.items():
        short, label, what, look = words[key]
        ds = xr.Dataset(
            {k: (("row", "column"), table[k].values) for k in ("value", "low", "high")},
            coords={"row": list(named), "column": table["roi"].values.astype(str)},
        )
        ds["value"].attrs = {"long_name": label, "units": ""}
        figures.append(
            Figure(
                f"layers-{key}",
                "heatmap",
                f"{short}: layers by region",
                f"{what} The mean of {n_subjects} subject{'s' if n_subjects > 1 else ''}; 95 % "
                f"bootstrap intervals over {resampled} show on hovering. The frame marks each "
                f"region's highest layer, which was chosen on the values shown. {look}",
                ds,
                {"best_in": "column", "x_label": "region", "y_label": "layer"},
            )
        )
        if not rivals.all():
            best = table.isel(layer=~rivals)
            related = (best["p_max"] < 0.05).any("layer").values
            beyond = related.copy()
            if rivals.any():
                highest = table["value"].values[rivals].max(axis=0)
                beyond &= best["value"].values.max(axis=0) > highest
            summary.append(
                Estimate(
                    f"Regions that resemble a layer, {short}",
                    float(related.sum()),
                    unit=f"of {len(related)}",
                    note=f"p < 0.05 for the largest of all layers and regions, {bootstraps} "
                    "permutations of stimuli",
                    reference=f"above every baseline in {int(beyond.sum())}"
                    if rivals.any()
                    else "",
                )
            )
    chosen = [t["value"].values.argmax(axis=0) for t in tables.values()]
    summary.append(
        Estimate(
            "Regions whose highest layer is the same by RSA and CKA",
            float((chosen[0] == chosen[1]).sum()),
            unit=f"of {len(chosen[0])}",
            note=f"of {len(named)} layers",
        )
    )
    return Section(
        id="rsa",
        title="Representational similarity",
        intro=f"Which layers represent {n_stimuli} stimuli as each region does? Two measures that "
        "need no fitting answer side by side.",
        figures=figures,
        summary=summary,
        methods="Responses were averaged over the presentations of a stimulus. For RSA, RDMs were "
        "1 − Pearson correlation between the patterns of two stimuli, compared by Spearman "
        "correlation over all pairs [@schuett2023]. CKA was linear, with the unbiased estimator of "
        f"HSIC [@kornblith2019; @song2012]. Values are means over {n_subjects} subjects. Intervals "
        f"are value ± t · standard error from {bootstraps} bootstrap samples over {resampled}"
        + (", with the two-factor correction" if over == "both" else "")
        + "; pairs (RSA) and quadruples (CKA) with two copies of one stimulus were left out. "
        "p-values are one-sided from permutations of the stimuli, against the largest value of all "
        "layers and regions.",
        references={
            k: v
            for k, v in _REFERENCES.items()
            if k in ("schuett2023", "kornblith2019", "song2012")
        },
        facts={
            "stimuli": str(n_stimuli),
            "subjects": str(n_subjects),
            "layers": str(len(named)),
            "regions": str(tables["rsa"].sizes["roi"]),
        },
        order=40,
    )


_REFERENCES = {
    "kornblith2019": """@inproceedings{kornblith2019,
  author = {Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey},
  title = {Similarity of Neural Network Representations Revisited},
  booktitle = {Proceedings of the 36th International Conference on Machine Learning},
  pages = {3519--3529}, year = {2019}
}""",
    "song2012": """@article{song2012,
  author = {Song, Le and Smola, Alex and Gretton, Arthur and Bedo, Justin and Borgwardt, Karsten},
  title = {Feature Selection via Dependence Maximization},
  journal = {Journal of Machine Learning Research}, volume = {13}, pages = {1393--1434},
  year = {2012}
}""",
    "schuett2023": """@article{schuett2023,
  author = {Sch{\\"u}tt, Heiko H. and Kipnis, Alexander D. and Diedrichsen, J{\\"o}rn and Kriegeskorte, Nikolaus},
  title = {Statistical Inference on Representational Geometries},
  journal = {eLife}, volume = {12}, pages = {e82566}, year = {2023}, doi = {10.7554/eLife.82566}
}""",  # noqa: E501
    "nili2014": """@article{nili2014,
  author = {Nili, Hamed and Wingfield, Cai and Walther, Alexander and Su, Li and Marslen-Wilson, William and Kriegeskorte, Nikolaus},
  title = {A Toolbox for Representational Similarity Analysis},
  journal = {PLoS Computational Biology}, volume = {10}, pages = {e1003553}, year = {2014}, doi = {10.1371/journal.pcbi.1003553}
}""",  # noqa: E501
}
