"""Published data sets, one module each: licence, terms, citation, checksums, `fetch` and `load`.

A study module defines ``TITLE``, ``LICENCE``, ``TERMS``, ``MUST_AGREE`` (whether the terms ask for
the user's agreement), ``CITATION``, ``BIBTEX``, ``FOLDER`` (its folder in a mirror and in the
cache), ``REGISTRY``, ``fetch(folder, *, mirror, accept_terms, progress)`` and ``load(folder)``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from brainalign.data.fetch import RemoteFile, fetch_files, verify_files
from brainalign.errors import (
    BrainalignError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
    near,
)

if TYPE_CHECKING:
    import xarray as xr

    from brainalign.data.stimuli import StimulusSet

__all__ = [
    "LazyMapping",
    "Study",
    "cached_stimuli",
    "check_agreement",
    "data_home",
    "fetch_study",
    "get",
    "names",
    "open_study",
    "read_registry",
    "read_struct",
    "references",
]

logger = logging.getLogger(__name__)

_NAMES = (
    "allen2022",
    "biesmans2016",
    "choudhari2024",
    "fuglsang2017",
    "geirhos2021",
    "haxby2001",
    "kay2017",
    "kriegeskorte2008",
    "panayotov2015",
    "zada2025",
)


class LazyMapping(Mapping[str, Any]):
    """Values by name, such as a subject's responses, made each time they are asked for.

    Parameters
    ----------
    names : sequence of str
        The keys.
    read : callable
        Takes a key and makes its value.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], Any]) -> None:
        self._names, self._read = list(names), read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Study:
    """What a study module loads.

    Attributes
    ----------
    name : str
        Name of the module.
    responses : mapping of str to xarray.Dataset
        Responses by subject; a large study reads them when they are asked for.
    stimuli : StimulusSet or None
        The images, where the study distributes them.
    extras : dict
        Whatever else the study gives, by name; the module's `load` documents it.
    """

    name: str
    responses: Mapping[str, xr.Dataset] = field(default_factory=dict)
    stimuli: StimulusSet | None = None
    extras: dict[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """Return the names of the known studies."""
    return list(_NAMES)


def get(name: str) -> ModuleType:
    """Return the module of a study.

    Raises
    ------
    UnknownNameError
        There is no study of that name; the message gives near ones.
    """
    if name not in _NAMES:
        raise UnknownNameError(
            f"There is no study {name!r}.{near(name, _NAMES)}", "Known: " + ", ".join(_NAMES) + "."
        )
    return import_module(f"brainalign.data.studies.{name}")


def data_home() -> Path:
    """Return the folder for studies: `BRAINALIGN_DATA`, else the platform's cache folder."""
    named = os.environ.get("BRAINALIGN_DATA")
    if named:
        return Path(named).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("brainalign")) / "studies"


def read_registry(name: str) -> dict[str, RemoteFile]:
    """Read a registry shipped with the package.

    The first line is ``# base URL``; then columns file, path (under the base URL; empty if equal to
    file), bytes, sha256.
    """
    table = resources.files(__package__).joinpath("registry", f"{name}.tsv")
    first, _, *rows = table.read_text(encoding="utf-8").splitlines()
    base = first.removeprefix("# base ")
    registry = {}
    for row in rows:
        file, path, size, sha256 = row.split("\t")
        registry[file] = RemoteFile(sha256, base + (path or file), int(size))
    return registry


def read_struct(file: str | os.PathLike[str] | BinaryIO, name: str) -> Any:
    """Read one variable of a MATLAB file; structs become objects with their fields as attributes.

    Raises
    ------
    UnavailableError
        There is no such file.
    SchemaError
        It is of another format, or has no such variable.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if isinstance(file, str | os.PathLike) and not Path(file).is_file():
        raise UnavailableError(f"There is no file {file}.")
    where = getattr(file, "name", file)
    try:
        # What else the file holds is not looked at.
        found = loadmat(file, variable_names=[name], squeeze_me=True, struct_as_record=False)
    except (MatReadError, NotImplementedError, ValueError, TypeError) as error:
        raise SchemaError(f"{where} is not a MATLAB file of version 5 to 7: {error}.") from error
    if name not in found:
        raise SchemaError(f"{where} holds no variable {name!r}.")
    return found[name]


def references(module: ModuleType) -> dict[str, str]:
    """Return the BibTeX entries of a study by key."""
    entries = ["@" + e.strip() for e in module.BIBTEX.split("\n@") if e.strip()]
    entries = [e.replace("@@", "@") for e in entries]
    return {e.partition("{")[2].partition(",")[0].strip(): e for e in entries}


def fetch_study(
    module: ModuleType | Any,
    folder: str | os.PathLike[str] | None = None,
    *,
    mirror: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Fetch all files of a study; the `fetch` of every study module ends here.

    Parameters
    ----------
    module : module
        The study, with the constants listed at the top of this module.
    folder : path, optional
        Where the files go. Default: the study's folder in `data_home`.
    mirror : path or str, optional
        See `brainalign.data.fetch.fetch_files`, which also takes `options`.
    accept_terms : bool
        The user agrees to the study's terms. Needed only where the study asks for it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        The folder that holds the files.

    Raises
    ------
    UnavailableError
        The study asks for an agreement that was not given (the message holds its terms), or the
        files could not be had.
    """
    check_agreement(module, accept_terms)
    folder = data_home() / module.FOLDER if folder is None else Path(folder).expanduser().absolute()
    fetch_files(module.REGISTRY, module.FOLDER, folder, mirror=mirror, progress=progress, **options)
    return folder


def check_agreement(module: ModuleType | Any, accept_terms: bool) -> None:
    """Raise `UnavailableError` with a study's terms if it asks for an agreement not given."""
    if module.MUST_AGREE and not accept_terms:
        name = module.__name__.rpartition(".")[2]
        raise UnavailableError(
            f"{module.TITLE} asks for your agreement before it is fetched. Its terms:\n"
            f"{module.TERMS.strip()}\n",
            f"If you agree: brainalign fetch {name} --accept-terms (accept_terms=True in Python).",
        )


def open_study(
    module_name: str,
    registry: Mapping[str, RemoteFile],
    study_folder: str,
    folder: str | os.PathLike[str] | None,
    files: Iterable[str] | None = None,
) -> Path:
    """Return the folder of a study after checking that it holds the published bytes.

    Raises
    ------
    UnavailableError
        The study was not fetched.
    ChecksumError
        A file has other bytes than the published one.
    """
    name = module_name.rpartition(".")[2]
    path = data_home() / study_folder if folder is None else Path(folder).expanduser().absolute()
    verify_files(registry, name, path, files)
    return path


def cached_stimuli(
    folder: Path,
    images: Callable[[], Iterable[Any]],
    stimulus_id: Sequence[str],
    source: str,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> StimulusSet:
    """Return stimuli kept in a folder, written there first where missing, old or damaged.

    Parameters
    ----------
    folder : Path
        Where the images and their index are kept.
    images : callable
        Gives the images, as `brainalign.data.stimuli.write_stimuli` takes them.
    stimulus_id : sequence of str
        Names in order.
    source : str
        What the images were made from and how; another value makes them anew.
    extra : mapping, optional
        Further columns of the index.
    """
    from brainalign.data.stimuli import write_stimuli

    kept = _kept_stimuli(folder, source)
    if kept is not None:
        return kept
    try:
        return write_stimuli(
            folder,
            images(),
            stimulus_id,
            extra=extra,
            provenance={"source": source},
            overwrite=True,
        )
    except PermissionError as error:
        raise UnavailableError(
            f"The stimuli cannot be written to {folder}: {error.strerror}.",
            "Set BRAINALIGN_DATA to a folder that can be written.",
        ) from error


def _kept_stimuli(folder: Path, source: str) -> StimulusSet | None:
    from brainalign.data.stimuli import read_stimuli

    if not (folder / "index.nc").is_file():
        return None
    try:
        stimuli = read_stimuli(folder)
        stimuli.verify()
    except (BrainalignError, OSError) as error:
        logger.warning("The stimuli in %s are damaged (%s); writing them again.", folder, error)
        return None
    return stimuli if stimuli.index.attrs.get("source") == source else None
