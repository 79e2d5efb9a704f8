"""Downloads against a local server that drops connections and lies: nothing wrong is ever kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from brainalign.data import fetch
from brainalign.data.fetch import RemoteFile, fetch_files, verify_files
from brainalign.errors import ChecksumError, ConfigError, DiskSpaceError, UnavailableError

GOOD = np.random.default_rng(0).bytes(400_000)
WRONG = bytes(b ^ 0xFF for b in GOOD)
HALF = len(GOOD) // 2


class Server:
    """A local web server; `serve` decides what happens to the n-th request of a path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.counts: Counter[str] = Counter()
        self.serve: Callable[[BaseHTTPRequestHandler, bytes, int], None] = whole
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                outer.counts[self.path] += 1
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer.serve(self, outer.files[self.path], outer.counts[self.path])

            def log_message(self, *args: object) -> None:
                return

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


def reply(handler, body, *, status=200, length=None, **headers) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def drop(handler) -> None:
    """Break the connection as a failing line would."""
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def start_of(handler) -> int:
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
    return int(match.group(1)) if match else 0


def whole(handler, body, count) -> None:
    """Answer rightly, ranges included."""
    start = start_of(handler)
    if start >= len(body) > 0:
        reply(handler, b"", status=416)
    elif start:
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        reply(handler, body[start:], status=206, Content_Range=span)
    else:
        reply(handler, body)


def dropping(step: int) -> Callable:
    """Send `step` bytes of what is asked, then break the connection."""

    def serve(handler, body, count) -> None:
        start = start_of(handler)
        if len(body) - start <= step:
            return whole(handler, body, count)
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        reply(
            handler,
            body[start : start + step],
            status=206 if start else 200,
            length=len(body) - start,
            **({"Content_Range": span} if start else {}),
        )
        return drop(handler)

    return serve


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.files = {"/up/a.bin": GOOD, "/mirror/toy/a.bin": GOOD}
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch) -> None:
    monkeypatch.delenv("BRAINALIGN_MIRROR", raising=False)


def entry(url: str, body: bytes = GOOD) -> RemoteFile:
    return RemoteFile(hashlib.sha256(body).hexdigest(), url, len(body))


def get(server: Server, folder: Path, **options) -> Path:
    options = {"retries": 3, "backoff": 0.01, "timeout": 5, "progress": False, **options}
    return fetch_files({"a.bin": entry(f"{server.url}/up/a.bin")}, "toy", folder, **options)[0]


def kept(folder: Path) -> dict[str, bytes]:
    """All files of a folder by final name; hidden names are not final."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def test_plain_download_is_asked_once(server, tmp_path):
    assert get(server, tmp_path).read_bytes() == GOOD
    get(server, tmp_path)
    assert server.requests == [("/up/a.bin", None)]
    assert kept(tmp_path) == {"a.bin": GOOD}
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


def test_dropped_connection_resumes(server, tmp_path):
    server.serve = dropping(150_000)
    assert get(server, tmp_path).read_bytes() == GOOD
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for _, r in server.requests if r]
    assert len(starts) >= 2 and starts == sorted(starts) and starts[0] > 0


def test_progress_resets_the_count_of_failures(server, tmp_path):
    server.serve = dropping(70_000)
    assert get(server, tmp_path, retries=1).read_bytes() == GOOD
    assert len(server.requests) > 3


def test_resumes_in_a_later_call(server, tmp_path):
    server.serve = lambda h, body, n: (
        dropping(HALF)(h, body, n) if n == 1 else reply(h, b"", status=503)
    )
    with pytest.raises(UnavailableError, match="503"):
        get(server, tmp_path, retries=1)
    assert kept(tmp_path) == {}
    server.serve = whole
    get(server, tmp_path)
    assert kept(tmp_path) == {"a.bin": GOOD}
    assert server.requests[-1][1] is not None, "the second call must ask for the rest only"


def test_server_that_ignores_range(server, tmp_path):
    def serve(handler, body, count):
        if count == 1:
            reply(handler, body[:HALF], length=len(body))
            drop(handler)
        else:
            reply(handler, body)

    server.serve = serve
    assert get(server, tmp_path).read_bytes() == GOOD
    assert server.requests[1][1] is not None


def test_server_that_sends_another_range(server, tmp_path):
    def serve(handler, body, count):
        if count == 1:
            reply(handler, body[:HALF], length=len(body))
            drop(handler)
        elif handler.headers.get("Range"):
            reply(
                handler, body[7:], status=206, Content_Range=f"bytes 7-{len(body) - 1}/{len(body)}"
            )
        else:
            reply(handler, body)

    server.serve = serve
    assert get(server, tmp_path).read_bytes() == GOOD


def test_resumed_file_with_wrong_hash_is_fetched_whole(server, tmp_path):
    server.serve = lambda h, body, n: dropping(HALF)(h, WRONG, n) if n == 1 else whole(h, body, n)
    assert get(server, tmp_path).read_bytes() == GOOD
    assert [r is None for _, r in server.requests] == [True, False, True]


def test_stale_part_file_is_not_believed(server, tmp_path):
    path = fetch._part(tmp_path / "a.bin", entry(""))
    path.write_bytes(WRONG)
    assert get(server, tmp_path).read_bytes() == GOOD
    path.write_bytes(WRONG + b"more")
    (tmp_path / "a.bin").unlink()
    assert get(server, tmp_path).read_bytes() == GOOD
    assert kept(tmp_path) == {"a.bin": GOOD}


def test_wrong_bytes_are_never_kept(server, tmp_path):
    server.files["/up/a.bin"] = WRONG
    with pytest.raises(UnavailableError, match=r"wrong bytes.*sha256"):
        get(server, tmp_path)
    assert kept(tmp_path) == {}
    assert len(server.requests) == 1, "a whole file with a wrong hash is not asked again"


@pytest.mark.parametrize("body", [GOOD[:HALF], GOOD + b"x", b"", b"<html>Please log in</html>"])
def test_wrong_size_is_refused_before_the_body(server, tmp_path, body):
    server.files["/up/a.bin"] = body
    with pytest.raises(UnavailableError, match="400000 expected"):
        get(server, tmp_path)
    assert kept(tmp_path) == {}


def test_truncated_under_the_right_length(server, tmp_path):
    def serve(handler, body, count):
        reply(handler, body[:HALF], length=len(body))
        drop(handler)

    server.serve = serve
    with pytest.raises(UnavailableError, match="of 400000 bytes after"):
        get(server, tmp_path)
    assert kept(tmp_path) == {}


def test_endless_body_is_cut(server, tmp_path):
    def serve(handler, body, count):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        for _ in range(200):
            handler.wfile.write(body)

    server.serve = serve
    with pytest.raises(UnavailableError, match="more than the 400000"):
        get(server, tmp_path)
    assert kept(tmp_path) == {} and not list(tmp_path.rglob("*.part"))


def test_busy_server_is_asked_again(server, tmp_path):
    server.serve = lambda h, body, n: reply(h, b"busy", status=503) if n < 3 else whole(h, body, n)
    assert get(server, tmp_path).read_bytes() == GOOD
    assert len(server.requests) == 3


def test_back_off_doubles(server, tmp_path):
    import requests

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    waits: list[float | None] = []
    later = {"Retry_After": "7"}
    server.serve = lambda h, body, n: reply(h, b"", status=503, **(later if n == 3 else {}))
    part = fetch._part(tmp_path / "a.bin", entry(""))
    downloader = fetch._Downloader(
        part, len(GOOD), session=requests.Session(), hosts=fetch._Hosts(), stop=Stop(),
        retries=4, timeout=5, backoff=0.5, advance=lambda n: None,
    )  # fmt: skip
    with pytest.raises(fetch._SourceError, match="503"):
        downloader(f"{server.url}/up/a.bin", str(tmp_path / "out"), None)
    assert waits == [0.5, 1.0, 7.0, 4.0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusal_is_not_repeated(server, tmp_path, status):
    server.serve = lambda h, body, n: reply(h, b"no", status=status)
    with pytest.raises(UnavailableError, match=f"HTTP {status}"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_silent_server_times_out(server, tmp_path):
    release = threading.Event()
    server.serve = lambda h, body, n: release.wait(10)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"no answer|broken"):
        get(server, tmp_path, timeout=0.3, retries=1)
    release.set()
    assert time.monotonic() - start < 4


def test_stalled_body_times_out_and_resumes(server, tmp_path):
    release = threading.Event()

    def serve(handler, body, count):
        if count > 1:
            return whole(handler, body, count)
        reply(handler, body[:HALF], length=len(body))
        handler.wfile.flush()
        release.wait(10)
        return drop(handler)

    server.serve = serve
    assert get(server, tmp_path, timeout=0.5).read_bytes() == GOOD
    release.set()


def test_offline_fails_within_seconds(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = {f"{i}.bin": entry(f"http://127.0.0.1:{port}/{i}") for i in range(200)}
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"cannot be reached.*BRAINALIGN_MIRROR"):
        fetch_files(registry, "toy", tmp_path, progress=False)
    assert time.monotonic() - start < 5
    assert kept(tmp_path) == {}


def test_unresolvable_host_fails_within_seconds(tmp_path, monkeypatch):
    def no_such_name(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"nowhere\.invalid"):
        fetch_files({"a": entry("http://nowhere.invalid/a")}, "toy", tmp_path, progress=False)
    assert time.monotonic() - start < 5


def test_mirror_folder_is_linked_not_copied(server, tmp_path):
    (tmp_path / "mirror/toy").mkdir(parents=True)
    (tmp_path / "mirror/toy/a.bin").write_bytes(GOOD)
    path = get(server, tmp_path / "data", mirror=tmp_path / "mirror")
    assert path.samefile(tmp_path / "mirror/toy/a.bin")
    assert server.requests == []
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        ".fetch.lock",
        ".verified.json",
        "a.bin",
    ]


def test_mirror_on_another_file_system_is_linked(server, tmp_path, monkeypatch):
    (tmp_path / "mirror/toy").mkdir(parents=True)
    (tmp_path / "mirror/toy/a.bin").write_bytes(GOOD)

    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    path = get(server, tmp_path / "data", mirror=tmp_path / "mirror")
    assert path.is_symlink() and path.read_bytes() == GOOD
    monkeypatch.setattr(os, "symlink", refuse)
    path = get(server, tmp_path / "data2", mirror=(tmp_path / "mirror").as_uri())
    assert not path.is_symlink() and path.read_bytes() == GOOD
    # The mirror goes away: the link leads nowhere and the file comes from upstream.
    (tmp_path / "mirror/toy/a.bin").unlink()
    assert get(server, tmp_path / "data").read_bytes() == GOOD
    assert len(server.requests) == 1


def test_mirror_without_the_file_falls_to_upstream(server, tmp_path, caplog):
    (tmp_path / "mirror/toy").mkdir(parents=True)
    with caplog.at_level("INFO", logger="brainalign.data.fetch"):
        assert get(server, tmp_path / "data", mirror=tmp_path / "mirror").read_bytes() == GOOD
    assert "not there" in caplog.text


@pytest.mark.parametrize("body", [WRONG, GOOD[:HALF]])
def test_mirror_with_wrong_bytes_falls_to_upstream(server, tmp_path, caplog, body):
    (tmp_path / "mirror/toy").mkdir(parents=True)
    (tmp_path / "mirror/toy/a.bin").write_bytes(body)
    with caplog.at_level("INFO", logger="brainalign.data.fetch"):
        path = get(server, tmp_path / "data", mirror=tmp_path / "mirror")
    assert path.read_bytes() == GOOD and "wrong bytes" in caplog.text
    assert (tmp_path / "mirror/toy/a.bin").read_bytes() == body, "the mirror is not ours to change"
    server.files.clear()
    with pytest.raises(UnavailableError, match=r"wrong bytes.*HTTP 404"):
        get(server, tmp_path / "other", mirror=tmp_path / "mirror")
    assert kept(tmp_path / "other") == {}


def test_mirror_from_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINALIGN_MIRROR", f"{server.url}/mirror/")
    assert get(server, tmp_path).read_bytes() == GOOD
    assert server.requests == [("/mirror/toy/a.bin", None)]


def test_mirror_url_first_then_upstream_continues_its_part(server, tmp_path):
    def serve(handler, body, count):
        if handler.path.startswith("/mirror"):
            if count > 1:
                return reply(handler, b"", status=500)
            return dropping(HALF)(handler, body, count)
        return whole(handler, body, count)

    server.serve = serve
    get(server, tmp_path, mirror=f"{server.url}/mirror")
    assert kept(tmp_path) == {"a.bin": GOOD}
    assert server.requests[-1][0] == "/up/a.bin" and server.requests[-1][1] is not None


def test_mirror_url_with_wrong_bytes_falls_to_upstream(server, tmp_path):
    server.files["/mirror/toy/a.bin"] = WRONG
    get(server, tmp_path, mirror=f"{server.url}/mirror")
    assert kept(tmp_path) == {"a.bin": GOOD}


def test_unusable_mirror_is_named(server, tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor"):
        get(server, tmp_path, mirror="s3://bucket")


def test_path_outside_the_folder_is_refused(server, tmp_path):
    for name in ("../a.bin", "/a.bin", "x/../../a.bin"):
        with pytest.raises(ConfigError, match="inside the folder"):
            fetch_files({name: entry(server.url)}, "toy", tmp_path / "in")
    assert server.requests == []


def test_damaged_cache_is_mended(server, tmp_path):
    path = get(server, tmp_path)
    path.write_bytes(WRONG)
    with pytest.raises(ChecksumError, match=r"expected sha256.*brainalign fetch toy"):
        verify_files({"a.bin": entry("")}, "toy", tmp_path)
    assert get(server, tmp_path).read_bytes() == GOOD
    verify_files({"a.bin": entry("")}, "toy", tmp_path)


def test_damaged_cache_is_not_kept_when_nothing_better_comes(server, tmp_path):
    get(server, tmp_path).write_bytes(WRONG)
    server.files.clear()
    with pytest.raises(UnavailableError):
        get(server, tmp_path)
    assert kept(tmp_path) == {}
    with pytest.raises(UnavailableError, match=r"a\.bin missing"):
        verify_files({"a.bin": entry("")}, "toy", tmp_path)


def test_fetching_into_the_mirror_itself_removes_nothing(server, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/a.bin").write_bytes(WRONG)
    server.files.clear()
    with pytest.raises(UnavailableError):
        get(server, tmp_path / "toy", mirror=tmp_path)
    assert (tmp_path / "toy/a.bin").read_bytes() == WRONG


def test_verified_files_are_hashed_once(server, tmp_path, monkeypatch):
    get(server, tmp_path)
    hashed = []
    monkeypatch.setattr(fetch, "sha256_file", lambda p: hashed.append(p) or "")
    verify_files({"a.bin": entry("")}, "toy", tmp_path)
    assert hashed == []
    os.utime(tmp_path / "a.bin", ns=(1, 1))
    with pytest.raises(ChecksumError):
        verify_files({"a.bin": entry("")}, "toy", tmp_path)
    assert hashed


def test_checking_a_folder_writes_nothing(tmp_path):
    (tmp_path / "a.bin").write_bytes(GOOD)
    verify_files({"a.bin": entry("")}, "toy", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_full_disk_stops_before_the_first_byte(server, tmp_path, monkeypatch):
    def refuse(path, n_bytes):
        raise DiskSpaceError(f"needs {n_bytes} bytes")

    monkeypatch.setattr(fetch, "require_disk", refuse)
    with pytest.raises(DiskSpaceError, match="400000"):
        get(server, tmp_path)
    assert server.requests == [] and kept(tmp_path) == {}


def test_error_while_writing_leaves_nothing(server, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        get(server, tmp_path)
    assert kept(tmp_path) == {}


def test_two_threads_ask_once(server, tmp_path):
    def slow(handler, body, count):
        time.sleep(0.2)
        whole(handler, body, count)

    server.serve = slow
    found: list[Path] = []

    def ask() -> None:
        found.append(get(server, tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and kept(tmp_path) == {"a.bin": GOOD}
    assert len(server.requests) == 1


def test_two_processes_ask_once(server, tmp_path):
    def slow(handler, body, count):
        time.sleep(0.5)
        whole(handler, body, count)

    server.serve = slow
    e = entry(f"{server.url}/up/a.bin")
    code = (
        "import sys; from brainalign.data.fetch import fetch_files;"
        f"fetch_files({{'a.bin': {tuple(e)!r}}}, 'toy', sys.argv[1], mirror='', progress=False)"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    assert kept(tmp_path) == {"a.bin": GOOD} and len(server.requests) == 1


def test_killed_download_is_continued(server, tmp_path):
    """A process that dies midway leaves no final name, and its bytes are not fetched again."""
    begun = threading.Event()

    def serve(handler, body, count):
        if count > 1:
            return whole(handler, body, count)
        reply(handler, body[:HALF], length=len(body))
        handler.wfile.flush()
        begun.set()
        time.sleep(5)
        return drop(handler)

    server.serve = serve
    e = entry(f"{server.url}/up/a.bin")
    code = (
        "import sys; from brainalign.data.fetch import fetch_files;"
        f"fetch_files({{'a.bin': {tuple(e)!r}}}, 'toy', sys.argv[1], mirror='', progress=False)"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    assert begun.wait(60)
    part = fetch._part(tmp_path / "a.bin", e)
    while not part.exists() or not part.stat().st_size:
        time.sleep(0.02)
    job.kill()
    job.wait()
    assert "a.bin" not in kept(tmp_path)
    get(server, tmp_path)
    assert kept(tmp_path)["a.bin"] == GOOD
    assert server.requests[-1][1] is not None


def test_many_files_and_names_with_odd_characters(server, tmp_path):
    names = [f"sub dir/ä#{i}?.bin" for i in range(20)]
    bodies = {name: f"{name} body".encode() for name in names}
    server.files = {f"/mirror/toy/{quote(n)}": b for n, b in bodies.items()}
    registry = {n: entry("http://127.0.0.1:9/none", b) for n, b in bodies.items()}
    paths = fetch_files(registry, "toy", tmp_path, mirror=f"{server.url}/mirror", progress=False)
    assert [p.read_bytes() for p in paths] == list(bodies.values())


def test_empty_file(server, tmp_path):
    server.files["/up/empty"] = b""
    (path,) = fetch_files(
        {"empty": entry(f"{server.url}/up/empty", b"")}, "toy", tmp_path, progress=False
    )
    assert path.read_bytes() == b""
