"""Tars behind HTTP, as buckets are: a real server, ranges of bytes, entity tags, processes of their own."""

import contextlib
import hashlib
import multiprocessing
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from paligemma.data.example import Example
from paligemma.data.sources.tars import Tars, write_tars
from paligemma.errors import DataError
from paligemma.processing.image import load_image

pytest.importorskip("aiohttp", reason="fsspec speaks HTTP through it")
SIDE = 60  # of a picture: pixels of noise, which stay as large in a PNG


def example(i: int, seed: int = 0) -> Example:
    noise = np.random.default_rng([seed, i]).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    return Example((noise,), "caption en", f"number {i}, {seed}")


class Store(ThreadingHTTPServer):
    """Files of a folder; counts the bytes of bodies that it sends."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.sent, self.lock = folder, 0, threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.server.folder / self.path.lstrip("/")
        body = file.read_bytes() if file.is_file() else b""
        first, last, status = 0, len(body) - 1, HTTPStatus.OK if body else HTTPStatus.NOT_FOUND
        if body and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            status = HTTPStatus.PARTIAL_CONTENT
        part = body[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        if status is HTTPStatus.PARTIAL_CONTENT:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            with self.server.lock:
                self.server.sent += len(part)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    server = Store(tmp_path / "bucket")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def same(found: Example, expected: Example) -> bool:
    (a,), (b,) = found.images, expected.images
    return found.suffix == expected.suffix and np.array_equal(load_image(a), b)


def test_an_example_costs_its_own_bytes(store: Store, tmp_path: Path):
    shards = write_tars((example(i) for i in range(20)), store.folder, per_shard=10)
    source = Tars(f"{store.address}/shard-{{000000..000001}}.tar", index_folder=tmp_path / "index")
    assert len(source) == 20
    for i in (13, 2, 19):
        before = store.sent
        assert same(source[i], example(i))
        assert store.sent - before < 2 * 3 * SIDE**2, "one picture and its words"
    before = store.sent
    again = Tars(f"{store.address}/shard-{{000000..000001}}.tar", index_folder=tmp_path / "index")
    assert len(again) == 20
    assert store.sent - before < shards[0].stat().st_size / 10, "the index is kept"


def test_an_object_that_was_replaced_is_looked_through_again(store: Store, tmp_path: Path):
    def opened() -> Tars:
        import fsspec

        fsspec.filesystem("http").invalidate_cache()
        return Tars(f"{store.address}/shard-000000.tar", index_folder=tmp_path / "index")

    (shard,) = write_tars((example(i) for i in range(3)), store.folder)
    assert same(opened()[1], example(1))
    size = shard.stat().st_size
    shard.unlink()
    write_tars((example(i, seed=1) for i in reversed(range(3))), store.folder)
    assert shard.stat().st_size == size, "only its entity tag tells"
    assert same(opened()[0], example(2, seed=1))


def _read(source: Tars, i: int) -> str:
    return source[i].suffix


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_processes_read_after_their_parent_did(method: str, store: Store, tmp_path: Path):
    write_tars((example(i) for i in range(4)), store.folder)
    source = Tars(f"{store.address}/shard-000000.tar", index_folder=tmp_path / "index")
    assert _read(source, 0) == "number 0, 0"
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap_async(_read, [(source, i) for i in range(4)]).get(timeout=120)
    assert found == [f"number {i}, 0" for i in range(4)]


def test_an_object_that_is_not_there_is_named(store: Store, tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.tar cannot be read"):
        Tars(f"{store.address}/gone.tar", index_folder=tmp_path / "index")
