"""Downloads through pooch that resume, retry, verify, and never leave a wrong byte behind.

A file is looked for in this order: in the target folder, in the mirror, at its upstream address.
The mirror is a folder or an ``http(s)`` URL with one folder per study, as `BRAINALIGN_MIRROR` names
it. Whatever the source, a file gets its final name only after its hash was checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from brainalign.data.store import atomic_file, require_disk, sha256_file
from brainalign.errors import ChecksumError, ConfigError, UnavailableError

if TYPE_CHECKING:
    import requests

__all__ = ["RemoteFile", "fetch_files", "mirror_address", "mirror_folder", "verify_files"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_WORKERS = 4
_MAX_WAIT = 30.0
_STAMPS = ".verified.json"


class RemoteFile(NamedTuple):
    """What is promised of one file.

    Attributes
    ----------
    sha256 : str
        SHA-256 of the file's bytes, hexadecimal; or ``md5:`` and the MD5, where an archive
        publishes nothing else.
    url : str
        Upstream address.
    bytes : int
        Size.
    """

    sha256: str
    url: str
    bytes: int


class _SourceError(Exception):
    """One source failed for one file, for good; the next source may still have it."""


class _TryAgain(Exception):
    """A failure that may pass: broken connection, busy server."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Hosts:
    """Which hosts answered and which did not, shared by all files of one fetch."""

    def __init__(self) -> None:
        self.answered: set[str] = set()
        self.dead: dict[str, str] = {}


def fetch_files(
    registry: Mapping[str, RemoteFile | tuple[str, str, int]],
    study: str,
    folder: str | os.PathLike[str],
    *,
    mirror: str | os.PathLike[str] | None = None,
    retries: int = 5,
    timeout: float = 30.0,
    backoff: float = 0.5,
    progress: bool = True,
) -> list[Path]:
    """Bring every file of a registry into a folder, verified.

    A mirror folder is linked, not copied (hard link, else symbolic link), so that a large data set
    is not doubled. Broken downloads resume where they stopped, also in a later call; a resumed file
    with a wrong hash is thrown away and fetched whole once. Safe to call from several threads and
    processes at once.

    Parameters
    ----------
    registry : mapping of str to (sha256, url, bytes)
        Files by their path relative to `folder`, with ``/`` between parts.
    study : str
        Name of the study's folder in the mirror: ``MIRROR/<study>/<file>``.
    folder : path
        Where the files go. Created when missing.
    mirror : path or str, optional
        Folder or URL asked before the upstream address. Default: the environment variable
        `BRAINALIGN_MIRROR`; an empty string asks no mirror.
    retries : int
        Attempts after the first without progress, per file and source.
    timeout : float
        Seconds without a byte after which a connection counts as broken.
    backoff : float
        Wait before the first retry in seconds; doubles with each further one, up to 30 s. A host
        that cannot be reached at all is given up after two quick retries.
    progress : bool
        Show a progress bar where the output is a terminal.

    Returns
    -------
    list of Path
        The files, in the order of the registry.

    Raises
    ------
    UnavailableError
        A file could not be had from any source; the message says what was tried.
    DiskSpaceError
        The disk has too little room for what must be downloaded; nothing is written.
    ConfigError
        The registry or the mirror's address cannot be used.
    """
    files = {name: RemoteFile(*entry) for name, entry in registry.items()}
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ConfigError(f"Registry of {study}: {name!r} is not a path inside the folder.")
    folder = Path(folder).expanduser().absolute()
    paths = [folder / name for name in files]
    local, mirror_url = mirror_address(mirror)

    if not (missing := _missing(files, folder)):
        return paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            missing = _missing(files, folder)
            reasons: dict[str, list[str]] = {name: [] for name in missing}
            for name in missing:
                _remove_wrong(folder / name, local, study, name)
            if local is not None:
                missing = _link_all(files, missing, local / study, folder, reasons, progress)
            if missing:
                require_disk(folder, sum(files[name].bytes for name in missing))
                _download_all(
                    {name: files[name] for name in missing},
                    None if mirror_url is None else f"{mirror_url}/{quote(study)}",
                    folder,
                    reasons,
                    study=study,
                    retries=retries,
                    timeout=timeout,
                    backoff=backoff,
                    progress=progress,
                )
            _stamp(folder, files)
    except PermissionError as error:
        raise UnavailableError(
            f"{study}: cannot write to {folder}: {error.strerror}.",
            "Choose another folder, or set BRAINALIGN_DATA to one that can be written.",
        ) from error
    return paths


def verify_files(
    registry: Mapping[str, RemoteFile | tuple[str, str, int]],
    study: str,
    folder: str | os.PathLike[str],
    files: Iterable[str] | None = None,
) -> None:
    """Raise unless a folder holds the right bytes.

    Nothing is written. A file that `fetch_files` brought was hashed then and is trusted while its
    size and time of change stay; any other is hashed each time.

    Parameters
    ----------
    registry : mapping of str to (sha256, url, bytes)
        All files of the study.
    study : str
        Name for the messages.
    folder : path
        Folder of the study.
    files : iterable of str, optional
        Check these only.

    Raises
    ------
    UnavailableError
        Files are missing.
    ChecksumError
        A file's bytes differ from the promised ones.
    """
    folder = Path(folder).expanduser().absolute()
    chosen = {n: RemoteFile(*registry[n]) for n in (registry if files is None else files)}
    bad = _missing(chosen, folder)
    if bad:
        absent = [name for name in bad if not (folder / name).is_file()]
        remedy = f"Fetch the study again: brainalign fetch {study}"
        if absent:
            raise UnavailableError(f"{study}: {_some(absent)} missing in {folder}.", remedy)
        raise ChecksumError(
            f"{study}: the bytes of {_some(bad)} in {folder} are not the published ones "
            f"(expected sha256 {chosen[bad[0]].sha256}, "
            f"got {_hash(folder / bad[0], chosen[bad[0]])}).",
            remedy,
        )


def mirror_folder() -> Path | None:
    """Return the folder that `BRAINALIGN_MIRROR` names, or None if it names none or a URL."""
    folder, _ = mirror_address(None)
    return folder if folder is not None and folder.is_dir() else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def mirror_address(mirror: str | os.PathLike[str] | None) -> tuple[Path | None, str | None]:
    """Return the folder and the URL of a mirror, by default `BRAINALIGN_MIRROR`; one is None."""
    named = os.environ.get("BRAINALIGN_MIRROR", "") if mirror is None else os.fspath(mirror)
    if not named:
        return None, None
    parts = urlsplit(named)
    if parts.scheme in ("http", "https"):
        return None, named.rstrip("/")
    if parts.scheme == "file":
        return Path(url2pathname(parts.path)), None
    if "://" in named:
        raise ConfigError(
            f"The mirror {named!r} is neither a folder nor an http(s) URL.",
            "Set BRAINALIGN_MIRROR to one of them.",
        )
    return Path(named).expanduser().absolute(), None


def _missing(files: Mapping[str, RemoteFile], folder: Path) -> list[str]:
    stamps = _read_stamps(folder)
    return [name for name, entry in files.items() if not _good(folder / name, name, entry, stamps)]


def _good(path: Path, name: str, entry: RemoteFile, stamps: Mapping[str, list[Any]]) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != entry.bytes:
        return False
    return (
        stamps.get(name) == [entry.sha256, stat.st_size, stat.st_mtime_ns]
        or _hash(path, entry) == entry.sha256
    )


def _hash(path: Path, entry: RemoteFile) -> str:
    """Return the hash of a file, of the kind that is promised."""
    if not entry.sha256.startswith("md5:"):
        return sha256_file(path)
    with open(path, "rb") as handle:
        return "md5:" + hashlib.file_digest(handle, "md5").hexdigest()


def _read_stamps(folder: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads((folder / _STAMPS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(folder: Path, files: Mapping[str, RemoteFile]) -> None:
    """Remember that these files were verified; callers have just done so."""
    old = _read_stamps(folder)
    new = dict(old)
    for name, entry in files.items():
        stat = (folder / name).stat()
        new[name] = [entry.sha256, stat.st_size, stat.st_mtime_ns]
    if new != old:
        with atomic_file(folder / _STAMPS, overwrite=True) as temporary:
            Path(temporary).write_text(json.dumps(new))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into a folder; the others then find the files there."""
    with open(folder / ".fetch.lock", "a+b") as handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Another process is fetching into %s; waiting for it.", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s); fetching without a lock.", folder, error)
        yield


def _remove_wrong(path: Path, mirror: Path | None, study: str, name: str) -> None:
    if not (path.is_symlink() or path.exists()):
        return
    if mirror is not None and not path.is_symlink():
        # Fetching into the mirror itself: its file is not ours to remove.
        twin = mirror / study / name
        if twin.parent.resolve() / twin.name == path.parent.resolve() / path.name:
            return
    if path.is_file():
        logger.warning("%s does not hold the published bytes; fetching it again.", path)
    path.unlink()


def _link_all(
    files: Mapping[str, RemoteFile],
    missing: list[str],
    source: Path,
    folder: Path,
    reasons: dict[str, list[str]],
    progress: bool,
) -> list[str]:
    """Link from a mirror folder; return the names it could not give."""
    from tqdm import tqdm

    if not source.is_dir():
        logger.info("Mirror: there is no folder %s; asking upstream.", source)
        for name in missing:
            reasons[name].append(f"{source}: no such folder")
        return missing
    left = []
    for name in tqdm(missing, desc=source.name, unit="file", disable=None if progress else True):
        reason = _link(source / name, folder / name, files[name])
        if reason is not None:
            reasons[name].append(f"{source / name}: {reason}")
            logger.info("Mirror: %s: %s; asking upstream.", source / name, reason)
            left.append(name)
    return left


def _link(source: Path, target: Path, entry: RemoteFile) -> str | None:
    """Link `source` to `target` after checking its bytes; return why not, or None."""
    if not source.is_file():
        return "not there"
    size = source.stat().st_size
    if size != entry.bytes:
        return f"wrong bytes ({size} of them, {entry.bytes} expected)"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            try:
                os.symlink(source.resolve(), temporary)
            except OSError:
                require_disk(target.parent, entry.bytes)
                shutil.copyfile(source, temporary)
        if (found := _hash(temporary, entry)) != entry.sha256:
            return f"wrong bytes (sha256 {found[:12]}…, {entry.sha256[:12]}… expected)"
        os.replace(temporary, target)
    except OSError as error:
        if isinstance(error, PermissionError) and not os.access(target.parent, os.W_OK):
            raise
        return f"cannot be read ({error})"
    finally:
        # Renaming onto another link to the same file does nothing, so the name may still be there.
        temporary.unlink(missing_ok=True)
    return None


def _download_all(
    files: Mapping[str, RemoteFile],
    mirror_url: str | None,
    folder: Path,
    reasons: dict[str, list[str]],
    *,
    study: str,
    retries: int,
    timeout: float,
    backoff: float,
    progress: bool,
) -> None:
    import pooch
    import requests
    from tqdm import tqdm

    # Pooch tells of every file at INFO through a handler of its own.
    pooch.get_logger().setLevel("WARNING")
    hosts, stop, local = _Hosts(), threading.Event(), threading.local()
    bar = tqdm(
        total=sum(entry.bytes for entry in files.values()),
        desc=study,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )

    def one(name: str, entry: RemoteFile) -> None:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        sources = [] if mirror_url is None else [f"{mirror_url}/{quote(name)}"]
        for url in [*sources, entry.url]:
            reason = _from_url(
                name,
                entry,
                url,
                folder,
                _Downloader(
                    _part(folder / name, entry),
                    entry.bytes,
                    session=local.session,
                    hosts=hosts,
                    stop=stop,
                    retries=retries,
                    timeout=timeout,
                    backoff=backoff,
                    advance=bar.update,
                ),
            )
            if reason is None:
                return
            reasons[name].append(f"{url}: {reason}")
            if url != entry.url:
                logger.info("Mirror: %s: %s; asking upstream.", url, reason)
        raise UnavailableError(
            f"{study}: {name} could not be had. Tried " + "; ".join(reasons[name]) + ".",
            "Check the network, or set BRAINALIGN_MIRROR to a folder or URL that holds "
            f"{study}/ with the published files.",
        )

    for name in files:
        # Here, because pooch's own making of folders is not safe between threads.
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with bar, ThreadPoolExecutor(_WORKERS) as pool:
        jobs = [pool.submit(one, name, entry) for name, entry in files.items()]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in jobs:
                if job in done:
                    job.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _part(path: Path, entry: RemoteFile) -> Path:
    # Named by the promised content: any source may finish what another began, and a new version
    # starts anew.
    promised = entry.sha256.replace(":", "-")[:16]
    return path.with_name(f".{path.name}.{promised}.part")


def _from_url(
    name: str, entry: RemoteFile, url: str, folder: Path, downloader: _Downloader
) -> str | None:
    """Download one file from one address through pooch; return why not, or None."""
    import pooch

    promised = entry.sha256 if ":" in entry.sha256 else f"sha256:{entry.sha256}"
    cache = pooch.create(path=folder, base_url="", registry={name: promised}, urls={name: url})
    for whole in (False, True):
        if whole:
            logger.info("%s: the resumed file has a wrong sha256; fetching it whole.", url)
        try:
            cache.fetch(name, downloader=downloader)
            return None
        except _SourceError as error:
            return str(error)
        except ValueError as error:
            # Pooch's word for a hash that differs; it has removed the file.
            if "hash" not in str(error):
                raise
            if not downloader.resumed:
                break
    return f"wrong bytes (their sha256 is not {entry.sha256[:12]}…)"


class _Downloader:
    """A pooch downloader that continues a partial file beside the target.

    Parameters
    ----------
    part : Path
        The partial file, kept between calls.
    size : int
        Promised size in bytes.
    session, hosts, stop
        Connection of this thread; what is known of hosts; set to end all waiting.
    retries, timeout, backoff
        As in `fetch_files`.
    advance : callable
        Told the bytes gained, negative when some are thrown away.
    """

    def __init__(
        self,
        part: Path,
        size: int,
        *,
        session: requests.Session,
        hosts: _Hosts,
        stop: threading.Event,
        retries: int,
        timeout: float,
        backoff: float,
        advance: Callable[[int], Any],
    ) -> None:
        self.part, self.size, self.session = part, size, session
        self.hosts, self.stop, self.advance = hosts, stop, advance
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.resumed = False
        self._ranges = True

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        self.resumed = False
        failures = 0
        self.advance(self._have())
        while True:
            before = self._have()
            try:
                if not (self.part.exists() and before == self.size):
                    self._request(url, before)
                break
            except _TryAgain as error:
                gained = self._have() - before
                if gained > 0 and gained >= self.size // 20:
                    failures = 0
                failures += 1
                if failures > self.retries or self.stop.is_set():
                    raise _SourceError(
                        f"{error} ({self._have()} of {self.size} bytes after {failures} attempts)"
                    ) from error
                pause = min(max(self.backoff * 2 ** (failures - 1), error.wait), _MAX_WAIT)
                logger.debug("%s: %s; again in %.1f s.", url, error, pause)
                self.stop.wait(pause)
        self.resumed |= before > 0
        with open(self.part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.part, output_file)

    def _have(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def _discard(self) -> None:
        self.advance(-self._have())
        self.part.unlink(missing_ok=True)

    def _connect(self, url: str, headers: dict[str, str]) -> requests.Response:
        """Open the connection; a host that never answered is given up after quick retries."""
        import requests

        host = urlsplit(url).netloc
        for attempt in range(3):
            if host in self.hosts.dead:
                raise _SourceError(self.hosts.dead[host])
            try:
                response = self.session.get(
                    url,
                    headers=headers,
                    stream=True,
                    timeout=(min(self.timeout, 5.0), self.timeout),
                )
                self.hosts.answered.add(host)
                return response
            except requests.exceptions.SSLError as error:
                raise _SourceError(f"no trusted connection ({error})") from error
            except requests.exceptions.ConnectionError as error:
                if not _unreachable(error) or host in self.hosts.answered:
                    raise _TryAgain(f"connection broken ({_short(error)})") from error
                reason = f"{host} cannot be reached ({_short(error)})"
                if attempt < 2 and not isinstance(error, requests.exceptions.ConnectTimeout):
                    self.stop.wait(0.2 * (attempt + 1))
                    continue
                self.hosts.dead[host] = reason
                raise _SourceError(reason) from error
            except requests.exceptions.Timeout as error:
                raise _TryAgain(f"no answer within {self.timeout:g} s") from error
            except (requests.exceptions.RequestException, ValueError) as error:
                raise _SourceError(f"not an address that can be asked ({error})") from error
        raise AssertionError("unreachable")

    def _request(self, url: str, have: int) -> None:
        """Ask for what is missing and append it; raise `_TryAgain` if some is still missing."""
        import requests

        if have > self.size or (have and not self._ranges):
            self._discard()
            have = 0
        # Compressed transfer would make byte ranges meaningless.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with self._connect(url, headers) as response:
            status = response.status_code
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if status in (408, 425, 429) or status >= 500:
                raise _TryAgain(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
            if status == 416:
                self._discard()
                raise _TryAgain("HTTP 416: the partial file does not fit")
            if status not in (200, 206):
                raise _SourceError(f"HTTP {status}")
            if status == 206:
                span, _, total = response.headers.get("Content-Range", "").partition("/")
                if encoded or not have or not span.startswith(f"bytes {have}-"):
                    self._ranges = False
                    self._discard()
                    raise _TryAgain("the server sent another range than asked")
                if total.isdigit() and int(total) != self.size:
                    self._discard()
                    raise _SourceError(f"wrong bytes ({total} of them, {self.size} expected)")
                self.resumed = True
            else:
                length = response.headers.get("Content-Length", "")
                if length.isdigit() and not encoded and int(length) != self.size:
                    raise _SourceError(f"wrong bytes ({length} of them, {self.size} expected)")
                if have:
                    self._discard()
                    have = 0
            try:
                with open(self.part, "ab") as handle:
                    for chunk in response.iter_content(_CHUNK):
                        handle.write(chunk)
                        self.advance(len(chunk))
                        have += len(chunk)
                        if have > self.size or self.stop.is_set():
                            break
            except (requests.exceptions.RequestException, OSError) as error:
                if isinstance(error, requests.exceptions.RequestException):
                    raise _TryAgain(f"connection broken ({_short(error)})") from error
                raise
        if have > self.size:
            self._discard()
            raise _SourceError(f"wrong bytes (more than the {self.size} expected)")
        if have < self.size:
            raise _TryAgain("the connection ended early")


def _unreachable(error: Exception) -> bool:
    import requests
    from urllib3.exceptions import MaxRetryError, NewConnectionError

    if isinstance(error, (requests.exceptions.ConnectTimeout, requests.exceptions.ProxyError)):
        return True
    cause = error.args[0] if error.args else None
    return isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)


def _short(error: Exception) -> str:
    """Return the innermost reason of a wrapped connection error."""
    cause: Any = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    text = str(cause)
    return text.rsplit(": ", 1)[-1][:120] or type(error).__name__


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdigit() else 0.0
