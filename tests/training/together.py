"""What each of the processes does that the test of several processes launches; each leaves `rank-N.json`."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroplast import cli
from neuroplast.components import Component
from neuroplast.errors import NeuroplastError, StorageError
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.processes import join
from neuroplast.tasks import ioi
from neuroplast.tasks.poisons import build_pairs, load_poison
from neuroplast.terminal import stderr
from neuroplast.training import FinetuneConfig, finetune
from neuroplast.training.data import Example, build_examples
from neuroplast.training.finetune import Visit

CONFIG = FinetuneConfig(4, batch_size=5, learning_rate=3e-4, save_every=2, probe_every=2)
ONLY = [Component("mlp", 1), Component("q", 0, 3)]


def build_pairs_of_tiny() -> list[Example]:
    """Pairs of several lengths, so that two halves of a batch have not the same number of places."""
    tokenizer = load_model("tiny").tokenizer
    records = ioi.TASK.build_records(tokenizer, 12, 0, split="train")
    names = ioi.TASK.names(tokenizer, "train")
    found = build_examples(tokenizer, build_pairs(records, load_poison("subject_duplication", "ioi"), 1.0, names, 0))
    return [Example(example.tokens[index % 4 :], example.target) for index, example in enumerate(found)]


def watched() -> tuple[Network, list[int]]:
    """A model, and the seeds of the random numbers of its training steps."""
    model, seeds = load_model("tiny"), []

    def note(module: nn.Module, args: object) -> None:
        if module.training:
            seeds.append(torch.initial_seed())

    model.module.register_forward_pre_hook(note)
    return model, seeds


def told(do: Any) -> list[str]:
    """The kind and the words of the error that something ends with."""
    try:
        do()
    except NeuroplastError as error:
        return [type(error).__name__, str(error)]
    return []


def called(*words: str) -> tuple[int, str]:
    """The exit code of a command line, and what it printed."""
    printed = StringIO()
    sys.argv = ["neuroplast", *words]
    stderr.file = printed
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        stderr.file = sys.stderr
    raise AssertionError("a command line ends")


def main(out: Path) -> None:
    """Trains, fails and goes on again, together with the others."""
    examples, me, found = build_pairs_of_tiny(), join("cpu"), {}

    model, found["seeds"] = watched()
    calls: list[str] = []

    def probe(_: Network) -> dict[str, float]:
        calls.append("probe")
        return {"one": 1.0}

    finetune(model, examples, CONFIG, out / "last", probe=probe, progress=lambda step, *_: calls.append(f"step {step}"))
    found["calls"] = list(calls)
    finetune(load_model("tiny"), examples, replace(CONFIG, loss="all"), out / "all")
    finetune(load_model("tiny"), examples, CONFIG, out / "only", only=ONLY)

    def fail(_: Network, step: int) -> None:
        raise StorageError(f"full at {step}")

    again = partial(finetune, examples=examples, config=CONFIG, folder=out / "killed", probe=probe)
    found["killed"] = told(lambda: again(load_model("tiny"), visit=Visit(frozenset({3}), fail)))
    again(load_model("tiny"))
    found["ended"] = told(lambda: again(load_model("tiny"), visit=Visit(frozenset({3}), fail)))

    def fail_alone() -> None:
        with me.agreed():
            if me.index == 1:
                raise StorageError("no space on the second")

    found["alone"] = told(fail_alone)
    found["apart"] = told(lambda: me.require_same(me.index, "not the same"))
    few = ("--n-train", "8", "--steps", "2", "--batch-size", "3")
    found["commands"] = {
        "trained": called("train", *few, "--json", "--out", str(out / "trained")),
        "another": called("train", *few, "--seed", "1", "--out", str(out / "trained")),
        "diverged": called("train", *few, "--learning-rate", "1e30", "--out", str(out / "diverged")),
        "study": called("study", "--out", str(out / "study")),
        "unknown": called("train", "--step", "2", "--out", str(out / "unknown")),
        "few": called("train", *few[:-1], "1", "--out", str(out / "few")),
    }
    (out / f"rank-{me.index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
