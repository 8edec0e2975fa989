"""The table: every row of it on `tiny`, and what is said where a number is missing."""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from neuroplast.bench import BenchConfig, checkpoints, rate, run_bench
from neuroplast.bench.document import compare, load_document
from neuroplast.bench.peers import NOT_INSTALLED
from neuroplast.bench.rounds import NO_PEERS
from neuroplast.bench.rows import ROWS, choose_rows
from neuroplast.errors import InputError
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.storage import write_json

QUICK = {"n_prompts": 4, "follow_stages": [], "look_stages": [], "resamples": 100}


@pytest.fixture(scope="module", autouse=True)
def _quick_rate():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "TRIES", 1)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole table."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setattr(checkpoints, "STUDY", checkpoints.STUDY | QUICK)
        document = run_bench(BenchConfig(prompts=3, repeats=1))
    assert not list(scratch.iterdir())
    return document


pytestmark = pytest.mark.filterwarnings("ignore")  # of TransformerLens


def test_every_row_runs_and_is_held_against_something_or_says_why(done: dict[str, Any]):
    assert [row["name"] for row in done["rows"]] == list(ROWS)
    for row in done["rows"]:
        low, high = row["range"]
        assert 0 < low <= row["seconds"] <= high < math.inf
        assert row["repeats"] == 1
        for what, ratio in (("floor", "over_floor"), ("peer", "over_peer")):
            assert (row[what] is None) == (row[ratio] is None) == bool(row["why"].get(what))
            if row[what] is not None:
                assert row[ratio] == pytest.approx(row["seconds"] / row[f"{what}_seconds"]) and row[ratio] > 0
    assert done["rate"]["operations_a_second"] > 0
    assert [row["name"] for row in done["rows"] if row["floor"] is None] == ["study"]


def test_peers_compute_the_same_numbers(done: dict[str, Any]):
    errors = {row["name"]: row["max_difference"] for row in done["rows"] if row["max_difference"] is not None}
    assert set(errors) == {"heads-to-logits", "heads-to-queries", "activations", "edges", "criteria"}
    assert max(errors.values()) < 1e-4


def test_the_model_is_as_before(done: dict[str, Any]):
    assert done["model"]["weights_sha256"] == weights_sha256(load_model("tiny"))


def test_an_earlier_table_is_read_again_and_compared(done: dict[str, Any], tmp_path: Path):
    slower = json.loads(json.dumps(done))
    for row in slower["rows"]:
        row["seconds"] *= 4
    slower["rows"][2]["what"] += ", twice"
    slower["rows"].pop()
    write_json(tmp_path / "then.json", slower)
    found = compare(done, load_document(tmp_path / "then.json"), "then.json")
    ratios = {name: each["ratio"] for name, each in found["rows"].items()}
    assert ratios.pop("activations") is None and "another size" in found["rows"]["activations"]["why"]
    assert ratios.pop("study") is None and "not measured both times" in found["rows"]["study"]["why"]
    assert set(ratios.values()) == {0.25} and found["rate_ratio"] == 1
    other = slower | {"model": slower["model"] | {"name": "gpt2"}}
    told = compare(done, other, "then.json")["rows"]["criteria"]
    assert told["ratio"] is None and "another model: gpt2" in told["why"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 2}', '{"schema": 1, "rows": [], "rate": 3}'])
def test_what_is_no_table_is_told(tmp_path: Path, text: str):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"other\.json is no table of `neuroplast bench`"):
        load_document(tmp_path / "other.json")


@pytest.mark.parametrize("seconds", [0, -1, "fast"])
def test_a_table_with_impossible_times_is_told(done: dict, tmp_path: Path, seconds: object):
    rows = [row | {"seconds": seconds} for row in done["rows"]]
    write_json(tmp_path / "other.json", done | {"rows": rows})
    with pytest.raises(InputError, match=r"other\.json is no table of `neuroplast bench`"):
        load_document(tmp_path / "other.json")


def test_a_peer_that_is_not_installed_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    document = run_bench(BenchConfig(prompts=2, repeats=1, rows=("activations",)))
    (row,) = document["rows"]
    assert row["peer"] is None and row["over_peer"] is None and row["why"] == {"peer": NOT_INSTALLED}


def test_a_model_that_a_peer_cannot_open_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    from transformer_lens.model_bridge import TransformerBridge

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Unsupported architecture: Strange\nmore")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", refuse)
    (row,) = run_bench(BenchConfig(prompts=2, repeats=1, rows=("heads-to-logits",)))["rows"]
    assert row["why"] == {"peer": "TransformerLens cannot open 'tiny': Unsupported architecture: Strange"}


def test_a_row_that_this_model_cannot_do_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise InputError("its MLPs could not be told from its attention")

    monkeypatch.setattr(checkpoints, "build_ledger", refuse)
    document = run_bench(BenchConfig(prompts=2, repeats=1, rows=("ledger", "criteria"), peers=False))
    criteria, ledger = document["rows"]
    assert ledger["seconds"] is None and "MLPs" in ledger["why"]["seconds"] and ledger["over_floor"] is None
    assert criteria["seconds"] > 0 and criteria["why"] == {"peer": NO_PEERS}


def test_rows_come_in_the_order_of_the_table():
    assert choose_rows(["study", "edges"]) == ("edges", "study") and choose_rows([]) == tuple(ROWS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rows": ("ledgers",)}, "unknown row 'ledgers': did you mean 'ledger'"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_loaded(wrong: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        BenchConfig(**wrong)
