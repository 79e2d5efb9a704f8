"""Sets of stimuli: image files, or images in one HDF5 file, with an index of names and hashes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.schema import validate
from brainalign.data.store import atomic_dir, read, sha256_file, sha256_of, write
from brainalign.errors import ChecksumError, SchemaError, UnavailableError, UnknownNameError, near

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "StimulusSet",
    "index_categories",
    "index_hdf5",
    "index_images",
    "read_stimuli",
    "write_stimuli",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class StimulusSet:
    """An ordered set of images.

    Parameters
    ----------
    index : xarray.Dataset
        The ``images`` schema: one row a stimulus. With ``attrs["container"]``, an HDF5 file, the
        file names are ``dataset/row`` inside it.
    folder : Path
        The folder that the file names, or the container, are relative to.
    """

    index: xr.Dataset
    folder: Path

    def __len__(self) -> int:
        return int(self.index.sizes["stimulus"])

    @property
    def ids(self) -> list[str]:
        """The stimulus ids, in order."""
        return [str(s) for s in self.index["stimulus_id"].values]

    @property
    def paths(self) -> list[Path]:
        """The image files, in order; the container for each image where there is one."""
        if self.container is not None:
            return [self.container] * len(self)
        return [self.folder / str(name) for name in self.index["filename"].values]

    @property
    def container(self) -> Path | None:
        """The HDF5 file that holds all images, if one does."""
        name = self.index.attrs.get("container")
        return None if name is None else self.folder / str(name)

    @property
    def sha256(self) -> list[str]:
        """The SHA-256 of each file's bytes (in a container: of the pixels), in order."""
        return [str(s) for s in self.index["sha256"].values]

    @property
    def hash(self) -> str:
        """The SHA-256 of the ordered ids and content hashes."""
        return sha256_of(self.ids, self.sha256)

    def open(self, i: int) -> Image:
        """Return image `i` decoded as RGB."""
        from PIL import Image

        name = str(self.index["filename"].values[i])
        if self.container is not None:
            with _opened(self.container) as file:
                return Image.fromarray(_pixels(file, name)).convert("RGB")
        with Image.open(self.folder / name) as image:
            return image.convert("RGB")

    def select(self, ids: Sequence[str]) -> StimulusSet:
        """Return the set of these stimuli in this order.

        Raises
        ------
        UnknownNameError
            Naming the first unknown id and its near matches.
        """
        place = {s: i for i, s in enumerate(self.ids)}
        unknown = [s for s in ids if s not in place]
        if unknown:
            raise UnknownNameError(
                f"{len(unknown)} of {len(ids)} stimulus ids are not in the set, "
                f"the first is {unknown[0]!r}.{near(unknown[0], place)}"
            )
        return StimulusSet(self.index.isel(stimulus=[place[s] for s in ids]), self.folder)

    def verify(self) -> None:
        """Raise `ChecksumError` at the first image whose bytes are not those of the index."""
        if self.container is not None:
            names = self.index["filename"].values.astype(str).tolist()
            with _opened(self.container) as file:
                for name, expected in zip(names, self.sha256, strict=True):
                    if sha256_of(_pixels(file, name)) != expected:
                        raise ChecksumError(
                            f"The image {name} in {self.container} is not the one that was indexed."
                        )
            return
        for path, expected in zip(self.paths, self.sha256, strict=True):
            if not path.is_file():
                raise UnavailableError(f"The stimulus file {path} is missing.")
            if sha256_file(path) != expected:
                raise ChecksumError(f"The stimulus file {path} is not the one that was indexed.")


def read_stimuli(folder: str | Path) -> StimulusSet:
    """Read a set of stimuli from a folder with an ``index.nc``.

    Raises
    ------
    UnavailableError
        If the index or a file it names is missing.
    """
    folder = Path(folder)
    stimuli = StimulusSet(read(folder / "index.nc", "images"), folder)
    files = dict.fromkeys(stimuli.paths)
    missing = [p for p in files if not p.is_file()]
    if missing:
        raise UnavailableError(
            f"{len(missing)} of {len(files)} stimulus files are missing, the first is {missing[0]}."
        )
    return stimuli


def _index(
    stimulus_id: Sequence[str],
    filenames: Sequence[str],
    sha256: Sequence[str],
    extra: Mapping[str, Sequence[Any]] | None,
) -> xr.Dataset:
    data = {
        "filename": ("stimulus", np.array(filenames, dtype=str)),
        "sha256": ("stimulus", np.array(sha256, dtype=str)),
        **{k: ("stimulus", np.asarray(v)) for k, v in (extra or {}).items()},
    }
    ds = xr.Dataset(
        data, coords={"stimulus_id": ("stimulus", np.array(list(stimulus_id), dtype=str))}
    )
    return validate(ds, "images")


def index_images(folder: str | Path, *, pattern: str = "*") -> StimulusSet:
    """Return the images of a folder as they lie, with the file's stem as the stimulus id.

    Parameters
    ----------
    folder : path
        Searched for image files, not recursively.
    pattern : str
        Which file names count.

    Raises
    ------
    UnavailableError
        If there are none.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UnavailableError(
            f"No image matches {pattern!r} in {folder}.",
            f"Known endings: {', '.join(IMAGE_SUFFIXES)}.",
        )
    index = _index(
        [p.stem for p in files], [p.name for p in files], [*map(sha256_file, files)], None
    )
    return StimulusSet(index, folder)


def index_categories(folder: str | Path) -> StimulusSet:
    """Return the images of a folder with one folder for each category, as they lie.

    Parameters
    ----------
    folder : path
        Each of its folders is named after a category and holds images of it. The stimulus id is
        ``category/stem``.

    Raises
    ------
    UnavailableError
        If there are none.
    SchemaError
        If two images of a category differ in their endings alone.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UnavailableError(
            f"{folder} has no folders of images.", "Put images into a folder for each category."
        )
    names = [f"{p.parent.name}/{p.stem}" for p in files]
    index = _index(
        names, [f"{p.parent.name}/{p.name}" for p in files], [*map(sha256_file, files)],
        {"category": [p.parent.name for p in files]},
    )  # fmt: skip
    return StimulusSet(index, folder)


def index_hdf5(
    path: str | Path,
    dataset: str,
    rows: Sequence[int],
    stimulus_id: Sequence[str],
    *,
    extra: Mapping[str, Sequence[Any]] | None = None,
    progress: str | None = None,
) -> StimulusSet:
    """Return images as they lie in an HDF5 file, which stays where it is; each is read once.

    Parameters
    ----------
    path : path
        The file.
    dataset : str
        Name of its dataset (image, height, width, 3), uint8.
    rows : sequence of int
        Which images.
    stimulus_id : sequence of str
        Their names.
    extra : mapping of str to sequence, optional
        More columns of the index.
    progress : str, optional
        Title of a progress bar.

    Raises
    ------
    SchemaError
        If there is no such dataset, it holds no such images, or a row is outside of it.
    """
    from tqdm import tqdm

    path = Path(path)
    if len(rows) != len(stimulus_id):
        raise SchemaError(f"images: {len(rows)} rows came with {len(stimulus_id)} stimulus ids.")
    names = [f"{dataset}/{row}" for row in rows]
    with _opened(path) as file:
        bar = tqdm(names, desc=progress, unit="image", disable=None if progress else True)
        hashes = [sha256_of(_pixels(file, name)) for name in bar]
    index = _index(stimulus_id, names, hashes, extra)
    return StimulusSet(index.assign_attrs(container=path.name), path.parent)


def _opened(path: Path) -> Any:
    import h5py

    if not path.is_file():
        raise UnavailableError(f"The file of stimuli {path} is missing.")
    return h5py.File(path, "r")


def _pixels(file: Any, name: str) -> NDArray[np.uint8]:
    """Return one image of an HDF5 file, named as ``dataset/row``."""
    dataset, _, row = name.rpartition("/")
    images = file.get(dataset)
    if images is None or images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        came = "nothing" if images is None else f"{images.dtype} of shape {images.shape}"
        raise SchemaError(
            f"{file.filename}: {dataset!r} must hold images (image, height, width, 3) of uint8; "
            f"it holds {came}."
        )
    if not 0 <= int(row) < len(images):
        raise SchemaError(f"{file.filename}: {dataset!r} has {len(images)} images, no row {row}.")
    return np.asarray(images[int(row)])


def write_stimuli(
    folder: str | Path,
    images: Iterable[Any],
    stimulus_id: Sequence[str],
    *,
    extra: Mapping[str, Sequence[Any]] | None = None,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> StimulusSet:
    """Write images as PNG files with their index, atomically.

    Parameters
    ----------
    folder : path
        Where; it will hold ``index.nc`` and ``images/``.
    images : iterable of PIL.Image or array
        As many as `stimulus_id`; arrays are uint8, height x width or height x width x 3.
    stimulus_id : sequence of str
        Their names. File names are numbered, so any text is safe.
    extra : mapping of str to sequence, optional
        More columns of the index (``caption``, ``category``, ...).
    provenance : mapping of str to str, optional
        Attrs of the index.
    overwrite : bool
        Whether to replace what stands there.

    Raises
    ------
    SchemaError
        If the numbers of images and ids differ, or an id repeats.
    """
    from PIL import Image

    ids = [str(s) for s in stimulus_id]
    folder = Path(folder)
    with atomic_dir(folder, overwrite=overwrite) as made:
        (made / "images").mkdir()
        names: list[str] = []
        for i, picture in enumerate(images):
            names.append(f"images/{i:06d}.png")
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            image.save(made / names[-1])
        if len(names) != len(ids):
            raise SchemaError(f"images: {len(names)} images came with {len(ids)} stimulus ids.")
        hashes = [sha256_file(made / name) for name in names]
        write(_index(ids, names, hashes, extra), made / "index.nc", "images", provenance=provenance)
    return read_stimuli(folder)
