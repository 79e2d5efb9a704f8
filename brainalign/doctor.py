"""A look at the machine: versions, devices, mirror, disk, and how to mend what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Finding", "examine"]

#: package -> the extra that brings it, "" for the base install
PACKAGES = {
    "torch": "",
    "numpy": "",
    "xarray": "",
    "zarr": "",
    "nilearn": "",
    "nibabel": "",
    "scikit-learn": "",
    "rsatoolbox": "",
    "torchvision": "features",
    "timm": "features",
    "open_clip_torch": "features",
    "transformers": "features",
    "diffusers": "generation",
    "mne": "auditory",
    "snakemake": "workflow",
    "snakemake-executor-plugin-slurm": "workflow",
    "plotly": "report",
    "jinja2": "report",
    "matplotlib": "report",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Parameters
    ----------
    name, value : str
        What was looked at and what was found.
    remedy : str
        The command that mends it; empty if all is well.
    needed : bool
        Whether brainalign cannot work without it.
    """

    name: str
    value: str
    remedy: str = ""
    needed: bool = False


def _packages() -> Iterator[Finding]:
    for package, extra in PACKAGES.items():
        try:
            yield Finding(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            target = f'"brainalign[{extra}]"' if extra else "brainalign"
            yield Finding(package, "not installed", f"pip install {target}", needed=not extra)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", f"torch does not load: {error}", "pip install torch", needed=True)
        return
    yield Finding("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch can use; everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        yield Finding(f"GPU {i}", f"{properties.name}, {memory:.0f} GiB")
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError as error:
        yield Finding(
            "torchvision",
            f"does not fit this torch: {str(error).splitlines()[0]}",
            "pip install --force-reinstall torch torchvision",
            needed=True,
        )
    else:
        yield Finding("torchvision fits torch", torchvision.__version__)


def _mirror() -> Finding:
    from brainalign.data import studies

    named = os.environ.get("BRAINALIGN_MIRROR")
    if not named:
        return Finding("BRAINALIGN_MIRROR", "not set; studies come from their own servers")
    if "://" in named:
        return Finding("BRAINALIGN_MIRROR", named)
    if not Path(named).is_dir():
        return Finding(
            "BRAINALIGN_MIRROR",
            f"{named} is not a folder",
            "export BRAINALIGN_MIRROR=<folder with one folder per study>",
            needed=True,
        )
    held = [n for n in studies.names() if (Path(named) / studies.get(n).FOLDER).is_dir()]
    return Finding("BRAINALIGN_MIRROR", f"{named} holds {', '.join(held) or 'no known study'}")


def _disk(name: str, folder: Path) -> Finding:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**30
    remedy = "" if free > 5 else "free some room; a demo run needs about 5 GiB"
    if not os.access(existing, os.W_OK):
        return Finding(name, f"{folder} cannot be written", f"chmod u+w {existing}", needed=True)
    return Finding(name, f"{folder}, {free:.0f} GiB free", remedy)


def examine() -> list[Finding]:
    """Return what was found, in the order to print.

    Returns
    -------
    list of Finding
        Those with a remedy need attention; those also `needed` stop brainalign from working.
    """
    from brainalign import __version__
    from brainalign.data import studies

    python = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if supported else "use Python 3.11, 3.12 or 3.13"
    return [
        Finding("brainalign", __version__),
        Finding("Python", f"{python} on {platform.platform()}", remedy),
        *_packages(),
        *_devices(),
        _mirror(),
        _disk("data folder", studies.data_home()),
        _disk("working folder", Path.cwd()),
    ]
