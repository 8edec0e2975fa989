import pytest

from neuroplast import hub


@pytest.mark.parametrize(
    ("offline", "proxies", "refused", "answers"),
    [(True, {}, False, False), (False, {"https": "p"}, True, True), (False, {}, True, False), (False, {}, False, True)],
)
def test_the_hub_is_asked_for_a_connection_unless_it_is_known_already(
    monkeypatch, offline: bool, proxies: dict[str, str], refused: bool, answers: bool
):
    class Connection:
        def close(self) -> None:
            pass

    def connect(address: tuple[str, int], timeout: float) -> Connection:
        assert address[1] == 443 and timeout <= 5
        if refused:
            raise OSError("no route")
        return Connection()

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    monkeypatch.setattr("socket.create_connection", connect)
    assert hub.hub_answers() is answers
