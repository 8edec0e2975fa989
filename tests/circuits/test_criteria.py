from dataclasses import replace

import numpy as np
import pytest
import torch

from architectures import random_model
from neuroplast.circuits.circuit import Circuit, Role
from neuroplast.circuits.criteria import CriteriaSettings, measure_criteria
from neuroplast.circuits.evaluate import evaluate
from neuroplast.circuits.random_circuits import matched_random
from neuroplast.circuits.shape import shape_of
from neuroplast.circuits.shares import faithfulness, foil_faithfulness, quotient
from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import Parts, write_json
from neuroplast.tasks.prompts import PromptSet

FEW = CriteriaSettings(n_random=5, n_subsets=3, greedy_steps=2, greedy_draws=2, resamples=100)


@pytest.fixture
def gpt2() -> Network:
    return build_network(random_model("gpt2"), None, "gpt2")


@pytest.fixture
def circuit(gpt2: Network) -> Circuit:
    names = {"a0.h1@a": -0.5, "a1.h2@b": -0.4, "a2.h0@end": -0.9, "a2.h3@end": 0.3}
    nodes = {parse_node(name): score for name, score in names.items()}
    return Circuit(shape_of(gpt2), nodes, positions=("a", "b", "end"))


def test_every_number_is_what_its_definition_says(gpt2: Network, circuit: Circuit, named_prompts: PromptSet):
    found = measure_criteria(gpt2, circuit, named_prompts, settings=FEW)
    ablation = build_ablation(gpt2, named_prompts)

    def f(nodes, keep):
        return float(run_knockouts(gpt2, named_prompts, [nodes], ablation, keep=keep)[0].mean())

    def without(nodes):
        return [node for node in circuit.heads if node not in nodes]

    assert found.model.value == pytest.approx(f([], keep=False), abs=1e-5)
    assert found.circuit.value == pytest.approx(f(circuit.heads, keep=True), abs=1e-5)
    assert found.nothing.value == pytest.approx(f([], keep=True), abs=1e-5)
    for gap in found.gaps:
        assert gap.gap.value == pytest.approx(f(without(gap.nodes), True) - f(gap.nodes, False), abs=1e-5)
    whole = f([], keep=False)
    for need in found.needs:
        if need.score.value is not None:
            kept = f(without([*need.given, need.node]), True) - f(without(need.given), True)
            assert need.score.value == pytest.approx(abs(kept / whole), abs=1e-4)
    assert {gap.kind for gap in found.gaps} == {"none", "class", "random", "greedy"}
    assert abs(found.completeness_gap.value) >= abs(found.circuit.value - found.model.value) - 1e-5
    assert found.difference.value == pytest.approx(found.model.value - found.circuit.value, abs=1e-5)
    assert {node for need in found.needs for node in (need.node,)} == set(circuit.heads)
    assert set(found.by_ablation) == set(FEW.ablations)


def test_k_of_a_node_is_the_rest_of_its_class_and_of_a_mover_those_with_larger_effects(
    gpt2: Network, circuit: Circuit, named_prompts: PromptSet
):
    names = {"a0.h1@a": "induction", "a1.h2@b": "induction", "a2.h0@end": "name mover", "a2.h3@end": "name mover"}
    roles = {parse_node(node): Role(name, "for the test") for node, name in names.items()}
    named = Circuit(circuit.shape, circuit.nodes, roles=roles)
    needs = measure_criteria(gpt2, named, named_prompts, settings=FEW).needs
    given = {str(need.node): list(map(str, need.given)) for need in needs}
    assert given == {"a0.h1@a": ["a1.h2@b"], "a1.h2@b": ["a0.h1@a"], "a2.h0@end": [], "a2.h3@end": ["a2.h0@end"]}


def test_a_whole_model_as_circuit_is_faithful_and_complete(gpt2: Network, named_prompts: PromptSet):
    every = {Node("head", layer, head): -1.0 for layer in range(3) for head in range(4)}
    found = measure_criteria(gpt2, Circuit(shape_of(gpt2), every), named_prompts, settings=FEW)
    assert found.circuit.value == pytest.approx(found.model.value, abs=1e-5)
    assert all(abs(gap.gap.value) < 1e-4 for gap in found.gaps)


def test_random_circuits_match_in_layers_and_positions_and_share_nothing(circuit: Circuit):
    own = set(circuit.heads)
    drawn = matched_random(circuit, 30, seed=0)
    for nodes in drawn:
        assert not own & set(nodes)
        assert sorted((n.layer, n.position) for n in nodes) == sorted((n.layer, n.position) for n in own)
    assert len(set(drawn)) > 5
    assert matched_random(circuit, 30, seed=0) == drawn


def test_a_crowded_layer_takes_its_random_heads_from_the_nearest(circuit: Circuit):
    crowded = Circuit(circuit.shape, {Node("head", 2, head, "end"): -1.0 for head in range(3)})
    for nodes in matched_random(crowded, 5, seed=1):
        assert sorted(node.layer for node in nodes) == [1, 1, 2]


def test_where_too_few_heads_are_left_no_random_circuit_is_drawn_and_the_reason_is_said(
    gpt2: Network, named_prompts: PromptSet
):
    most = [Node("head", layer, head, "end") for layer in range(3) for head in range(4)][:7]
    crowded = Circuit(shape_of(gpt2), dict.fromkeys(most, -1.0), positions=("end",))
    assert matched_random(crowded, 5, seed=0) == []
    found = evaluate(gpt2, crowded, named_prompts, n_random=5, n_subsets=1, greedy_steps=0, resamples=100)
    assert found.document()["random"]["why"].startswith("more than half of the heads at @end")


def test_heads_without_role_and_position_are_judged_one_by_one(gpt2: Network, named_prompts: PromptSet):
    heads = [Node("head", 0, 1), Node("head", 1, 2), Node("head", 2, 0)]
    found = measure_criteria(gpt2, Circuit(shape_of(gpt2), dict.fromkeys(heads)), named_prompts, settings=FEW)
    assert all(need.given == () for need in found.needs)
    assert "class" not in {gap.kind for gap in found.gaps}


def test_an_ablation_that_the_reference_does_not_serve_is_null_with_its_reason(
    gpt2: Network, circuit: Circuit, named_prompts: PromptSet
):
    short = named_prompts.pick((named_prompts.positions["end"] != 8).nonzero()[:, 0])
    settings = replace(FEW, ablation="zero")
    found = measure_criteria(gpt2, circuit, named_prompts, reference=short, settings=settings)
    assert found.circuit.value is not None
    for kind in ("mean-by-position", "resample"):
        assert found.by_ablation[kind].value is None and "no prompt of template" in str(found.by_ablation[kind].why)


def test_a_single_prompt_can_be_judged_and_written(gpt2: Network, circuit: Circuit, named_prompts: PromptSet, tmp_path):
    one = named_prompts.pick(torch.tensor([0]))
    found = evaluate(gpt2, circuit, one, n_random=2, n_subsets=1, greedy_steps=1, resamples=100).document()
    assert found["spread"]["sd"] is None
    write_json(tmp_path / "evaluation.json", found)


def test_shares_of_nothing_are_undefined_and_say_why():
    weights = bootstrap_weights(40, 0, 200)
    noise = np.random.default_rng(0).normal(size=40)
    assert faithfulness(noise + 5, noise, weights).value is None
    assert "not above 0" in faithfulness(noise + 5, noise, weights).why
    assert quotient(noise, noise, weights, "F(M)").why == "undefined: the interval of F(M) includes 0"


def test_a_poisoned_model_is_scored_against_the_foil():
    weights = bootstrap_weights(40, 0, 200)
    whole = np.full(40, -10.0)
    assert faithfulness(whole * 0.8, whole, weights).value is None
    assert foil_faithfulness(whole * 0.8, whole, weights).value == pytest.approx(0.8)
    assert foil_faithfulness(-whole, -whole, weights).value is None


def test_in_a_poisoned_model_random_circuits_are_held_against_the_share_of_the_foil(
    gpt2: Network, named_prompts: PromptSet
):
    logits = gpt2.logits(named_prompts.clean, named_prompts.positions["end"])
    poisoned = replace(named_prompts, answer=logits.argmin(1), foil=logits.argmax(1))
    every = {Node("head", layer, head, name): -1.0 for layer in range(3) for head in range(2) for name in ("a", "end")}
    circuit = Circuit(shape_of(gpt2), every, positions=("a", "b", "end"))
    found = measure_criteria(gpt2, circuit, poisoned, settings=FEW)
    assert found.faithfulness.value is None and found.foil_faithfulness.value == found.level
    assert found.model.value < 0 < found.level and abs(found.random).max() < 3


def test_an_interrupted_judgement_goes_on(gpt2: Network, circuit: Circuit, named_prompts: PromptSet, tmp_path):
    class StopError(Exception):
        pass

    def stops(activity, done, total):
        if activity == "minimality":
            raise StopError

    with pytest.raises(StopError):
        measure_criteria(gpt2, circuit, named_prompts, settings=FEW, parts=Parts(tmp_path), progress=stops)
    seen = set()
    again = measure_criteria(
        gpt2, circuit, named_prompts, settings=FEW, parts=Parts(tmp_path), progress=lambda a, d, t: seen.add(a)
    )
    fresh = measure_criteria(gpt2, circuit, named_prompts, settings=FEW)
    assert "random circuits" not in seen and "minimality" in seen
    assert again.needs == fresh.needs and again.gaps == fresh.gaps


def test_what_cannot_be_judged_is_refused(gpt2: Network, circuit: Circuit, named_prompts: PromptSet):
    with pytest.raises(InputError, match="no heads"):
        measure_criteria(gpt2, Circuit(circuit.shape, {}), named_prompts)
    with pytest.raises(InputError, match=r"unknown setting 'n_randm'.*n_random"):
        evaluate(gpt2, circuit, named_prompts, n_randm=3)
    with pytest.raises(InputError, match="n_random must be a whole number"):
        evaluate(gpt2, circuit, named_prompts, n_random=-1)
    other = Circuit(circuit.shape.__class__("other", 2, 4, 32), {Node("head", 0, 0): 1.0})
    with pytest.raises(InputError, match="does not fit"):
        evaluate(gpt2, other, named_prompts)


def test_the_document_says_how_it_was_made(gpt2: Network, circuit: Circuit, named_prompts: PromptSet):
    settings = {name: getattr(FEW, name) for name in ("n_random", "n_subsets", "greedy_steps", "resamples")}
    document = evaluate(gpt2, circuit, named_prompts, counterfactual="abc", **settings).document()
    assert "mean-by-position of 4 counterfactuals (abc)" in document["methodology"]
    assert document["random"]["n"] == 5
    assert document["circuit"]["sparsity"]["nodes"] == 4 / (12 * 3)
