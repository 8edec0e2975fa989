import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from neuroplast import patch as patching
from neuroplast.components import parse_edge
from neuroplast.errors import InputError, StorageError
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.observer import Silent
from neuroplast.patch import PatchConfig, run_patch
from neuroplast.report.patch import draw_patch, load_patch
from neuroplast.storage import load_metadata, load_tensors, write_tensors
from neuroplast.tasks import ioi, load_records

# Runs a measurement in a process of its own that dies when it saves its second part.
DRIVER = """
import os, signal, sys
from neuroplast import patch
patch.ROWS_A_PART = 5
save, left = patch.write_tensors, [2]
def dies(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args)
patch.write_tensors = dies
config = patch.PatchConfig(n_prompts=6, method="edge", senders="heads", receivers="a2.h1<k>")
patch.run_patch(config, sys.argv[1])
"""


class Watcher(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def progress(self, activity: str, done: int, total: int, note: str = "") -> None:
        self.steps.append((done, total))


@pytest.fixture(scope="module")
def tiny() -> Network:
    return load_model("tiny")


def run(out: Path, **settings):
    return run_patch(PatchConfig(**{"n_prompts": 6} | settings), out)


def test_paths_are_saved_prompt_by_prompt_with_their_table_and_picture(tiny: Network, tmp_path: Path):
    summary = run(tmp_path, senders="heads, m1@s2", receivers="a3.h4<q>@end, a2.h0<v>@s2", mlps="frozen")
    prompts = ioi.prompts(tiny, n=6)
    expected = path_patch(tiny, prompts, senders="heads, m1@s2", receivers="a3.h4<q>@end, a2.h0<v>@s2", mlps="frozen")
    tensors = load_tensors(tmp_path / "effects.safetensors")
    assert torch.equal(tensors["effects"], expected.effects) and torch.equal(tensors["clean"], expected.clean)
    assert load_records(tmp_path / "prompts.jsonl") == prompts.records
    rows = list(csv.DictReader((tmp_path / "effects.csv").read_text().splitlines()))
    assert len(rows) == len(expected.senders) == summary["n_rows"]
    assert [row["name"] for row in rows[:15]] == [row["name"] for row in summary["top"]]
    for row in rows:
        value = expected.effects[expected.names.index(row["name"])].mean()
        assert float(row["effect"]) == pytest.approx(float(value), abs=1e-6)
        assert float(row["low"]) <= float(row["effect"]) + 1e-6 and float(row["effect"]) <= float(row["high"]) + 1e-6
    with Image.open(tmp_path / "effects.png") as picture:
        assert picture.width > 300
    described = load_metadata(tmp_path / "effects.safetensors")
    assert json.loads(described["settings"])["mlps"] == "frozen" and "negative: it helps" in described["sign"]


def test_activations_into_the_counterfactual_run_say_their_sign(tiny: Network, tmp_path: Path):
    summary = run(tmp_path, method="activation", senders="residual@each", into="counterfactual")
    expected = activation_patch(tiny, ioi.prompts(tiny, n=6), sites="residual@each", into="counterfactual")
    assert torch.equal(load_tensors(tmp_path / "effects.safetensors")["effects"], expected.effects)
    assert summary["sign"].startswith("LD(patched) - LD(counterfactual)")


@pytest.mark.parametrize("method", ["eap", "eap-ig", "ceap"])
def test_attribution_keeps_every_edge_with_its_interval(tiny: Network, tmp_path: Path, method: str):
    summary = run(tmp_path, method=method)
    expected = attribute_edges(tiny, ioi.prompts(tiny, n=6), method=method)
    assert summary["n_rows"] == int(expected.exists.sum())
    for row in summary["top"][:3]:
        edge = parse_edge(row["name"])
        assert row["effect"] == pytest.approx(expected.score(edge), abs=1e-6)
        error = expected.standard_error[
            expected.sources.index(edge.source), expected.destinations.index(edge.destination)
        ]
        assert row["ci95"][1] - row["ci95"][0] == pytest.approx(2 * 1.959964 * float(error), rel=1e-4)
    assert [row["name"] for row in summary["top"][:3]] == [str(edge) for edge, _ in expected.top(3)]


def test_edges_are_patched_one_by_one(tiny: Network, tmp_path: Path):
    run(tmp_path, method="edge", senders="input, m0, heads", receivers="logits")
    expected = patch_edges(tiny, ioi.prompts(tiny, n=6), senders="input, m0, heads")
    assert torch.equal(load_tensors(tmp_path / "effects.safetensors")["effects"], expected.effects)


def test_what_is_there_is_not_measured_again_and_nothing_else_is_overwritten(tmp_path: Path, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(patching, "path_patch", None)
    assert run(tmp_path) == first
    with pytest.raises(InputError, match=r"holds another measurement \(other settings, prompts or weights\)"):
        run(tmp_path, seed=1)


@pytest.mark.parametrize("name", ["parts/mine.txt", "effects.safetensors", "prompts.jsonl"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no measurement; choose another --out"):
        run(tmp_path)
    assert mine.read_text() == "mine" and len(list(tmp_path.rglob("*.*"))) == 1


def test_a_folder_killed_before_anything_was_saved_is_used(tmp_path: Path):
    (tmp_path / "patch.json.partial").write_text("{")
    assert run(tmp_path)["n_rows"] == 32


def test_a_killed_measurement_goes_on_and_ends_with_the_same_numbers(tmp_path: Path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path / "killed")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "killed" / "parts").glob("*.safetensors"))) == 1
    monkeypatch.setattr(patching, "ROWS_A_PART", 5)
    settings = {"method": "edge", "senders": "heads", "receivers": "a2.h1<k>"}
    with pytest.raises(InputError, match="holds another measurement"):
        run(tmp_path / "killed", **settings | {"receivers": "a2.h0<k>"})
    calls = []
    monkeypatch.setattr(patching, "patch_edges", lambda *a, **k: calls.append(a) or patch_edges(*a, **k))
    again = run(tmp_path / "killed", **settings)
    assert len(calls) == 3 and not (tmp_path / "killed" / "parts").exists()
    whole = run(tmp_path / "whole", **settings)
    assert again | {"files": None} == whole | {"files": None}
    tensors = [load_tensors(tmp_path / name / "effects.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("method", ["path", "activation", "edge", "eap"])
def test_a_single_prompt_has_effects_and_no_interval(tmp_path: Path, method: str):
    summary = run(tmp_path, method=method, n_prompts=1)
    assert all(row["ci95"] is None and row["share"] is None for row in summary["top"]) and summary["top"][0]["effect"]
    assert summary["interval"] is None and summary["logit_diff"]["clean"]["ci95"] is None
    assert summary["why"] == {"interval": "one prompt has no spread", "share": "one prompt has no spread"}


def test_results_of_another_measurement_are_not_taken_for_this_one(tmp_path: Path):
    run(tmp_path / "one")
    run(tmp_path / "two", method="eap")
    shutil.copy(tmp_path / "two" / "effects.safetensors", tmp_path / "one")
    with pytest.raises(StorageError, match="is of another measurement; remove it"):
        run(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("mean"), "is damaged .'mean'."),
        (lambda tensors, _: tensors.update(mean=tensors["mean"][:3]), "rows do not have a number each"),
        (lambda tensors, _: tensors["mean"].fill_(float("nan")), "rows do not have a number each"),
        (lambda _, described: described.pop("rows"), "is damaged .'rows'."),
    ],
)
def test_damaged_results_are_one_clear_line(tmp_path: Path, change, message: str):
    run(tmp_path)
    path = tmp_path / "effects.safetensors"
    tensors, described = load_tensors(path), load_metadata(path)
    change(tensors, described)
    write_tensors(path, tensors, described)
    with pytest.raises(StorageError, match=message):
        run(tmp_path)


def test_what_is_missing_beside_the_numbers_is_written_again(tmp_path: Path):
    run(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "some files are less readable than others"
    for name in ("prompts.jsonl", "effects.csv", "effects.png"):
        (tmp_path / name).unlink()
    run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_share_of_a_difference_that_may_be_nothing_is_not_given(tmp_path: Path, tiny: Network):
    records = ioi.build_records(tiny.tokenizer, 4, 0)
    turned = [*records, *(type(r)(**{**vars(r), "answer": r.foil, "foil": r.answer}) for r in records)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(vars(record)) + "\n" for record in turned))
    summary = run_patch(PatchConfig(prompts=str(path)), tmp_path / "out")
    assert summary["n_prompts"] == 8 and summary["top"][0]["share"] is None
    assert summary["why"]["share"] == "LD of the unpatched run is not apart from 0"


def test_progress_is_told_over_all_parts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(patching, "ROWS_A_PART", 8)
    watcher = Watcher()
    run_patch(PatchConfig(n_prompts=4), tmp_path, watcher)
    assert watcher.steps == sorted(watcher.steps) and watcher.steps[-1][0] == watcher.steps[-1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pth"}, "unknown method 'pth': did you mean 'path'"),
        ({"method": "eap", "mlps": "frozen"}, r"method 'eap' has no setting 'mlps' \(--mlps\): it is for path"),
        ({"method": "eap", "steps": 3}, r"method 'eap' has no setting 'steps' \(--steps\): it is for eap-ig, ceap"),
        ({"method": "activation", "receivers": "logits"}, r"has no setting 'receivers' \(--to\)"),
        ({"mlps": "frosen"}, "unknown treatment of MLPs 'frosen': did you mean 'frozen'"),
        ({"method": "activation", "into": "corrupted"}, "unknown run to patch into 'corrupted'"),
        ({"method": "ceap", "steps": 0}, "steps must be at least 1, got 0"),
        ({"senders": "heds"}, "unknown selection 'heds': did you mean 'heads'"),
        ({"senders": "a9.h0"}, "a9.h0: tiny has layers 0 to 3"),
        ({"senders": "a0.h8"}, "a0.h8: tiny has heads 0 to 7 in a layer"),
        ({"senders": "m0@s3"}, "unknown position 's3': did you mean 's2'"),
        ({"senders": "m0@99"}, "position 99: the shortest prompt has tokens 0 to"),
        ({"senders": "a0.h1<q>"}, "a0.h1<q> cannot send"),
        ({"senders": " , "}, "nothing is selected by ' , '"),
        ({"receivers": "a3.h1"}, "a3.h1 cannot receive: .* did you mean a3.h1<q>, <k> or <v>"),
        ({"receivers": "logits, m3"}, "logits cannot be set together with other receivers"),
        ({"receivers": "logit"}, "unknown selection 'logit': did you mean 'logits'"),
        ({"method": "edge", "senders": "a0.h1+a0.h2"}, "an edge begins at one node"),
        ({"method": "edge", "senders": "m3", "receivers": "m1"}, "no edge joins these senders and receivers"),
        ({"method": "eap", "senders": "heads@end"}, "eap sums over positions"),
        ({"method": "activation", "senders": "logits"}, "logits cannot be patched"),
        ({"knocked_out": "m1"}, "m1 cannot be knocked out"),
        ({"prompts": "nowhere.jsonl", "n_prompts": None}, "could not read nowhere.jsonl"),
        (
            {"prompts": "own.jsonl"},
            r"setting 'n_prompts' \(--n-prompts\) is for the task's prompts; own.jsonl has its own",
        ),
        ({"n_prompts": 10**12}, "1000000000000 prompts: a measurement needs at least 1, and at most 1,000,000"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"senders": "m3", "receivers": "a0.h1<q>"}, "no path leads from these senders to a0.h1<q>"),
        ({"receivers": "logits@s2"}, "logits@s2: the logits are read at the end only"),
        ({"counterfactual": "abcd"}, "unknown counterfactual 'abcd': did you mean 'abc'"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, settings, message: str):
    with pytest.raises((InputError, StorageError), match=message) as caught:
        run(tmp_path / "out", **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "panels"),
    [
        ({"senders": "heads, m0, m1, m2, m3, input"}, ["heads", "mlp", "input"]),
        ({"senders": "a0.h1+m0@s1+1, a1.h1"}, ["tiny, path: a0.h1+m0@s1+1, a1.h1 -> logits"]),
        ({"senders": "m0@s2+m1@end, m1@s2"}, ["tiny, path: m0@s2+m1@end, m1@s2 -> logits"]),
        ({"method": "activation", "senders": "q@end, residual@each"}, ["heads <q> @end", "residual"]),
        ({"method": "edge", "receivers": "m3", "senders": "heads, mlps"}, ["heads", "mlp"]),
        ({"method": "edge", "receivers": "logits", "senders": "m0, a3.h1"}, ["tiny, edge: m0, a3.h1 -> logits"]),
        (
            {"method": "eap"},
            ["into queries", "into keys", "into values", "into MLPs", "into logits"],
        ),
    ],
)
def test_the_picture_shows_what_the_rows_are(tmp_path: Path, settings, panels):
    run(tmp_path, **settings)
    figure = draw_patch(load_patch(tmp_path))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[: len(panels)] == panels
