from dataclasses import replace

import numpy as np
import pytest
import torch

from architectures import VOCABULARY, random_model
from neuroplast.circuits.attention import attention_to
from neuroplast.circuits.path_discovery import PathSettings, discover_paths
from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.models.replay import record
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet


@pytest.fixture
def llama() -> Network:
    return build_network(random_model("llama"), None, "llama")


@pytest.fixture
def many_prompts(llama: Network) -> PromptSet:
    """Prompts that the random model answers: what it says itself is called the answer."""
    generator = torch.Generator().manual_seed(9)
    clean, other = torch.randint(1, VOCABULARY, (2, 40, 8), generator=generator)
    end = torch.full((40,), 7)
    logits = llama.logits(clean, end)
    positions = {"a": torch.full((40,), 2), "b": torch.full((40,), 4), "end": end}
    return PromptSet("random", (), clean, other, logits.argmax(1), logits.argmin(1), positions)


def test_what_is_found_passes_and_what_is_not_does_not(llama: Network, many_prompts: PromptSet):
    found = discover_paths(llama, many_prompts, threshold=0.05)
    slow = path_patch(llama, many_prompts, senders="heads@end")
    least = 0.05 * abs(float(slow.clean.mean()))
    (first, *later) = found.steps
    large = {group[0] for group, row in zip(slow.senders, slow.effects, strict=True) if abs(row.mean()) >= least}
    assert set(first.found) <= large
    cut = {node for node in large if node not in first.found}
    assert len(cut) == first.within_noise
    for node in first.found:
        row = slow.effects[[group[0] for group in slow.senders].index(node)]
        assert found.steps[0].effects[first.senders.index(node)].mean() == pytest.approx(float(row.mean()), abs=1e-5)
    assert later, "a random model's heads read what others write"
    for step in later:
        again = path_patch(llama, many_prompts, senders=list(step.found) or ["a0.h0@end"], receivers=step.receivers)
        for row, node in enumerate(step.found):
            mine = step.effects[step.senders.index(node)]
            np.testing.assert_allclose(mine, again.effects[row].numpy(), atol=1e-4)


def test_every_edge_is_the_effect_through_its_receiver_alone(llama: Network, many_prompts: PromptSet):
    found = discover_paths(llama, many_prompts, threshold=0.05)
    inner = [edge for edge in found.circuit.edges if edge.destination.kind == "head"]
    assert inner
    for edge in inner[:6]:
        slow = path_patch(llama, many_prompts, senders=[edge.source], receivers=[edge.destination])
        assert found.circuit.edges[edge] == pytest.approx(float(slow.effects.mean()), abs=1e-4)


def test_screening_changes_nothing_that_is_found(llama: Network, many_prompts: PromptSet):
    fast = discover_paths(llama, many_prompts, settings=PathSettings(0.05))
    slow = discover_paths(llama, many_prompts, settings=PathSettings(0.05, screen=False))
    assert sum(step.n_candidates - len(step.senders) for step in fast.steps) > 0
    assert all(step.n_candidates == len(step.senders) for step in slow.steps)
    assert dict(fast.circuit.nodes) == pytest.approx(dict(slow.circuit.nodes), abs=1e-5)
    assert dict(fast.circuit.edges) == pytest.approx(dict(slow.circuit.edges), abs=1e-5)


def test_heads_that_act_on_the_later_prompts_alone_are_not_cut_by_screening(llama: Network, many_prompts: PromptSet):
    same = torch.arange(40)[:, None] < 20
    sorted_prompts = replace(many_prompts, counterfactual=many_prompts.clean.where(same, many_prompts.counterfactual))
    fast = discover_paths(llama, sorted_prompts, settings=PathSettings(0.05))
    slow = discover_paths(llama, sorted_prompts, settings=PathSettings(0.05, screen=False))
    assert fast.circuit.nodes and set(fast.circuit.nodes) == set(slow.circuit.nodes)


def test_end_is_a_position_of_the_circuit_whatever_was_asked_for(llama: Network, many_prompts: PromptSet):
    found = discover_paths(llama, many_prompts, settings=PathSettings(0.05, positions=("a",)))
    assert found.circuit.positions == ("a", "end")
    assert found.circuit.universe("nodes") == 2 * llama.n_layers * llama.n_heads


def test_a_discovery_goes_on_where_it_was_interrupted(llama: Network, many_prompts: PromptSet, tmp_path):
    whole = discover_paths(llama, many_prompts, threshold=0.05)
    steps = []

    def stops(name, done, total):
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover_paths(
            llama, many_prompts, threshold=0.05, parts=Parts(tmp_path), progress=stops, say=steps.append
        )  # fmt: skip
    measured = set()
    again = discover_paths(
        llama, many_prompts, threshold=0.05, parts=Parts(tmp_path), progress=lambda name, d, t: measured.add(name)
    )
    assert again.circuit == whole.circuit
    assert measured and not any(name.startswith("logits") for name in measured)


def test_a_backup_shows_only_without_the_movers(llama: Network, many_prompts: PromptSet):
    found = discover_paths(llama, many_prompts, threshold=0.15)
    last = found.steps[-1]
    assert last.name == "backups"
    movers = [node for node in found.steps[0].found if found.circuit.nodes[node] < 0]
    slow = path_patch(llama, many_prompts, senders=list(last.senders), knocked_out=movers)
    np.testing.assert_allclose(last.effects, slow.effects.numpy(), atol=1e-4)
    assert not set(found.backups) & {node for step in found.steps[:-1] for node in step.found}
    none = discover_paths(llama, many_prompts, settings=PathSettings(0.15, backups=False))
    assert none.steps[-1].name != "backups" and not none.backups


def test_prompts_that_name_only_the_end_are_looked_at_everywhere(llama: Network, many_prompts: PromptSet):
    bare = replace(many_prompts, positions={"end": many_prompts.positions["end"]})
    found = discover_paths(llama, bare, threshold=0.05)
    assert {node.position for node in found.circuit.nodes} == {"end", None}
    assert found.circuit.positions == ()


def test_attention_is_the_mean_of_the_patterns_where_something_differs(network: Network, named_prompts: PromptSet):
    heads = [parse_node("a0.h1@b"), parse_node("a2.h3@end"), parse_node("a1.h0@other")]
    found = attention_to(network, named_prompts, heads, ("a", "end", "other"))
    pattern = record(network, named_prompts.clean, ("pattern",)).pattern
    slow = torch.zeros(3, 3)
    for row in range(4):
        names = {name: int(index[row]) for name, index in named_prompts.positions.items()}
        other = [at for at in range(names["end"] + 1) if at not in names.values()]
        stands = ([names["b"]], [names["end"]], other)
        reads = ([names["a"]], [names["end"]], other)
        first = int((named_prompts.clean[row] != named_prompts.counterfactual[row]).int().argmax())
        for h, node in enumerate(heads):
            for column, keys in enumerate(reads):
                keys = [at for at in keys if at >= first]
                shares = [pattern[node.layer][row, node.head, query, keys].sum() for query in stands[h]]
                slow[h, column] += torch.stack(shares).mean() / 4
    torch.testing.assert_close(found, slow)


def test_nothing_to_find_is_one_clear_line(llama: Network, many_prompts: PromptSet):
    with pytest.raises(NothingFoundError, match="give a lower threshold"):
        discover_paths(llama, many_prompts, threshold=0.99)
    swapped = torch.arange(40) % 2 == 0
    answer = torch.where(swapped, many_prompts.foil, many_prompts.answer)
    foil = torch.where(swapped, many_prompts.answer, many_prompts.foil)
    with pytest.raises(NothingFoundError, match="not apart from 0"):
        discover_paths(llama, replace(many_prompts, answer=answer, foil=foil))
    with pytest.raises(InputError, match="at least 8"):
        discover_paths(llama, many_prompts[:7])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": 0.0}, "threshold must lie between 0 and 1"),
        ({"attention": 2.0}, "attention must lie between"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"resamples": 5}, "resamples must be a whole number, at least 100"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        PathSettings(**wrong)


def test_an_unknown_position_is_refused_with_the_nearest(llama: Network, many_prompts: PromptSet):
    with pytest.raises(InputError, match="unknown position 'ned': did you mean 'end'"):
        discover_paths(llama, many_prompts, settings=PathSettings(positions=("ned",)))


def test_nodes_stand_in_the_order_of_the_forward_pass(llama: Network, many_prompts: PromptSet):
    nodes = list(discover_paths(llama, many_prompts, threshold=0.05).circuit.nodes)
    assert [node.layer for node in nodes] == sorted(node.layer for node in nodes)
    assert all(isinstance(node, Node) for node in nodes)
