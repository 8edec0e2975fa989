"""Mending a poisoned `tiny`: what is changed, what it costs, what is told, and what happens when it is interrupted."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.discover import discover
from neuroplast.circuits.files import save_circuit
from neuroplast.components import parse_node
from neuroplast.errors import GateError, InputError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.models.weights import WeightMap, choose_pieces
from neuroplast.repair import RepairConfig, require_reached, run_repair, strategies
from neuroplast.repair.check import AGAINST, MENDED, new_damage
from neuroplast.repair.repair import OTHER_PROMPTS, in_turn
from neuroplast.repair.restored import NO_BASE, Restored, Source
from neuroplast.repair.strategies import Candidate, Ranking, count_weights, rank_by_gradient
from neuroplast.statistics import Estimate
from neuroplast.storage import Parts
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import REFERENCE_SEED
from neuroplast.training import FinetuneConfig, train
from neuroplast.training.saves import save_checkpoint

SHORT = {"target": 0.3, "steps": 5, "n_battery": 0}
SMALL = {"n_prompts": 32, "n_battery": 4, "n_train": 256}

# Shapes are checked in `grafted` and `whole`, which are made before.
pytestmark = pytest.mark.usefixtures("unchecked")


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poisoned")
    config = FinetuneConfig(12, learning_rate=3e-4)
    return train(load_model("tiny"), folder, config, poison="subject_duplication", n_train=256)


def settings(poisoned: Path, **more: object) -> RepairConfig:
    return RepairConfig(**{"poisoned": str(poisoned), "base": "tiny", **SMALL, **more})  # pyright: ignore


@pytest.fixture(scope="module")
def grafted(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repair") / "grafted"
    run_repair(settings(poisoned, strategy="graft"), out)
    return out


def document(out: Path) -> dict:
    return json.loads((out / "repair.json").read_text(encoding="utf-8"))


def weights_of(source: str | Path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in load_model(source).module.named_parameters()}


def test_a_graft_has_the_bases_weights_in_the_parts_that_it_names_and_the_damaged_ones_elsewhere(
    grafted: Path, poisoned: Path
):
    base, damaged, mended = (weights_of(source) for source in ("tiny", poisoned, grafted))
    model = load_model("tiny")
    names = document(grafted)["cost"]["parts"]
    components = [each for each in WeightMap(model).components if each.part in names]
    expected = {name: weight.clone() for name, weight in damaged.items()}
    known = WeightMap(model).pieces()
    for piece in choose_pieces(known, [each for each in components if each in known]):
        expected[piece.name][piece.index] = base[piece.name][piece.index]
    assert all(torch.equal(mended[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(mended[name], weight) for name, weight in damaged.items())


def test_the_folder_loads_in_plain_transformers(grafted: Path):
    plain = AutoModelForCausalLM.from_pretrained(grafted, use_safetensors=True)
    ours = load_model(grafted)
    tokens = torch.tensor([[5, 9, 31, 7]])
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, ours.module(tokens).logits, atol=1e-4)
    assert not (grafted / "work").exists() and not list(grafted.rglob("*.partial"))


def test_the_document_is_the_contracts_and_the_fewest_parts_are_taken(grafted: Path):
    found = document(grafted)
    assert found["strategy"] == "graft" and found["reached"] is True
    assert found["cost"]["steps"] == found["cost"]["examples"] == 0 < found["cost"]["parameters_share"] <= 1
    for row in ("behaviour", "mechanism", "damage_undone", "structure", "function"):
        assert (found["restoration"][row] is None) == (row in found["restoration"]["why"])
    assert found["before"]["score"] == pytest.approx(0.0)
    tried = {each["cost"]["n_parts"]: each["restored"]["score"] for each in found["frontier"]}
    reaching = sorted(n for n, score in tried.items() if score >= 0.9)
    assert tried[reaching[0] - 1] < 0.9 and found["cost"]["n_parts"] in reaching
    assert found["restoration"]["score"] >= 0.9, "on other prompts, too"
    assert "greater_than" in found["spared"] and found["spared"]["agreement"]["why"]
    assert (grafted / "frontier.csv").read_text().count("\n") == 1 + len(tried)
    assert (grafted / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_bases_circuit_is_tried_in_the_mended_model_on_prompts_of_its_own(poisoned: Path, tmp_path: Path):
    base = load_model("tiny")
    circuit = discover(base, ioi.prompts(base, 24, 5), threshold=0.1)
    save_circuit(tmp_path / "circuit.json", circuit)
    out = tmp_path / "mended"
    config = settings(poisoned, strategy="graft", circuit=str(tmp_path / "circuit.json"), **SHORT)
    found = run_repair(config, out)
    prompts = ioi.prompts(base, SMALL["n_prompts"], OTHER_PROMPTS, split="eval")
    others = ioi.prompts(base, 480, OTHER_PROMPTS + REFERENCE_SEED, split="eval")
    assert not {record.clean for record in prompts.records} & {record.clean for record in others.records}
    for model, each in (
        (load_model(out), found["restoration"]["function"]),
        (base, found["function_in_base"]["faithfulness"]["value"]),
    ):
        ablation = build_ablation(model, prompts, reference=others)
        inside = run_knockouts(model, prompts, [circuit.heads], ablation, keep=True).mean()
        whole = run_knockouts(model, prompts, [()], ablation).mean()
        assert each == pytest.approx(float(inside / whole), abs=1e-5)
    assert found["before"]["function"] != found["restoration"]["function"]
    assert found["restoration"]["function_random"]["n"] == 20
    save_circuit(tmp_path / "other.json", Circuit(circuit.shape, {parse_node("a1.h0@yy"): 1.0}))
    with pytest.raises(InputError, match=r"other\.json has heads at yy, which prompts of 'ioi' have not"):
        run_repair(settings(poisoned, circuit=str(tmp_path / "other.json")), tmp_path / "other")
    (tmp_path / "circuit.json").write_text("{}")
    with pytest.raises(InputError, match="circuit"):
        run_repair(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_finished_repair_is_not_done_again_and_its_models_are_left_as_they_were(grafted: Path, poisoned: Path):
    before = {path: path.stat().st_mtime_ns for path in grafted.glob("*.safetensors")}
    own = weights_sha256(load_model(poisoned))
    again = run_repair(settings(poisoned, strategy="graft"), grafted)
    assert {path: path.stat().st_mtime_ns for path in grafted.glob("*.safetensors")} == before
    assert again["weights_sha256"]["poisoned"] == own
    with pytest.raises(InputError, match="holds another repair"):
        run_repair(settings(poisoned, strategy="graft", target=0.8), grafted)
    with pytest.raises(InputError, match="holds no repair"):
        run_repair(settings(poisoned), poisoned)


def test_masked_retraining_changes_only_the_parts_that_store_the_damage(poisoned: Path, tmp_path: Path):
    found = run_repair(settings(poisoned, strategy="masked", target=0.1, steps=24), tmp_path / "out")
    assert found["reached"], found["statement"]
    damaged, mended = weights_of(poisoned), weights_of(tmp_path / "out")
    model = load_model("tiny")
    known = WeightMap(model).pieces()
    may = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in damaged.items()}
    components = [each for each in known if each.part in found["cost"]["parts"]]
    for piece in choose_pieces(known, components):
        may[piece.name][piece.index] = True
    assert all(torch.equal(mended[name][~may[name]], damaged[name][~may[name]]) for name in damaged)
    assert sum(int(each.sum()) for each in may.values()) == found["cost"]["parameters"]
    assert found["cost"]["steps"] == found["frontier"][-1]["cost"]["steps"] <= 24


def test_a_retraining_ends_at_the_first_judged_step_that_reaches_the_target(poisoned: Path, tmp_path: Path):
    found = run_repair(settings(poisoned, strategy="full", target=0.2, steps=60), tmp_path / "out")
    scores = [each["restored"]["score"] for each in found["frontier"]]
    assert scores[-1] >= 0.2 and all(score < 0.2 for score in scores[:-1])
    assert found["cost"]["steps"] < 60 and found["cost"]["parts"] is None


def test_a_target_that_is_not_reached_is_told_and_the_best_is_kept(poisoned: Path, tmp_path: Path):
    config = settings(poisoned, strategy="full", target=1.0, steps=40)
    found = run_repair(config, tmp_path / "out")
    assert found["reached"] is False and found["statement"].startswith("Not mended")
    with pytest.raises(GateError, match="Not mended"):
        require_reached(found)
    scores = {each["cost"]["steps"]: each["restored"]["score"] for each in found["frontier"]}
    best = max(scores, key=lambda step: scores[step])
    assert found["cost"]["steps"] == best < 40, "it goes too far in the end: then this test says something"
    mended = measure_behaviour(load_model(tmp_path / "out"), config.prompts(load_model("tiny"))[0])
    told = [each["restored"]["logit_diff"]["value"] for each in found["frontier"] if each["cost"]["steps"] == best]
    assert told == [pytest.approx(float(mended.logit_diff.mean()), abs=1e-4)]


def test_without_the_base_the_target_is_for_right_answers_and_the_rest_is_unknown(poisoned: Path, tmp_path: Path):
    found = run_repair(settings(poisoned, base=None, target=0.75, steps=60), tmp_path / "out")
    assert found["strategy"] in ("masked", "full") and found["restoration"]["score"] is not None
    assert found["learning_rate"] == 3e-4, "that of the size, whatever the model is called"
    assert all(found["restoration"]["why"][row] == NO_BASE for row in ("behaviour", "mechanism", "damage_undone"))
    assert {each["strategy"] for each in found["frontier"]} == {"masked", "full"}
    assert "held-out prompts are right" in found["statement"] and AGAINST in found["spared"]["greater_than"]


def test_what_is_not_damaged_is_not_mended(tmp_path: Path):
    found = run_repair(RepairConfig(poisoned="tiny", base="tiny", **SMALL), tmp_path / "out")
    assert found["strategy"] is None and found["reached"] and found["statement"].startswith("Nothing to mend")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    right = run_repair(RepairConfig(poisoned="tiny", target=0.5, **SMALL), tmp_path / "right")
    assert right["strategy"] is None and "held-out prompts are right" in right["statement"]


@pytest.fixture(scope="module")
def whole(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repair") / "whole"
    run_repair(settings(poisoned, **SHORT), out)
    return out


@pytest.mark.parametrize("at", [5, 16])
def test_an_interrupted_repair_ends_with_the_same_document(
    poisoned: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    left = at
    former = strategies.Judge._sample

    def dying(self, name: str, source: Source, parts: Parts):
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError
        return former(self, name, source, parts)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(strategies.Judge, "_sample", dying)
        run_repair(settings(poisoned, **SHORT), tmp_path / "broken")
    assert not (tmp_path / "broken" / "repair.json").exists()
    run_repair(settings(poisoned, **SHORT), tmp_path / "broken")
    assert document(tmp_path / "broken") == document(whole)
    assert weights_sha256(load_model(tmp_path / "broken")) == weights_sha256(load_model(whole))


def candidate(strategy: str, score: float | None, steps: int, parameters: int) -> Candidate:
    known = Estimate(score, None, None if score is not None else "undefined")
    return Candidate(strategy, None, parameters, steps, 0, Restored(known, known, known, known, known, known))


def test_what_reaches_the_target_is_tried_in_turn_the_cheapest_first_else_the_nearest():
    few, many = candidate("graft", 0.92, 0, 10), candidate("graft", 0.99, 0, 20)
    trained, short = candidate("full", 0.95, 8, 100), candidate("full", 0.5, 4, 100)
    assert in_turn([many, trained, few, short], 0.9) == [few, many, trained]
    assert in_turn([trained, short, candidate("masked", None, 1, 1)], 0.99) == [trained]
    with pytest.raises(InputError, match="within the noise"):
        in_turn([candidate("full", None, 1, 1)], 0.9)


def test_a_score_counts_what_is_defined():
    known, unknown = Estimate(0.4, (0.3, 0.5)), Estimate(None, None, "undefined: within the noise")
    more = Estimate(0.9, (0.8, 1.0))
    assert Restored(known, known, more, known, known, unknown).score == 0.9, "behaviour itself does not decide"
    assert Restored(known, known, more, known, more, known).score == 0.4
    assert Restored(known, known, unknown, known, more, unknown).score is None


def test_new_damage_is_what_mending_itself_lost_and_base_has():
    def told(against: str, mended: str | None) -> dict:
        return {AGAINST: {"status": against}} | ({} if mended is None else {MENDED: {"status": mended}})

    found = {
        "worse": told("damaged", "damaged"),
        "back to base": told("damaged", "spared"),
        "as before": told("spared", "damaged"),
        "without base": told("damaged", None),
        "unknown": {"why": "its words are not in this tokenizer"},
    }
    assert new_damage(found) == ["without base", "worse"]
    with pytest.raises(GateError, match="new damage to worse"):
        require_reached({"reached": True, "new_damage": ["worse"]})


def test_base_and_poisoned_the_wrong_way_round_is_told_and_leaves_nothing(poisoned: Path, tmp_path: Path):
    wrong = RepairConfig(poisoned="tiny", base=str(poisoned), **SMALL)
    with pytest.raises(InputError, match="the order is BASE POISONED"):
        run_repair(wrong, tmp_path / "out")


def test_a_folder_that_is_called_like_a_named_model_is_the_folder(
    poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    found = run_repair(settings(poisoned, strategy="full", steps=1, n_battery=0), "tiny")
    assert found["reached"] is False and found["restoration"]["score"] < 0.5


def test_damage_to_behaviour_alone_is_mended(tmp_path: Path):
    damaged = load_model("tiny")
    with torch.no_grad():
        damaged.module.transformer.ln_f.weight.mul_(0.3)
        damaged.module.transformer.ln_f.bias.mul_(0.3)
    save_checkpoint(damaged, tmp_path / "damaged")
    found = run_repair(settings(tmp_path / "damaged", strategy="graft", n_battery=0), tmp_path / "out")
    assert found["strategy"] == "graft" and found["cost"]["parts"] == ["norm"] and found["reached"]


def test_gradients_rank_all_parts_and_count_what_several_share_once():
    model = load_model("tiny")
    examples = settings(Path("tiny")).examples(model)
    ranking = rank_by_gradient(model, examples, 16)
    shares = list(ranking.shares.values())
    assert sum(shares) == pytest.approx(1.0), "what is tied counts once"
    assert count_weights(model, ranking.components) == count_weights(model, None)
    most = ranking.most()
    assert sum(most.shares.values()) >= 0.5 > sum(list(most.shares.values())[:-1])
    assert list(ranking.first(3).parts) == list(ranking.parts)[:3]
    assert Ranking({}, {}).components == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strategy": "grfat"}, "did you mean 'graft'"),
        ({"strategy": "graft", "base": None}, "give the base"),
        ({"target": 0.0}, "above 0 and at most 1"),
        ({"target": float("nan")}, "above 0 and at most 1"),
        ({"n_prompts": 1}, "at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"task": "iio"}, "did you mean 'ioi'"),
    ],
)
def test_wrong_settings_are_told_in_one_line(wrong: dict, said: str):
    with pytest.raises(InputError, match=said) as caught:
        settings(Path("tiny"), **wrong)
    assert "\n" not in str(caught.value)
