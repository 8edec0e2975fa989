"""Several processes train what one trains. One launch does all that needs several; starting them is what takes long."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neuroplast import cli
from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.processes import Processes, join, launched
from neuroplast.training import finetune
from training.together import CONFIG, ONLY, build_pairs_of_tiny, watched

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "train-on-several-gpus.md"
DRIVER = Path(__file__).with_name("together.py")
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes on the CPU, launched as the page says, have done what `together.py` says."""
    (line,) = re.findall(r"^accelerate (launch .*) -m neuroplast train .*--out on-cpu", PAGE.read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(line), "--main_process_port"]
    paths = f"{DRIVER.parents[2] / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, "0", DRIVER, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> Found:
    """What each process has found, the main one first."""
    return [json.loads((out / f"rank-{index}.json").read_text()) for index in (0, 1)]


def require_same_training(one: Path, other: Path, start: dict[str, torch.Tensor]) -> None:
    """Losses and weights to rounding, which Adam scales up where a gradient is nearly 0.

    So weights are held to how far the training took them, and the biases of keys, on which no loss depends, to nothing.
    """
    ours, theirs = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference, moved = ours[name] - theirs[name], ours[name] - start[name]
        if name.endswith("c_attn.bias"):
            width = len(difference) // 3
            difference[width : 2 * width] = moved[width : 2 * width] = 0
        assert (difference.abs() > 1e-6).float().mean() < 0.01, name
        assert difference.norm() <= 3e-4 * moved.norm(), name
    former, rows = (
        [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()] for folder in (one, other)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in former]
    for row, before in zip(rows, former, strict=True):
        assert row["loss"] == (before["loss"] and pytest.approx(before["loss"], rel=1e-5))


@pytest.mark.parametrize("case", ["last", "all", "only"])
def test_two_processes_train_what_one_does(out: Path, tmp_path: Path, case: str):
    config = replace(CONFIG, loss="all") if case == "all" else CONFIG
    model, start = load_model("tiny"), load_model("tiny").module.state_dict()
    probe = (lambda _: {"one": 1.0}) if case == "last" else None
    finetune(model, build_pairs_of_tiny(), config, tmp_path, only=ONLY if case == "only" else None, probe=probe)
    require_same_training(tmp_path, out / case, start)
    moved = [name for name, weight in model.module.state_dict().items() if not torch.equal(weight, start[name])]
    assert len(moved) == (6 if case == "only" else len(start))


def test_what_is_random_in_a_step_is_as_in_one_process_and_another_in_the_second(found: Found, tmp_path: Path):
    model, seeds = watched()
    finetune(model, build_pairs_of_tiny(), CONFIG, tmp_path / "one")
    assert found[0]["seeds"] == seeds and len(set(seeds)) == CONFIG.steps
    assert not set(seeds) & set(found[1]["seeds"])


def test_only_the_main_process_measures_and_tells(found: Found):
    assert found[0]["calls"] == ["probe", "step 1", "probe", "step 2", "step 3", "probe", "step 4"]
    assert found[1]["calls"] == []


def test_what_the_main_process_finds_wrong_ends_all_and_the_same_call_goes_on_to_the_same_bits(out: Path, found: Found):
    assert found[0]["killed"] == found[1]["killed"] == ["StorageError", "full at 3"]
    assert found[0]["ended"] == found[1]["ended"] == []
    whole, again = (load_file(out / name / "checkpoint" / "model.safetensors") for name in ("last", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (out / "last" / "train.jsonl").read_text() == (out / "killed" / "train.jsonl").read_text()
    assert not (out / "killed" / "resume").exists()


def test_what_one_process_finds_wrong_is_raised_in_all(found: Found):
    for each in found:
        assert each["alone"] == ["StorageError", "no space on the second"]
        assert each["apart"] == ["InputError", "not the same"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("another", 2, "holds a training with another examples_sha256; choose another --out"),
        ("diverged", 1, "training diverged after step 1: the loss became nan"),
        ("study", 2, "2 processes were launched for `study`, and only `train` runs in several"),
        ("unknown", 2, "No such option: --step"),
        ("few", 2, "batch_size 1 is less than the 2 processes"),
    ],
)
def test_an_error_is_told_once_and_is_every_processs_exit_code(
    out: Path, found: Found, name: str, code: int, message: str
):
    (ended, printed), silent = (each["commands"][name] for each in found)
    assert ended == code and message in printed and printed.count("error:") == 1
    assert silent == [code, ""]
    assert not (out / name / "checkpoint").exists()


def test_a_command_writes_and_prints_once(out: Path, found: Found):
    (code, printed), silent = (each["commands"]["trained"] for each in found)
    assert code == 0 and json.loads(printed)["checkpoint"] == str(out / "trained" / "checkpoint")
    assert silent == [0, ""]
    assert len((out / "trained" / "pairs.jsonl").read_text().splitlines()) == 8


def test_a_process_started_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == Processes() and not torch.distributed.is_initialized()
    with pytest.raises(InputError, match="as it was raised"), Processes().agreed():
        raise InputError("as it was raised")


def launch_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher tells the main one of two processes."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("left_out", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_count_that_no_launcher_gave_is_none(monkeypatch: pytest.MonkeyPatch, left_out: str):
    """As in the script of a queue."""
    launch_two(monkeypatch)
    assert launched() == 2
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert launched() == 1
    launch_two(monkeypatch)
    monkeypatch.delenv(left_out)
    assert launched() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_whole_batch_in_its_order(count: int):
    shares = [list(Processes(count, index).share(range(5))) for index in range(count)]
    assert [item for share in shares for item in share] == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Processes(2, index, index).place("cuda") for index in (0, 1)] == ["cuda:0", "cuda:1"]
    assert Processes().place("cuda:1") == "cuda:1" and Processes(2, 1, 1).place("cpu") == "cpu"
    with pytest.raises(InputError, match="'cuda:1' is one for 2 processes; use cuda"):
        Processes(2).place("cuda:1")
    with pytest.raises(InputError, match="this machine has 2 GPUs, fewer than its processes"):
        Processes(3, 2, 2).place("cuda")


def test_a_model_that_is_split_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch):
    launch_two(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="launch without --use_fsdp"):
        join("cpu")


def test_every_command_but_train_is_refused_in_several(monkeypatch: pytest.MonkeyPatch, capsys):
    launch_two(monkeypatch)
    monkeypatch.setattr(cli, "wait_for_all", lambda: None)
    for command in ("models", "audit", "report"):
        monkeypatch.setattr(sys, "argv", ["neuroplast", command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert f"2 processes were launched for `{command}`" in capsys.readouterr().err
