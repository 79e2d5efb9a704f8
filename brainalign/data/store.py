"""Artefacts on disk: atomic, checksummed, with their provenance.

Large artefacts are zarr v3 stores whose every array ends in a crc32c codec, so that a flipped bit
raises instead of reading back silently; small ones are netCDF. Nothing is visible under its final
name before it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.schema import validate
from brainalign.errors import ChecksumError, DiskSpaceError, SchemaError, UnavailableError

__all__ = [
    "atomic_dir",
    "atomic_file",
    "fingerprint",
    "provenance",
    "read",
    "require_disk",
    "sha256_file",
    "sha256_of",
    "sha256_path",
    "swap_in",
    "verify",
    "with_text_as",
    "write",
]

#: The netCDF library is not made for threads: two that write files of their own crash the process.
_NETCDF = threading.Lock()

NEUROIDS_PER_CHUNK = 4096
CHUNKS_PER_SHARD = 16
#: Bytes of chunks that are encoded at once, where more than one fits.
BYTES_IN_FLIGHT = 2**29


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_path(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of a folder's sorted relative names and contents."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_of(*parts: Any) -> str:
    """Return the SHA-256 of arrays (dtype, shape, bytes) and JSON-able values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def fingerprint(ds: xr.Dataset, name: str) -> str:
    """Return a hash by which the values of a variable are told from others, read or not.

    Values in memory are hashed. Of an array that lies in a zarr store the checksum at the end of
    each chunk is read, four bytes of it, and not the chunk; where arrays have none, the size and
    time of the files stand for it.

    Parameters
    ----------
    ds : Dataset
        As `read` opens it, or any other. A selection of a store has the store's fingerprint.
    name : str
        Of the variable.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    v = ds[name].variable
    folder = Path(str(ds.encoding.get("source", ""))) / name
    if v._in_memory or not (folder / "zarr.json").is_file():
        return sha256_of(np.asarray(v.values))
    meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps([list(v.shape), meta], sort_keys=True).encode())
    checked, inner = _checksummed(meta)
    for file in sorted(p for p in (folder / "c").rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        if checked:
            digest.update(_chunk_checksums(file, inner))
        else:
            stat = file.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _checksummed(meta: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether every chunk of an array ends in a crc32c, and the chunks of a shard (or 0)."""
    codecs = meta["codecs"]
    inner = 0
    if codecs[-1]["name"] == "sharding_indexed":
        settings = codecs[-1]["configuration"]
        if settings.get("index_location", "end") != "end":
            return False, 0
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
        inner = int(np.prod([a // b for a, b in zip(shard, settings["chunk_shape"], strict=True)]))
        if [c["name"] for c in settings["index_codecs"]] != ["bytes", "crc32c"]:
            return False, 0
        codecs = settings["codecs"]
    return codecs[-1]["name"] == "crc32c", inner


def _chunk_checksums(file: Path, inner: int) -> bytes:
    """Return the checksums of a chunk, or of the chunks of a shard, whose index is at its end."""
    with open(file, "rb") as stream:
        if not inner:
            stream.seek(-4, os.SEEK_END)
            return stream.read(4)
        stream.seek(-(16 * inner + 4), os.SEEK_END)
        index = np.frombuffer(stream.read(16 * inner), dtype="<u8").reshape(inner, 2)
        found = []
        for offset, size in index.tolist():
            if size == 2**64 - 1:  # no such chunk
                found.append(b"none")
                continue
            stream.seek(offset + size - 4)
            found.append(stream.read(4))
        return b"".join(found)


def provenance(
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Iterable[str | Path] = (),
    seed: int | None = None,
) -> dict[str, str]:
    """Return the attrs that say where an artefact comes from.

    Parameters
    ----------
    config : mapping, optional
        The settings that made it; stored whole and as a hash.
    inputs : iterable of path
        Files or folders it was made from; their hashes are stored.
    seed : int, optional
        The random seed.

    Returns
    -------
    dict of str to str
        ``created``, ``software``, ``hardware`` and, where given, ``config``, ``config_sha256``,
        ``inputs``, ``seed``.
    """
    from brainalign import __version__

    attrs = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": f"brainalign {__version__}; Python {platform.python_version()}; "
        f"numpy {np.__version__}; xarray {xr.__version__}",
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }
    if config is not None:
        attrs["config"] = json.dumps(config, sort_keys=True)
        attrs["config_sha256"] = sha256_of(dict(config))
    hashes = {Path(p).name: sha256_path(p) for p in inputs}
    if hashes:
        attrs["inputs"] = json.dumps(hashes, sort_keys=True)
    if seed is not None:
        attrs["seed"] = str(seed)
    return attrs


def require_disk(path: str | Path, n_bytes: int) -> None:
    """Raise `DiskSpaceError` unless the disk of `path` has `n_bytes` and a tenth more free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 1.1 * n_bytes:
        raise DiskSpaceError(
            f"Writing {path} needs {n_bytes / 2**30:.2f} GiB and a tenth more, "
            f"but the disk has {free / 2**30:.2f} GiB free.",
            "Free some room or choose another folder.",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def swap_in(made: Path, final: Path) -> None:
    """Flush `made` and put it at `final`; what stood there is moved aside and removed after."""
    for path in [*made.rglob("*"), made]:
        _sync(path)
    if not final.is_dir():
        os.replace(made, final)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old-", dir=final.parent))
        os.replace(final, aside / final.name)
        try:
            os.replace(made, final)
        except OSError:
            os.replace(aside / final.name, final)
            raise
        finally:
            shutil.rmtree(aside)
    _sync(final.parent)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Pass overwrite=True to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path beside `path` that becomes it on success and is removed on error."""
    path = Path(path)
    _refuse_existing(path, overwrite)
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    made = Path(name)
    try:
        yield made
        os.chmod(made, 0o666 & ~_umask())
        swap_in(made, path)
    finally:
        _remove(made)


@contextlib.contextmanager
def atomic_dir(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder beside `path` that becomes it on success and is removed on error."""
    path = Path(path)
    _refuse_existing(path, overwrite)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield made
        os.chmod(made, 0o777 & ~_umask())
        swap_in(made, path)
    finally:
        _remove(made)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def with_text_as(ds: xr.Dataset, dtype: Any) -> xr.Dataset:
    """Return `ds` with every text variable held as `dtype`."""
    text = {
        name: (v.dims, np.array(v.values.tolist(), dtype=dtype), v.attrs)
        for name, v in ds.variables.items()
        if v.dtype.kind in "UOT"
    }
    return ds.assign({k: v for k, v in text.items() if k in ds.data_vars}).assign_coords(
        {k: v for k, v in text.items() if k in ds.coords}
    )


def default_chunks(ds: xr.Dataset, name: str) -> tuple[int, ...]:
    """Return a variable's chunk shape: all of every dimension, but 4,096 neuroids at a time."""
    v = ds[name]
    return tuple(
        min(n, NEUROIDS_PER_CHUNK) if d == "neuroid" else n
        for d, n in zip(v.dims, v.shape, strict=True)
    )


def zarr_encoding(
    ds: xr.Dataset,
    chunks: Mapping[str, Sequence[int]] | None = None,
    shards: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the zarr encoding of every variable: chunks, shards, and codecs that end in crc32c.

    Parameters
    ----------
    ds : xarray.Dataset
        What will be written.
    chunks, shards : mapping of variable to shape, optional
        Where they should differ from `default_chunks` and from no shards (16 neuroid chunks a
        shard when there are more than 16).
    """
    from zarr.codecs import Crc32cCodec, ZstdCodec

    encoding: dict[str, dict[str, Any]] = {}
    for name in map(str, ds.variables):
        v = ds[name]
        # Floating-point noise hardly compresses: its bytes are written as they are.
        plain = v.dtype.kind == "f"
        codecs = (Crc32cCodec(),) if plain else (ZstdCodec(level=3), Crc32cCodec())
        entry: dict[str, Any] = {"compressors": codecs}
        if v.ndim:
            chunk = tuple((chunks or {}).get(name, default_chunks(ds, name)))
            entry["chunks"] = chunk
            if shards and name in shards:
                entry["shards"] = tuple(shards[name])
            elif "neuroid" in v.dims and v.ndim > 1:
                axis = v.dims.index("neuroid")
                if v.shape[axis] > CHUNKS_PER_SHARD * chunk[axis]:
                    entry["shards"] = tuple(
                        c * CHUNKS_PER_SHARD if a == axis else c for a, c in enumerate(chunk)
                    )
        encoding[name] = entry
    return encoding


def write(
    ds: xr.Dataset,
    path: str | Path,
    kind: str | None,
    *,
    provenance: Mapping[str, str] | None = None,
    overwrite: bool = False,
    chunks: Mapping[str, Sequence[int]] | None = None,
    shards: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write an artefact atomically: ``.zarr`` (checksummed) or ``.nc``.

    Parameters
    ----------
    ds : xarray.Dataset
        The artefact, validated first.
    path : path
        Its name, ending in ``.zarr`` or ``.nc``.
    kind : str or None
        Its schema; None for a Dataset that has none (the data of a figure).
    provenance : mapping of str to str, optional
        Attrs of `provenance`, added to the Dataset's own.
    overwrite : bool
        Whether to replace what stands there; otherwise `FileExistsError`.
    chunks, shards : mapping of variable to shape, optional
        See `zarr_encoding`.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    SchemaError
        If the Dataset does not follow its schema.
    DiskSpaceError
        If it would not fit.
    FileExistsError
        If it exists and `overwrite` is False.
    """
    path = Path(path)
    if path.suffix not in (".zarr", ".nc"):
        raise SchemaError(f"{path.name!r} must end in .zarr or .nc.")
    if kind is not None:
        validate(ds, kind)
    _refuse_existing(path, overwrite)
    require_disk(path, ds.nbytes)
    ds = ds.drop_encoding().assign_attrs({"schema": kind or "", **(provenance or {})})
    if path.suffix == ".nc":
        ds = with_text_as(ds, object)
        with atomic_file(path, overwrite=overwrite) as made, _NETCDF:
            ds.to_netcdf(made, engine="netcdf4")
        return path
    ds = with_text_as(ds, np.dtypes.StringDType())
    encoding = zarr_encoding(ds, chunks, shards)
    import zarr

    with (
        atomic_dir(path, overwrite=overwrite) as made,
        zarr.config.set({"async.concurrency": _chunks_at_once(ds, encoding)}),
    ):
        ds.to_zarr(made, mode="w", zarr_format=3, consolidated=False, encoding=encoding)
    return path


def _chunks_at_once(ds: xr.Dataset, encoding: Mapping[str, Mapping[str, Any]]) -> int:
    """Return how many of the largest chunks (or shards) are encoded at once: copies of each."""
    sizes = [
        int(np.prod(e.get("shards", e["chunks"]))) * ds[name].dtype.itemsize
        for name, e in encoding.items()
        if "chunks" in e
    ]
    return int(np.clip(BYTES_IN_FLIGHT // max([1, *sizes]), 1, 10))


def read(path: str | Path, kind: str | None = None) -> xr.Dataset:
    """Open an artefact: a zarr store lazily (``.values`` reads), a netCDF file whole.

    Parameters
    ----------
    path : path
        The artefact.
    kind : str, optional
        Validate it against this schema.

    Returns
    -------
    xarray.Dataset
        Text as numpy ``str``, whatever the format.

    Raises
    ------
    UnavailableError
        If there is nothing at `path`.
    SchemaError
        If it does not follow the schema.
    """
    path = Path(path)
    if not path.exists():
        raise UnavailableError(
            f"There is no artefact at {path}.", "Make it first, or check the path."
        )
    if path.suffix == ".zarr":
        with _checksum_errors(path):
            ds = with_text_as(xr.open_zarr(path, chunks=None, consolidated=False), str)
    else:
        with _NETCDF:
            ds = with_text_as(xr.load_dataset(path, engine="netcdf4"), str)
    return ds if kind is None else validate(ds, kind)


@contextlib.contextmanager
def _checksum_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "checksum" not in str(error):
            raise
        raise ChecksumError(
            f"{path} holds bytes that do not match their checksum.",
            "Delete it and make it again, or restore it from a copy.",
        ) from error


def verify(path: str | Path) -> None:
    """Read every chunk of a zarr store once.

    Raises
    ------
    ChecksumError
        If a chunk does not match its checksum.
    """
    import zarr

    path = Path(path)
    with _checksum_errors(path):
        group = zarr.open_group(path, mode="r")
        for _, array in group.arrays():
            step = (array.shards or array.chunks)[0] if array.ndim else 1
            for start in range(0, array.shape[0] if array.ndim else 1, max(step, 1)):
                array[start : start + step] if array.ndim else array[()]
