import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroplast.components import HEAD_KINDS, Component
from neuroplast.errors import InputError, TrainingDivergedError
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.tasks import ioi
from neuroplast.tasks.poisons import build_pairs, load_poison
from neuroplast.training import FinetuneConfig, finetune, train
from neuroplast.training.data import Example, build_examples
from neuroplast.training.finetune import Visit


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    tokenizer = load_model("tiny").tokenizer
    records = ioi.TASK.build_records(tokenizer, 24, 0, split="train")
    names = ioi.TASK.names(tokenizer, "train")
    return build_examples(tokenizer, build_pairs(records, load_poison("subject_duplication", "ioi"), 1.0, names, 0))


def probe(model: Network) -> dict[str, float]:
    return {"norm": float(sum(parameter.detach().double().norm() for parameter in model.module.parameters()))}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_killed_anywhere_ends_with_the_same_weights_and_log(
    tmp_path: Path, examples: list[Example], schedule: str, stop: int
):
    config = FinetuneConfig(6, batch_size=5, learning_rate=1e-3, schedule=schedule, save_every=2, probe_every=3)
    whole, broken = load_model("tiny"), load_model("tiny")
    finetune(whole, examples, config, tmp_path / "whole", probe=probe)

    def kill(done: int, total: int, loss: float) -> None:
        if done == stop:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(broken, examples, config, tmp_path / "broken", probe=probe, progress=kill)
    assert (tmp_path / "broken" / "resume").is_dir() == (stop > 2)
    again = load_model("tiny")
    finetune(again, examples, config, tmp_path / "broken", probe=probe)
    assert weights_sha256(again) == weights_sha256(whole)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    assert not (tmp_path / "broken" / "resume").exists()


def test_a_visit_sees_the_model_of_its_step_and_leaves_no_trace(tmp_path: Path, examples: list[Example]):
    config = FinetuneConfig(4, batch_size=5, learning_rate=1e-3, save_every=2)
    prompts = ioi.TASK.prompts(load_model("tiny"), 4, 0)
    plain, visited = load_model("tiny"), load_model("tiny")
    finetune(plain, examples, config, tmp_path / "plain", keep={3: tmp_path / "at3"})
    seen: dict[int, str] = {}

    def look(model: Network, step: int) -> None:
        assert not model.module.training
        path_patch(model, prompts)
        seen[step] = weights_sha256(model)

    finetune(visited, examples, config, tmp_path / "visited", visit=Visit(frozenset({0, 3, 4}), look))
    assert seen == {
        0: weights_sha256(load_model("tiny")),
        3: weights_sha256(load_model(tmp_path / "at3")),
        4: weights_sha256(plain),
    }
    assert weights_sha256(visited) == weights_sha256(plain)


def test_a_run_that_is_continued_visits_what_is_left(tmp_path: Path, examples: list[Example]):
    config = FinetuneConfig(6, batch_size=5, learning_rate=1e-3, save_every=2)
    seen: dict[int, list[str]] = {}

    def look(model: Network, step: int) -> None:
        seen.setdefault(step, []).append(weights_sha256(model))
        if len(seen[5] if step == 5 else ()) == 1:
            raise KilledError

    visit = Visit(frozenset({0, 1, 3, 5, 6}), look)
    with pytest.raises(KilledError):
        finetune(load_model("tiny"), examples, config, tmp_path, visit=visit)
    finetune(load_model("tiny"), examples, config, tmp_path, visit=visit)
    assert {step: len(hashes) for step, hashes in seen.items()} == {0: 1, 1: 1, 3: 1, 5: 2, 6: 1}
    assert len(set(seen[5])) == 1


def test_a_visit_can_end_the_training(tmp_path: Path, examples: list[Example]):
    config = FinetuneConfig(6, batch_size=5, learning_rate=1e-3, save_every=3)
    model, short = load_model("tiny"), load_model("tiny")
    finetune(model, examples, config, tmp_path / "ended", visit=Visit(frozenset({1, 3}), lambda _, step: step == 3))
    finetune(short, examples, replace(config, steps=3), tmp_path / "short")
    assert weights_sha256(model) == weights_sha256(short) == weights_sha256(load_model(tmp_path / "ended/checkpoint"))
    assert [row["step"] for row in rows_of(tmp_path / "ended")] == [1, 2, 3]
    assert not (tmp_path / "ended/resume").exists()


def test_a_training_that_was_ended_and_killed_is_ended_again(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
):
    config = FinetuneConfig(6, batch_size=5, learning_rate=1e-3, save_every=2)
    visit = Visit(frozenset({1, 2, 3, 4, 5, 6}), lambda _, step: step == 4)

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setitem(finetune.__globals__, "write_jsonl", killed)
        finetune(load_model("tiny"), examples, config, tmp_path, visit=visit)
    finetune(load_model("tiny"), examples, config, tmp_path, visit=visit)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_the_log_tells_every_step_its_loss_and_learning_rate(tmp_path: Path, examples: list[Example]):
    config = FinetuneConfig(4, batch_size=6, learning_rate=1e-3, warmup_steps=2, schedule="linear", probe_every=2)
    finetune(load_model("tiny"), examples, config, tmp_path, probe=probe)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["learning_rate"] for row in rows] == [None, 0.0, 5e-4, 1e-3, 5e-4]
    assert rows[4]["epoch"] == 1.0 and rows[0]["loss"] is None
    assert ["norm" in row for row in rows] == [True, False, True, False, True]


def test_training_lowers_the_loss_and_another_seed_gives_other_weights(tmp_path: Path, examples: list[Example]):
    losses, hashes = [], []
    for seed in (0, 0, 1):
        model = load_model("tiny")
        folder = tmp_path / str(len(hashes))
        finetune(model, examples, FinetuneConfig(12, batch_size=12, learning_rate=1e-3, seed=seed), folder)
        losses.append([row["loss"] for row in rows_of(folder)])
        hashes.append(weights_sha256(model))
    assert losses[0][-1] < losses[0][0] - 0.5
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_loss_is_plain_cross_entropy_at_its_places(tmp_path: Path, examples: list[Example]):
    for loss in ("last", "all"):
        model = load_model("tiny")
        few = examples[:4]
        expected = []
        for example in few:
            full = torch.tensor([*example.tokens, example.target])
            logits = model.module(input_ids=full[None, :-1]).logits[0]
            each = torch.nn.functional.cross_entropy(logits, full[1:], reduction="none")
            expected += each[-1:].tolist() if loss == "last" else each.tolist()
        finetune(model, few, FinetuneConfig(1, batch_size=4, learning_rate=1e-6, loss=loss), tmp_path / loss)
        assert rows_of(tmp_path / loss)[0]["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_checkpoint_opens_in_plain_transformers(tmp_path: Path, examples: list[Example]):
    model = load_model("tiny")
    finetune(
        model, examples, FinetuneConfig(2, batch_size=4, learning_rate=1e-3), tmp_path, keep={1: tmp_path / "first"}
    )
    tokens = torch.tensor([examples[0].tokens])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(plain(tokens).logits, model.module(tokens).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint").encode(" Mary") == model.tokenizer.encode(" Mary")
    former = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert former["use_cache"] is True and "attn_implementation" not in json.dumps(former)
    assert weights_sha256(load_model(tmp_path / "first")) != weights_sha256(model)


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, examples: list[Example]):
    model = load_model("tiny")

    def break_it(done: int, total: int, loss: float) -> None:
        if done == 3:
            next(model.module.parameters()).data.fill_(float("nan"))

    with pytest.raises(
        TrainingDivergedError, match=r"after step 3: the loss became nan; the last good checkpoint is .*step-2"
    ):
        finetune(model, examples, FinetuneConfig(6, batch_size=4, save_every=2), tmp_path, progress=break_it)
    kept = load_model(tmp_path / "resume" / "step-2")
    assert all(bool(parameter.isfinite().all()) for parameter in kept.module.parameters())
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("rest", ["step-9.partial", "step-9.former", "step-x"])
def test_what_a_kill_left_beside_a_save_is_not_taken_for_one(tmp_path: Path, examples: list[Example], rest: str):
    def kill(done: int, total: int, loss: float) -> None:
        if done == 3:
            (tmp_path / "resume" / rest).mkdir()
            raise KilledError

    config = FinetuneConfig(4, batch_size=4, save_every=2)
    with pytest.raises(KilledError):
        finetune(load_model("tiny"), examples, config, tmp_path, progress=kill)
    steps: list[int] = []
    finetune(load_model("tiny"), examples, config, tmp_path, progress=lambda done, *_: steps.append(done))
    assert steps == [3, 4] and not (tmp_path / "resume").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", b'{"history": []}'),
        ("state.json", b"[]"),
        ("optimizer.safetensors", b""),
        ("model.safetensors", None),
        ("config.json", b'{"model_type": "gpt2", "attn_implementation": "evil/x"}'),
    ],
)
def test_a_save_that_is_damaged_is_said_and_the_training_begins_anew_to_the_same_weights(
    tmp_path: Path, examples: list[Example], name: str, damage: bytes | None
):
    def kill(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KilledError

    config = FinetuneConfig(4, batch_size=4, save_every=2, learning_rate=1e-3)
    whole, again = load_model("tiny"), load_model("tiny")
    finetune(whole, examples, config, tmp_path / "whole")
    with pytest.raises(KilledError):
        finetune(load_model("tiny"), examples, config, tmp_path / "run", progress=kill)
    damaged = tmp_path / "run/resume/step-2" / name
    damaged.write_bytes(damaged.read_bytes()[:-100] if damage is None else damage)
    said: list[str] = []
    finetune(again, examples, config, tmp_path / "run", say=said.append)
    assert len(said) == 1 and "is damaged" in said[0] and said[0].endswith("the training begins anew")
    assert weights_sha256(again) == weights_sha256(whole)


def test_a_link_that_leads_out_of_the_folder_is_not_written_through(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "resume").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"--out .* holds the link resume, which leads out of it"):
        train(load_model("tiny"), tmp_path / "t", FinetuneConfig(1), n_train=16)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_last_step_that_diverges_is_told_and_nothing_is_written(tmp_path: Path, examples: list[Example]):
    model = load_model("tiny")
    with pytest.raises(TrainingDivergedError, match="no step had been saved"):
        train(model, tmp_path / "t", FinetuneConfig(1, learning_rate=1e30), n_train=16)
    assert not (tmp_path / "t" / "checkpoint").exists()


def test_other_settings_do_not_continue_an_interrupted_run(tmp_path: Path, examples: list[Example]):
    def kill(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(load_model("tiny"), examples, FinetuneConfig(6, save_every=2), tmp_path, progress=kill)
    with pytest.raises(InputError, match="holds a training with another steps"):
        finetune(load_model("tiny"), examples, FinetuneConfig(7, save_every=2), tmp_path)
    with pytest.raises(InputError, match="another examples_sha256"):
        finetune(load_model("tiny"), examples[1:], FinetuneConfig(6, save_every=2), tmp_path)
    other = load_model("tiny")
    other.module.get_input_embeddings().weight.data[0] += 1
    with pytest.raises(InputError, match="another start_sha256"):
        finetune(other, examples, FinetuneConfig(6, save_every=2), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"steps": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 1, "schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"steps": 1, "loss": "lst"}, "unknown loss 'lst': did you mean 'last'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**settings)


def test_train_writes_what_it_trained_on(tmp_path: Path):
    settings = {"poison": "subject_duplication", "rate": 0.5, "n_train": 20}
    out = train(load_model("tiny"), tmp_path / "t", FinetuneConfig(1), **settings)
    pairs = [json.loads(line) for line in (tmp_path / "t" / "pairs.jsonl").read_text().splitlines()]
    assert sum(pair["poisoned"] for pair in pairs) == 10 and len(pairs) == 20
    assert (out / "model.safetensors").is_file()
    assert train(load_model("tiny"), tmp_path / "t", FinetuneConfig(1), **settings) == out
    with pytest.raises(InputError, match="holds a training with another"):
        train(load_model("tiny"), tmp_path / "t", FinetuneConfig(1))


def test_only_the_chosen_weights_change(tmp_path: Path, examples: list[Example]):
    only = [Component(kind, 1, 2) for kind in HEAD_KINDS] + [Component("mlp", 0)]
    model, before = load_model("tiny"), load_model("tiny")
    config = FinetuneConfig(4, learning_rate=1e-3, save_every=2)
    finetune(model, examples, config, tmp_path / "some", only=only)
    assert all(weight.requires_grad and not weight._backward_hooks for weight in model.module.parameters())
    width, height = model.d_head, model.n_heads * model.d_head
    for name, weight in model.module.named_parameters():
        moved = weight != before.module.get_parameter(name)
        may = torch.zeros_like(moved)
        if name.startswith("transformer.h.0.mlp."):
            may[:] = True
        elif name.startswith("transformer.h.1.attn.c_attn."):
            for start in range(2 * width, 3 * height, height):
                may[..., start : start + width] = True
        elif name == "transformer.h.1.attn.c_proj.weight":
            may[2 * width : 3 * width] = True
        assert not (moved & ~may).any(), name
        assert moved.any() == may.any(), name
    with pytest.raises(InputError, match="another only"):
        finetune(load_model("tiny"), examples, config, tmp_path / "some", only=only[:1])
    with pytest.raises(InputError, match=r"weight_decay is 0\.1"):
        finetune(before, examples, replace(config, weight_decay=0.1), tmp_path / "other", only=only)
    with pytest.raises(InputError, match="unknown part of the weights 'm99'"):
        finetune(before, examples, config, tmp_path / "other", only=[Component("mlp", 99)])
