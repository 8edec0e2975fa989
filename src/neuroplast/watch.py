"""A study watched live: a small server on the loopback address shows its progress and its growing report.

It answers three addresses: `/`, the page; `/state`, how far the study is; `/report`, the report as it is written
anew after every stage. It listens on 127.0.0.1 alone and refuses requests that name another host, so that no page from
elsewhere can read it.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from neuroplast.errors import InputError
from neuroplast.observer import Observer
from neuroplast.reading import read_bytes
from neuroplast.report.render import render

HOST = "127.0.0.1"
LAST_LOOK = 4.0
"""Seconds for which a page that has asked lately may fetch the finished report before the server goes."""


class Watch:
    """An observer that tells another one and every page that is open; serves while it is entered."""

    def __init__(self, run: Path, observer: Observer, port: int = 0) -> None:
        """Takes a port, 0 being a free one.

        Raises:
            InputError: when the port cannot be had.
        """
        self._observer, self._report = observer, run / "report.html"
        self._state: dict[str, Any] = {"run": str(run), "stage": None, "work": None, "finished": False}
        self._lock = threading.Lock()
        self._asked = 0.0
        self._told = threading.Event()
        try:
            self._server = _Server((HOST, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} cannot be had ({error}): choose another --port, or 0 for a free one"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def address(self) -> str:
        """Where to look."""
        return f"http://{HOST}:{self._server.server_port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        self._observer.say(f"watch it at {self.address}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._state |= {"finished": error is None, "stopped": error is not None, "work": None}
        if error is None and time.monotonic() - self._asked < LAST_LOOK:
            self._told.wait(LAST_LOOK)
        self._server.shutdown()
        self._server.server_close()

    def say(self, line: str) -> None:
        """Something slow begins, or something was found."""
        self._observer.say(line)

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage begins; `index` counts from 0."""
        with self._lock:
            self._state |= {"stage": name, "index": index, "total": total, "work": None}
        self._observer.stage(name, index, total)

    def progress(self, activity: str, done: int, total: int, note: str = "") -> None:
        """Work is under way."""
        with self._lock:
            self._state["work"] = {"activity": activity, "done": done, "total": total, "note": note}
        self._observer.progress(activity, done, total, note)

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """Type and body of an address; None where there is nothing."""
        if path == "/":
            return "text/html; charset=utf-8", render("watch.html.j2", run=self._state["run"]).encode()
        if path == "/state":
            with self._lock:
                self._asked = time.monotonic()
                state = self._state | {"report": self._written()}
            return "application/json", json.dumps(state).encode()
        if path == "/report" and self._report.is_file():
            return "text/html; charset=utf-8", read_bytes(self._report)
        return None

    def answered(self, path: str) -> None:
        """An answer has gone out: who has the finished report needs the server no more."""
        if path == "/report" and self._state["finished"]:
            self._told.set()

    def _written(self) -> int:
        """When the report was written; 0 where there is none yet."""
        return self._report.stat().st_mtime_ns if self._report.is_file() else 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a page that was closed before it was answered is no error of the study."""


def _handler(watch: Watch) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answers, unless the request names another host."""
            host, path = (self.headers.get("Host") or "").rpartition(":")[0], self.path.partition("?")[0]
            found = watch.answer(path) if host in (HOST, "localhost") else None
            if found is None:
                self.send_error(404)
                return
            kind, body = found
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            watch.answered(path)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal has the bars."""

    return Handler
