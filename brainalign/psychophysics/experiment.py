"""Critical band masking for people: an experiment as plain files that any browser opens."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.stimuli import StimulusSet
from brainalign.data.store import atomic_dir
from brainalign.errors import ConfigError, SchemaError, near
from brainalign.psychophysics.analysis import NOISE_SDS
from brainalign.psychophysics.observers import grey_images
from brainalign.psychophysics.stimuli import CONTRAST, MEAN, divide_images, mask, masking_design

__all__ = ["CONSENT", "MOST_CLASSES", "write_experiment"]

#: Buttons that fit the screen, each with a key.
MOST_CLASSES = 16
#: What is agreed to, a paragraph each. Whoever runs a study puts the text of their own board here.
CONSENT = (
    "In this study you name what pictures show. It takes part of an hour; nothing is asked of you "
    "but to look and to choose.",
    "You take part of your own free will and may stop at any time, without giving a reason.",
    "Your answers and how long they took are kept under a code and without your name. They leave "
    "this computer only in the file that you hand over at the end.",
)
_BATCH = 64
_FEEDBACK_S = 0.8


def write_experiment(
    folder: str | Path,
    stimuli: StimulusSet,
    *,
    size: tuple[int, int] = (224, 224),
    classes: Sequence[str] | None = None,
    noise_sds: Sequence[float] = NOISE_SDS,
    bands: Sequence[int] | None = None,
    contrast: float = CONTRAST,
    mean: float = MEAN,
    n_practice: int = 10,
    block: int = 50,
    duration: float | None = None,
    fixation: float = 0.5,
    side: int | None = None,
    title: str = "What does the picture show?",
    consent: Sequence[str] = CONSENT,
    fullscreen: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a masking experiment for people: open ``index.html`` in a browser, from disk or a site.

    Every picture is shown once, in one condition, made by `brainalign.psychophysics.stimuli.mask`
    as for networks; their order follows from the participant's code. Pictures to practise on are
    shown nowhere else: half of them without noise, half in noise of the middle level. Answers leave
    as a CSV file that `brainalign.data.trials.read_trials` takes. Another seed makes another
    version, with other images in each condition.

    Parameters
    ----------
    folder : path
        Where the files go.
    stimuli : StimulusSet
        With ``category`` in its index.
    size : tuple of int
        Height and width of the pictures in pixels, see `band_frequencies`. They are square.
    classes : sequence of str, optional
        What participants choose from, in the order of the buttons; default the categories.
    noise_sds, bands, contrast, mean
        See `masking_design` and `mask`.
    n_practice : int
        Pictures to practise on, of as many categories as can be.
    block : int
        Pictures between two rests.
    duration : float, optional
        Seconds for which a picture is shown; default until the answer.
    fixation : float
        Seconds of the cross before it.
    side : int, optional
        Side of the pictures on the screen in CSS pixels; default their own.
    title : str
        Heading of the first page.
    consent : sequence of str
        Its paragraphs.
    fullscreen : bool
        Whether the browser is asked to fill the screen.
    seed : int
        Of conditions and noise.
    overwrite : bool
        Whether to replace what stands there.

    Returns
    -------
    Path
        The page to open.

    Raises
    ------
    SchemaError
        If stimuli have no category, or one that is no class.
    ConfigError
        If there are fewer than 2 classes or more than `MOST_CLASSES`, too few images, or a setting
        is out of range.
    """
    if "category" not in stimuli.index:
        raise SchemaError(
            "The stimuli have no 'category'.",
            "Put images into a folder for each category, or give an index with that column.",
        )
    category = stimuli.index["category"].values.astype(str)
    names = sorted(set(category.tolist())) if classes is None else [str(c) for c in classes]
    strange = sorted({*category.tolist()} - {*names})
    if strange:
        raise SchemaError(f"Category {strange[0]!r} is no class.{near(strange[0], names)}")
    if not 2 <= len(set(names)) == len(names) <= MOST_CLASSES:
        raise ConfigError(
            f"People choose from 2 to {MOST_CLASSES} classes, each once; got {names}."
        )
    if n_practice >= len(stimuli):
        raise ConfigError(f"{n_practice} of {len(stimuli)} images cannot be for practice alone.")
    wrong = [
        name
        for name, value in {"block": block, "duration": duration, "side": side}.items()
        if value is not None and value <= 0
    ]
    if wrong or fixation < 0 or size[0] != size[1]:
        raise ConfigError(
            "block, duration and side must be above 0, fixation at least 0, and pictures square; "
            f"got block {block}, duration {duration}, side {side}, fixation {fixation} and "
            f"size {size}."
        )
    practice, shown = divide_images(category.tolist(), n_practice, seed)
    levels = sorted({0.0, sorted(noise_sds)[len(noise_sds) // 2]})
    common: dict[str, Any] = {"size": size, "bands": bands, "crossed": False, "seed": seed}
    ids = np.array(stimuli.ids)
    designs = {
        "practice": (practice, {**common, "noise_sds": levels}),
        "trials": (shown, {**common, "noise_sds": noise_sds}),
    }
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(folder, overwrite=overwrite) as made:
        (made / "images").mkdir()
        record: dict[str, Any] = {
            "title": title, "consent": list(consent), "classes": names,
            "side": side or size[1], "block": block, "duration": duration, "fixation": fixation,
            "feedback": _FEEDBACK_S, "fullscreen": fullscreen, "contrast": contrast, "mean": mean,
        }  # fmt: skip
        for kind, (rows, options) in designs.items():
            record[kind] = []
            if len(rows):
                design = masking_design(ids[rows], category[rows], **options)
                if kind == "practice":
                    design = design.sortby("noise_sd")
                record[kind] = _write_pictures(made / "images", kind, stimuli, design, size,
                                               contrast, mean)  # fmt: skip
        written = json.dumps(record, sort_keys=True)
        record["id"] = hashlib.sha256(written.encode()).hexdigest()[:12]
        text = f"const EXPERIMENT = {json.dumps(record)};\n"
        (made / "trials.js").write_text(text, encoding="utf-8")
        template = resources.files(__package__) / "browser"
        for part in ("index.html", "experiment.css", "experiment.js"):
            with resources.as_file(template / part) as source:
                shutil.copyfile(source, made / part)
    return folder / "index.html"


def _write_pictures(
    folder: Path,
    kind: str,
    stimuli: StimulusSet,
    design: xr.Dataset,
    size: tuple[int, int],
    contrast: float,
    mean: float,
) -> list[Mapping[str, Any]]:
    """Write the pictures of a design and return its trials; their names tell no category."""
    from PIL import Image

    trials: list[Mapping[str, Any]] = []
    for start in range(0, design.sizes["trial"], _BATCH):
        part = design.isel(trial=slice(start, start + _BATCH))
        ids = part["stimulus_id"].values.astype(str).tolist()
        images = grey_images(stimuli.select(ids), size)
        shown = mask(
            images, part["noise_sd"].values, part["band"].values, part["seed"].values,
            contrast=contrast, mean=mean,
        )  # fmt: skip
        for i, picture in enumerate(np.rint(255 * shown.numpy()).astype(np.uint8)):
            name = f"{kind}-{start + i:05d}.png"
            Image.fromarray(picture).save(folder / name)
            one = part.isel(trial=i)
            trials.append(
                {
                    "image": name,
                    **{c: str(one[c].values) for c in ("stimulus_id", "category", "condition")},
                    **{c: float(one[c]) for c in ("noise_sd", "frequency")},
                    "band": int(one["band"]),
                    # Beyond what a browser's numbers hold.
                    "seed": str(int(one["seed"])),
                }
            )
    return trials
