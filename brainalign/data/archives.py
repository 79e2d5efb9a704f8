"""Files and hashes of a study as its archive publishes them: Zenodo records, OpenNeuro versions.

A study that ships its hashes with the package has a registry file. For others the archive publishes
a hash of every file: Zenodo in the record, OpenNeuro in the git-annex keys of the version's tag. It
is asked once; `registry.json` in the study's folder, or in the mirror's, keeps the answer, so that
nothing is asked of the network again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from brainalign.data.fetch import RemoteFile, fetch_files, mirror_address, verify_files
from brainalign.data.store import atomic_file
from brainalign.errors import SchemaError, UnavailableError

__all__ = ["Archive", "fetch_archive", "open_archive", "openneuro", "read_archive", "zenodo"]

logger = logging.getLogger(__name__)

ZENODO = "https://zenodo.org/api/records"
OPENNEURO_TAGS = "https://raw.githubusercontent.com/OpenNeuroDatasets"
OPENNEURO_FILES = "https://s3.amazonaws.com/openneuro.org"
_REGISTRY = "registry.json"
_ANNEX = re.compile(r"SHA256E-s(\d+)--([0-9a-f]{64})")
#: A pointer of git-annex is a short line; what is longer is a file itself.
_POINTER = 1000


@dataclass(frozen=True)
class Archive:
    """What an archive says of a study.

    Parameters
    ----------
    source : str
        Where it was asked.
    title, licence : str
        In the archive's words.
    files : dict of str to RemoteFile
        By path.
    """

    source: str
    title: str
    licence: str
    files: dict[str, RemoteFile]


def zenodo(record: int, files: Sequence[str] | None = None, *, timeout: float = 30.0) -> Archive:
    """Ask Zenodo for the files of a record; their hashes are MD5.

    Parameters
    ----------
    record : int
        Number of the record: that of a version, whose files cannot change.
    files : sequence of str, optional
        Take these only.
    timeout : float
        s.

    Raises
    ------
    UnavailableError
        If Zenodo does not answer, or the record lacks a file.
    SchemaError
        If the answer is not a record.
    """
    source = f"{ZENODO}/{record}"
    body = _get(source, timeout)
    try:
        answer = json.loads(body)
        found = {
            f["key"]: RemoteFile(
                f["checksum"],
                f["links"].get("content") or f["links"]["self"],
                int(f["size"]),
            )
            for f in answer["files"]
        }
        meta = answer["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{source} gave no record of Zenodo ({error!r}).") from error
    wanted = list(found) if files is None else list(files)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UnavailableError(
            f"Record {record} has no file {missing[0]!r}; it has {', '.join(found)}."
        )
    licence = meta.get("license", {})
    return Archive(
        source,
        str(meta.get("title", "")),
        str(licence.get("id", "") if isinstance(licence, dict) else licence) or "not stated",
        {name: found[name] for name in wanted},
    )


def openneuro(
    dataset: str, version: str, files: Sequence[str], *, timeout: float = 30.0
) -> Archive:
    """Ask OpenNeuro's git repositories for the SHA-256 of files of a version.

    Large files are kept by git-annex: at the tag of the version stands the name of the content,
    with its size and hash. Small ones stand there themselves.

    Parameters
    ----------
    dataset : str
        ``ds005574``.
    version : str
        A tag, ``1.0.2``.
    files : sequence of str
        Paths in the dataset.
    timeout : float
        s.

    Raises
    ------
    UnavailableError
        If a file is not there, or the server does not answer.
    """
    base = f"{OPENNEURO_TAGS}/{dataset}/{version}"
    about = json.loads(_get(f"{base}/dataset_description.json", timeout))
    found = {}
    for name in files:
        address = f"{base}/{quote(name)}"
        body = _get(address, timeout)
        key = _ANNEX.search(body.decode("utf-8", "replace")) if len(body) < _POINTER else None
        if key is None:
            found[name] = RemoteFile(hashlib.sha256(body).hexdigest(), address, len(body))
        else:
            url = f"{OPENNEURO_FILES}/{dataset}/{quote(name)}"
            found[name] = RemoteFile(key[2], url, int(key[1]))
    return Archive(
        base, str(about.get("Name", dataset)), str(about.get("License", "not stated")), found
    )


def fetch_archive(
    study: str,
    folder: str | os.PathLike[str],
    ask: Callable[[], Archive],
    *,
    mirror: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Bring the files of an archive into a folder, verified.

    Parameters
    ----------
    study : str
        Name of the study's folder in the mirror.
    folder : path
        Where the files go; its `registry.json` is used if there is one, else the mirror's.
    ask : callable
        Asks the archive; called only if there is no registry yet.
    mirror, progress, options
        As in `brainalign.data.fetch.fetch_files`.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder).expanduser().absolute()
    kept = folder / _REGISTRY
    if not kept.is_file():
        archive = _mirrored(study, mirror) or ask()
        logger.info("%s: licence of the archive: %s", archive.title or study, archive.licence)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept, overwrite=True) as temporary:
            Path(temporary).write_text(json.dumps(asdict(archive), indent=1), encoding="utf-8")
    fetch_files(
        read_archive(folder).files, study, folder, mirror=mirror, progress=progress, **options
    )
    return folder


def read_archive(folder: str | os.PathLike[str]) -> Archive:
    """Read the `registry.json` of a folder.

    Raises
    ------
    UnavailableError
        If there is none.
    SchemaError
        If it is not one.
    """
    path = Path(folder) / _REGISTRY
    if not path.is_file():
        raise UnavailableError(f"There is no {path}.")
    return _parse(path.read_bytes(), str(path))


def open_archive(
    name: str, folder: str | os.PathLike[str], files: Sequence[str] | None = None
) -> tuple[Path, Archive]:
    """Return the folder of a study, and its archive, after checking the bytes of its files.

    Raises
    ------
    UnavailableError
        If the study was not fetched.
    ChecksumError
        If a file has other bytes than the published one.
    """
    folder = Path(folder).expanduser().absolute()
    if not (folder / _REGISTRY).is_file():
        raise UnavailableError(
            f"{name}: {folder / _REGISTRY} is missing in {folder}.",
            f"Fetch the study: brainalign fetch {name}",
        )
    archive = read_archive(folder)
    verify_files(archive.files, name, folder, files)
    return folder, archive


def _mirrored(study: str, mirror: str | os.PathLike[str] | None) -> Archive | None:
    """Return the registry that the mirror holds, or None."""
    local, url = mirror_address(mirror)
    if local is not None and (local / study / _REGISTRY).is_file():
        return read_archive(local / study)
    if url is not None:
        address = f"{url}/{quote(study)}/{_REGISTRY}"
        try:
            return _parse(_get(address, 30.0), address)
        except UnavailableError as error:
            logger.info("Mirror: %s; asking the archive.", error)
    return None


def _parse(body: bytes, where: str) -> Archive:
    try:
        record = json.loads(body)
        files = {name: RemoteFile(*entry) for name, entry in record.pop("files").items()}
        return Archive(files=files, **record)
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{where} is not a registry of an archive ({error!r}).") from error


def _get(url: str, timeout: float) -> bytes:
    import requests

    try:
        response = requests.get(url, timeout=(min(timeout, 5.0), timeout))
    except requests.exceptions.RequestException as error:
        raise UnavailableError(
            f"{url} could not be asked ({type(error).__name__}).",
            "Check the network, or set BRAINALIGN_MIRROR to a folder or URL that holds the study "
            f"with its {_REGISTRY}.",
        ) from error
    if response.status_code != 200:
        raise UnavailableError(f"{url} answered with HTTP {response.status_code}.")
    return response.content
