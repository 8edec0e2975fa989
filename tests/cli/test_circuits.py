"""`neuroplast discover` and `neuroplast evaluate` from the outside, on `tiny`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from neuroplast.cli import main
from neuroplast.storage import load_json

DISCOVER = ["discover", "--n-prompts", "24", "--threshold", "0.05", "--quiet"]
EVALUATE = ["--n-prompts", "24", "--n-random", "4", "--n-subsets", "2", "--greedy-steps", "1", "--quiet"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["neuroplast", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A circuit of `tiny`, shared; never to be changed."""
    out = tmp_path_factory.mktemp("found") / "circuit"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *DISCOVER, "--out", str(out)) == 0
    return out


def test_discover_leaves_a_circuit_with_pictures_tables_and_a_log(found: Path):
    names = {path.name for path in found.iterdir()}
    assert names == {
        ".lock", "discover.json", "circuit.json", "circuit.svg", "circuit.png", "nodes.csv", "edges.csv", "steps.json",
        "prompts.jsonl",
    }  # fmt: skip
    document = load_json(found / "circuit.json")
    assert set(document) == {"cfg", "nodes", "edges", "neuroplast"}
    steps = load_json(found / "steps.json")["steps"]
    assert steps[0]["step"] == "logits" and steps[0]["candidates"] == 32
    for step in steps:
        cut = step["cut by screening"] + step["cut below threshold"] + step["cut within noise"]
        assert step["candidates"] == cut + len(step["found"])
    with Image.open(found / "circuit.png") as image:
        assert image.width > 300
    assert "<svg" in (found / "circuit.svg").read_text()


def test_discovering_again_changes_nothing(found: Path, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in found.iterdir()}
    assert run(monkeypatch, *DISCOVER, "--out", str(found), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["circuit"]["n_nodes"] == len(summary["nodes"]) > 3
    assert summary["stability"]["resamples"] == 100
    assert {path.name: path.read_bytes() for path in found.iterdir()} == before


def test_evaluate_judges_a_file_and_prints_how(found: Path, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "evaluate", str(found / "circuit.json"), "--out", str(tmp_path / "e"), *EVALUATE) == 0
    printed = capsys.readouterr().out
    assert "faithfulness" in printed and "mean-by-position of 480 counterfactuals (abc)" in printed
    document = load_json(tmp_path / "e" / "evaluation.json")
    assert document["F"]["model"]["value"] > 2
    assert document["random"]["n"] == 4
    assert document["edges"]["cmd"]["value"] is None and document["edges"]["why"]
    for name in ("criteria.csv", "completeness.csv", "minimality.csv"):
        assert (tmp_path / "e" / name).read_text().count("\n") > 3


def test_an_edge_circuit_has_its_curve(tmp_path, monkeypatch, capsys):
    edges = ["discover", "--method", "eap", "--n-edges", "60", "--n-prompts", "16", "--quiet"]
    assert run(monkeypatch, *edges, "--out", str(tmp_path / "c")) == 0
    arguments = ["evaluate", str(tmp_path / "c" / "circuit.json"), "--out", str(tmp_path / "e"), "--ablation", "zero"]
    assert run(monkeypatch, *arguments, *EVALUATE, "--json") == 0
    capsys.readouterr()
    edges = load_json(tmp_path / "e" / "evaluation.json")["edges"]
    assert edges["n_scored"] == 1519 and edges["cmd"]["value"] is not None
    assert edges["faithfulness"][-1]["value"] == pytest.approx(1, abs=1e-3)
    assert edges["helping"]["rank"] == "helping" and edges["random"]["rank"] == "random"
    assert all(edges[name]["cpr"]["value"] is not None for name in ("helping", "random"))
    assert edges["chosen"]["ci95"] is not None
    rows = (tmp_path / "e" / "criteria.csv").read_text()
    assert "edges, CMD" in rows and "edges, helping first, CPR" in rows and "edges, random, CMD" in rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "2"], "threshold must lie between 0 and 1"),
        (["--threshold", "0.9"], "no head passes"),
        (["--positions", "s3"], "unknown position 's3'"),
        (["--method", "pth"], "did you mean 'path'"),
        (["--select", "greedy"], "method 'path' has no setting 'select' (--select)"),
        (["--method", "eap", "--attention", "0.2"], "has no setting 'attention'"),
        (["--method", "eap", "--n-edges", "9999"], "1519"),
        (["--method", "eap", "--select", "threshold", "--threshold", "0.99"], "no edge passes"),
        (["--n-prompts", "4"], "at least 8"),
        (["--memory", "lots"], "no amount of memory"),
    ],
)  # fmt: skip
def test_a_wrong_discovery_is_one_clear_line(arguments, said, tmp_path, monkeypatch, capsys):
    wrong = ["discover", "--n-prompts", "8", *arguments, "--out", str(tmp_path / "o"), "--quiet"]
    assert run(monkeypatch, *wrong) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "o" / "discover.json").exists(), "the folder is free for another attempt"


TINY = '{"cfg": {"n_layers": 4, "n_heads": 8, "d_model": 128}, '
HOSTILE = {
    "nesting": "[" * 100_000,
    "digits": '{"cfg": {"n_layers": ' + "9" * 400 + "}}",
    "infinite": '{"cfg": {"n_layers": 1e999}}',
    "text": "not JSON at all",
    "list": "[1, 2]",
    "empty": "",
    "parts": TINY + '"nodes": {"a9.h1": {"in_graph": true}}, "edges": {}}',
    "edge": TINY + '"nodes": {}, "edges": {"m3->m1": {"score": 1, "in_graph": true}}}',
    "model": TINY.replace("4", "2") + '"nodes": {"a0.h1": {"in_graph": true}}, "edges": {}}',
    "nothing": TINY + '"nodes": {}, "edges": {}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_circuit_of_the_model_is_one_clear_line(name, tmp_path, monkeypatch, capsys):
    path = tmp_path / "circuit.json"
    path.write_text(HOSTILE[name])
    assert run(monkeypatch, "evaluate", str(path), "--out", str(tmp_path / "o"), *EVALUATE) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_an_absent_file_and_a_foreign_folder_are_refused(found: Path, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "evaluate", str(tmp_path / "no.json"), "--out", str(tmp_path / "o"), *EVALUATE) == 2
    assert run(monkeypatch, "evaluate", str(found / "circuit.json"), "--out", str(found), *EVALUATE) == 2
    assert run(monkeypatch, *DISCOVER, "--seed", "5", "--out", str(found)) == 2
    said = capsys.readouterr().err
    assert "could not read" in said and "holds no evaluation" in said and "another discovery" in said
