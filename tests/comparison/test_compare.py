import json

import pytest
import torch

import neuroplast as npl
from neuroplast.comparison.compare import compare, verdict_between
from neuroplast.components import HEAD_KINDS, Component, Node
from neuroplast.errors import InputError
from neuroplast.interventions.cross_model import cross_patch
from neuroplast.interventions.grafting import graft
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.models.weights import WeightMap, choose_pieces
from neuroplast.storage import Parts
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import PromptSet

FAST = {"n_drift": 3, "n_profiles": 1, "n_random": 60, "n_samples": 4}


@pytest.fixture(scope="module")
def base() -> Network:
    return load_model("tiny")


@pytest.fixture(scope="module")
def prompts(base: Network) -> PromptSet:
    return load_task("ioi").prompts(base, 10, 0)


@pytest.fixture(scope="module")
def mover(base: Network, prompts: PromptSet) -> tuple[int, int]:
    """The head that helps most."""
    grid = path_patch(base, prompts).by_head().mean(dim=2)[1:]  # those of layer 0 help some prompts and hinder others
    layer, head = divmod(int(grid.argmin()), base.n_heads)
    return layer + 1, head


@pytest.fixture(scope="module")
def damaged(mover: tuple[int, int]) -> Network:
    """The base whose most helpful head writes the opposite."""
    model = load_model("tiny")
    with torch.no_grad():
        model.head_weights(mover[0])[mover[1]] *= -1
    return model


@pytest.fixture(scope="module")
def found(base: Network, damaged: Network, prompts: PromptSet, mover: tuple[int, int]):
    tasks = {"greater_than": load_task("greater_than").prompts(base, 6, 0)}
    return compare(base, damaged, prompts, circuit=[Node("head", *mover, "end")], tasks=tasks, **FAST)


def test_damage_of_one_head_is_stored_there_and_expressed_through_it(found, mover: tuple[int, int]):
    name = str(Node("head", *mover))
    assert found.stored.circuit.value == pytest.approx(1, abs=0.02)
    assert found.stored.shares[name].value == pytest.approx(1, abs=0.02)
    assert found.stored.grafts["circuit"].value == pytest.approx(1, abs=1e-3)
    assert found.stored.curves[0].names[0] == name and found.stored.curves[0].shares[0].value == pytest.approx(1)
    assert found.stored.split.effective_number == pytest.approx(1, abs=0.01)
    assert found.stored.of_squares["heads"] == pytest.approx(1) == found.stored.of_squares["heads<o>"]
    # Its value z is the same in both: patching that undoes nothing of it.
    row = found.expressed.parts.index(Node("head", *mover, "end"))
    assert found.expressed.undoes[row].abs().max() < 0.3 * found.behaviour.change.value * -1
    assert found.behaviour.change.value < 0


def test_every_part_of_a_comparison_is_that_of_its_own_measurement(
    base: Network, damaged: Network, prompts: PromptSet, found
):
    alone = cross_patch(damaged, base, prompts, sites="heads@end")
    torch.testing.assert_close(found.expressed.undoes[found.expressed.heads], alone.effects)
    rank = found.expressed.curves[0]
    change = float(alone.donor.mean() - alone.receiver.mean())
    joint = cross_patch(damaged, base, prompts, sites=["+".join(rank.names[:3])])
    assert rank.shares[2].value == pytest.approx(float(joint.effects.mean()) / change, rel=1e-4, abs=1e-6)
    greedy = found.expressed.curves[1]
    assert greedy.shares[0].value == pytest.approx(rank.shares[0].value, abs=1e-6)
    curve = found.stored.curves[0]
    pieces = WeightMap(base).pieces()
    named = {str(Node("head", c.layer, c.head)) if c.head is not None else str(c): [] for c in pieces}
    for component in pieces:
        key = str(Node("head", component.layer, component.head)) if component.head is not None else str(component)
        named[key].append(component)
    two = [component for name in curve.names[:2] for component in named[name]]
    grafted = graft(damaged, base, prompts, [two])
    assert curve.shares[1].value == pytest.approx(float(grafted.effects.mean()) / change, rel=1e-4, abs=1e-6)


def test_the_document_is_json_and_every_value_has_its_null(found):
    document = json.loads(json.dumps(found.document()))
    assert document["behaviour"]["null"]["n"] == 3
    for view in ("expressed", "stored"):
        assert document[view]["circuit"]["null"]["why"] or document[view]["circuit"]["null"]["p"]
        assert len(document[view]["concentration"]["null"]["gini"]) == 1
    assert set(document["spared"]) == {"greater_than", "text"}
    assert document["spared"]["text"]["kl_divergence"]["value"] > 0
    shares = sum(row["share"]["value"] for row in document["stored"]["parts"])
    assert shares == pytest.approx(1, abs=0.02)


def test_the_same_weights_are_nothing_to_compare(base: Network, prompts: PromptSet):
    assert compare(base, load_model("tiny"), prompts, **FAST) is None
    assert verdict_between(base, load_model("tiny"), prompts, n_drift=2).label == "unchanged"


def test_drift_alone_is_called_drift(base: Network, prompts: PromptSet):
    model = load_model("tiny")
    with torch.no_grad():
        for index, weight in enumerate(model.module.parameters()):
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    assert verdict_between(base, model, prompts, seed=5).label == "drift"


def test_the_verdict_alone_is_that_of_the_whole(base: Network, damaged: Network, prompts: PromptSet, found):
    assert verdict_between(base, damaged, prompts, n_drift=3, n_profiles=1) == found.verdict


def test_an_interrupted_comparison_goes_on_to_the_same_document(
    base: Network, damaged: Network, prompts: PromptSet, found, mover: tuple[int, int], tmp_path
):
    tasks = {"greater_than": load_task("greater_than").prompts(base, 6, 0)}
    options = {"circuit": [Node("head", *mover, "end")], "tasks": tasks, "parts": Parts(tmp_path), **FAST}

    def stop(activity: str, done: int, total: int) -> None:
        if activity == "grafting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(base, damaged, prompts, progress=stop, **options)
    said: set[str] = set()
    again = compare(base, damaged, prompts, progress=lambda activity, *_: said.add(activity), **options)
    assert "ledger" not in said and "grafting" in said
    assert json.dumps(again.document()) == json.dumps(found.document())


def test_wrong_settings_and_circuits_are_refused(base: Network, damaged: Network, prompts: PromptSet):
    with pytest.raises(InputError, match="unknown setting 'n_drit': did you mean 'n_drift'"):
        compare(base, damaged, prompts, n_drit=3)
    with pytest.raises(InputError, match="n_random must be a whole number from 0, got -1"):
        compare(base, damaged, prompts, n_random=-1)
    with pytest.raises(InputError, match="tolerance must lie between 0 and 1"):
        compare(base, damaged, prompts, tolerance=1.5)
    with pytest.raises(InputError, match="made of heads, got m0"):
        compare(base, damaged, prompts, circuit=["m0"], **FAST)


def test_a_lesion_hidden_in_noise_is_found_by_the_ledger(base: Network, prompts: PromptSet, mover: tuple[int, int]):
    model = load_model("tiny")
    pieces = choose_pieces(WeightMap(base).pieces(), [Component(kind, *mover) for kind in HEAD_KINDS])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        for piece in pieces:
            model.module.get_parameter(piece.name)[piece.index] *= 0.2
    by_head = npl.build_ledger(base, model, prompts).by_head().mean(dim=2)
    assert divmod(int(by_head.abs().argmax()), base.n_heads) == mover
