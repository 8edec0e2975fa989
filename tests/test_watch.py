"""A study watched live: on the loopback address alone, its progress and its growing report."""

import json
import socket
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from neuroplast import watch as watching
from neuroplast.errors import InputError
from neuroplast.observer import Silent
from neuroplast.watch import Watch


@pytest.fixture(autouse=True)
def _short_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was open a moment ago is waited for; none of these is."""
    monkeypatch.setattr(watching, "LAST_LOOK", 0.1)


class Told(Silent):
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stage(self, name: str, index: int, total: int) -> None:
        self.stages.append(name)


def ask(address: str, **headers: str) -> tuple[str, bytes]:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read()


def test_it_says_where_to_look_and_tells_how_far_the_study_is(tmp_path: Path) -> None:
    told = Told()
    with Watch(tmp_path / "run", told) as watch:
        assert told.lines == [f"watch it at {watch.address}"] and watch.address.startswith("http://127.0.0.1:")
        watch.stage("poisoned/x", 2, 5)
        watch.progress("fine-tuning", 3, 40, "loss 0.5")
        kind, body = ask(watch.address + "state")
        state = json.loads(body)
        assert kind == "application/json"
        assert (state["stage"], state["index"], state["total"]) == ("poisoned/x", 2, 5)
        assert state["work"] == {"activity": "fine-tuning", "done": 3, "total": 40, "note": "loss 0.5"}
        assert not state["finished"] and state["report"] == 0
        assert told.stages == ["poisoned/x"], "the terminal hears of it too"
        kind, body = ask(watch.address)
        assert kind.startswith("text/html") and b"The report appears" in body


def test_the_report_is_served_as_it_is_written_anew(tmp_path: Path) -> None:
    with Watch(tmp_path, Silent()) as watch:
        with pytest.raises(HTTPError, match="404"):
            ask(watch.address + "report")
        (tmp_path / "report.html").write_text("<p>one")
        first = json.loads(ask(watch.address + "state")[1])["report"]
        assert ask(f"{watch.address}report?{first}")[1] == b"<p>one"
        (tmp_path / "report.html").write_text("<p>two")
        assert ask(watch.address + "report")[1] == b"<p>two"


def test_nothing_else_of_the_folder_is_served(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("secret")
    with Watch(tmp_path, Silent()) as watch:
        for path in ("study.toml", "../study.toml", "report.html", "%2e%2e/study.toml"):
            with pytest.raises(HTTPError, match="404"):
                ask(watch.address + path)


def test_a_page_from_elsewhere_cannot_read_it_by_another_name(tmp_path: Path) -> None:
    with Watch(tmp_path, Silent()) as watch:
        port = watch.address.rstrip("/").rpartition(":")[2]
        assert ask(watch.address + "state", Host=f"localhost:{port}")
        with pytest.raises(HTTPError, match="404"):
            ask(watch.address + "state", Host=f"evil.example:{port}")


def test_it_listens_on_the_loopback_address_alone(tmp_path: Path) -> None:
    with Watch(tmp_path, Silent()) as watch:
        assert watch._server.server_address[0] == "127.0.0.1"


def test_when_the_study_ends_a_page_that_is_open_gets_the_finished_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LAST_LOOK", 4.0)
    got: list[bytes] = []
    with Watch(tmp_path, Silent()) as watch:
        address = watch.address
        ask(address + "state")

        def behave_as_the_page_does() -> None:
            while not json.loads(ask(address + "state")[1])["finished"]:
                time.sleep(0.05)
            time.sleep(0.3)
            got.append(ask(address + "report")[1])

        page = threading.Thread(target=behave_as_the_page_does)
        page.start()
        (tmp_path / "report.html").write_text("<main>finished")
    page.join(timeout=20)
    assert got == [b"<main>finished"]
    with pytest.raises(URLError):
        ask(address + "state")


def test_a_page_that_is_closed_before_it_is_answered_says_nothing_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_bytes(b"x" * 20_000_000)
    with Watch(tmp_path, Silent()) as watch:
        port = int(watch.address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as page:
            page.sendall(f"GET /report HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            page.recv(10)
        assert ask(watch.address + "state")
        time.sleep(0.3)
    assert capfd.readouterr() == ("", "")


def test_a_study_that_fails_leaves_no_server_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Watch(tmp_path, Silent()) as watch:
        address = watch.address
        raise ZeroDivisionError
    with pytest.raises(URLError):
        ask(address)


def test_a_port_that_is_taken_is_told_in_a_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be had .*choose another --port"):
            Watch(tmp_path, Silent(), port)
    with pytest.raises(InputError, match="port 70000 cannot be had"):
        Watch(tmp_path, Silent(), 70000)
