"""Write a very small BIDS study to practise on: one simulated subject who saw 90 scenes."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import xarray as xr

from brainalign.data.simulate import simulate
from brainalign.features import extract
from brainalign.small_models.scenes import write_scenes

SHAPE = (8, 6, 5)
ROIS = ("V1", "FFA")
derivatives = Path("practice/derivatives/sub-01")
images = Path("practice/images")


def save(values: np.ndarray, path: Path) -> None:
    """Write values of all voxels (voxel, or voxel x trial) as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = values.reshape(*SHAPE, *values.shape[1:]).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), path)


scenes = write_scenes("practice/scenes", 90, size=64)
ijk = np.argwhere(np.ones(SHAPE))
voxels = xr.Dataset(
    coords={
        "neuroid_id": ("neuroid", ["_".join(map(str, v)) for v in ijk]),
        "roi": ("neuroid", np.where(ijk[:, 0] < 4, *ROIS)),
        "hemisphere": ("neuroid", np.full(len(ijk), "R")),
        **{axis: ("neuroid", 2.0 * ijk[:, a], {"units": "mm"}) for a, axis in enumerate("xyz")},
    }
)
subject = simulate(
    extract("v1", scenes),
    category=scenes.index["category"].values,
    neuroids=voxels,
    n_repetitions=3,
    n_runs=3,
    seed=1,
).responses

# One 4-D image of betas per run, one volume per trial, with a table that names the stimuli.
for run, trials in subject.groupby("run"):
    name = f"sub-01_task-scenes_run-{run}"
    save(trials["responses"].values.T, derivatives / "func" / f"{name}_space-T1w_betas.nii.gz")
    shown = [f"{s}.png" for s in trials["stimulus_id"].values]
    table = {"onset": 4.0 * np.arange(len(shown)), "duration": 2.0, "stim_file": shown}
    events = derivatives / "func" / f"{name}_events.tsv"
    pd.DataFrame(table).to_csv(events, sep="\t", index=False)

# One mask per ROI, and the images under the names that the tables give them.
for roi in ROIS:
    save((subject["roi"] == roi).values, derivatives / "rois" / f"{roi}.nii.gz")
images.mkdir(parents=True)
for i, stimulus in enumerate(scenes.ids):
    scenes.open(i).save(images / f"{stimulus}.png")
