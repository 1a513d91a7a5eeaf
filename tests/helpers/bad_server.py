"""A local HTTP server that serves a folder and misbehaves on request."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# For fastflower.shards.remote: the usual number of attempts but short timeouts; 16 pieces per shard.
IMPATIENT = {"_PIECE": 1 << 16, "_TIMEOUT": 1.0, "_FIRST_PAUSE": 0.01, "_LONGEST_PAUSE": 0.05}


def deafen(files: Any, but: str) -> None:
    """Make prefetch threads ignore that RemoteFiles are stopped, except for the file `but`."""
    request = files._request

    def deaf(self: Any, name: str, start: int | None, end: int | None) -> bytes:
        if threading.current_thread().name == "fastflower-download" and name != but:
            time.sleep(1000)
        return request(self, name, start, end)

    files._request = deaf


Fault = Callable[[str, int], str | None]
"""Maps (file name, number of earlier requests) to a fault: "503", "truncate", "stall", "flip", "whole" or None."""


class BadServer(ThreadingHTTPServer):
    """Serves `folder` and counts requests by file."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault: Fault = lambda _name, _asked: None
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes by file."""
        self.over = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/shards"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up; tests expect them."""


class _Handler(BaseHTTPRequestHandler):
    server: BadServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        with self.server.lock:
            fault = self.server.fault(name, self.server.asked[name])
            self.server.asked[name] += 1
        path = self.server.folder / name
        if fault == "503":
            self.send_error(503)
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(name, path.read_bytes(), fault)

    def _send(self, name: str, data: bytes, fault: str | None) -> None:
        wanted = self.headers.get("Range")
        if wanted and fault != "whole":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            total, data = len(data), data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault in ("truncate", "stall"):
            data = data[: len(data) // 2]
        self.wfile.write(data)
        self.wfile.flush()
        with self.server.lock:
            self.server.sent[name] += len(data)
        if fault == "stall":
            self.server.over.wait()
        self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[BadServer]:
    """Run the server within the context."""
    server = BadServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
