"""The models built by hand do what they are said to do: else nothing that is found in them means anything."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from handbuilt import MODELS, HandBuilt
from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.path_discovery import attention_to
from neuroplast.components import Edge, Node, parse_edge, parse_node
from neuroplast.interventions.path_patching import patch_paths, path_patch
from neuroplast.models.replay import record
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, path_effect, prompts_of

LOGITS = Node("logits", position="end")
built = cache(lambda name: MODELS[name]())


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> HandBuilt:
    return built(request.param)


@pytest.fixture
def prompts(model: HandBuilt) -> PromptSet:
    return model.prompts(24, 0)


def at_all_positions(prompts: PromptSet) -> PromptSet:
    """The same with a name for every position: those that had none are `other0`, `other1`, …"""
    named = torch.stack(list(prompts.positions.values()), dim=1).tolist()
    ends = prompts.positions["end"].tolist()
    others = [[at for at in range(end) if at not in row] for row, end in zip(named, ends, strict=True)]
    count = max(map(len, others))
    # A shorter prompt has its last one twice.
    columns = torch.tensor([row + row[-1:] * (count - len(row)) for row in others]).unbind(dim=1)
    return replace(prompts, positions={**prompts.positions, **{f"other{i}": each for i, each in enumerate(columns)}})


def ends_of(model: HandBuilt) -> list[Node]:
    """Nodes and backups."""
    return [parse_node(name) for name in model.nodes] + [parse_edge(name).source for name in model.backups]


def reads_of(node: Node, prompts: PromptSet) -> list[Node]:
    """All that a head reads: its query where it stands, its keys and values everywhere before."""
    channels = [replace(node.at(position), channel=channel) for position in prompts.positions for channel in ("k", "v")]
    return [replace(node, channel="q"), *channels]


def test_they_do_their_task_and_the_counterfactual_breaks_it(model: HandBuilt, prompts: PromptSet):
    clean = measure_behaviour(model.network, prompts)
    assert clean.answer_top1.all()
    assert clean.logit_diff.min() > 7.5
    assert clean.logit_diff.std() < 0.02
    other = measure_behaviour(model.network, replace(prompts, clean=prompts.counterfactual)).logit_diff
    flips = model.network.name == "induction"
    torch.testing.assert_close(other, -clean.logit_diff if flips else torch.zeros(len(prompts)), atol=0.05, rtol=0)


def test_they_do_it_on_any_seed(model: HandBuilt):
    assert all(measure_behaviour(model.network, model.prompts(32, seed)).answer_top1.all() for seed in range(1, 5))


def test_every_node_has_the_effect_that_follows_from_the_weights(model: HandBuilt, prompts: PromptSet):
    edges = [(parse_edge(name), share) for name, share in model.edges.items()]
    for name, share in model.nodes.items():
        readers = [edge.destination for edge, part in edges if str(edge.source) == name and part * share > 0]
        found = path_patch(model.network, prompts, senders=name, receivers=readers)
        assert abs(share) > 0.1
        assert float(found.effects.mean() / found.clean.mean()) == pytest.approx(share, abs=0.06)


def test_edges_have_the_effects_that_follow_from_the_weights_and_nothing_else_has_any(
    model: HandBuilt, prompts: PromptSet
):
    prompts = at_all_positions(prompts[:6])
    known = {**model.edges, **model.backup_reads}
    receivers = [LOGITS] + [read for node in ends_of(model) if node.layer for read in reads_of(node, prompts)]
    heads = [Node("head", layer, head) for layer in range(model.network.n_layers) for head in range(4)]
    # Heads are frozen, so a sender reaches what is read where it stands, or nothing; at all positions at once it must
    # do what it does there.
    paths = [(["heads", *(head.at(receiver.position) for head in heads)], [receiver]) for receiver in receivers]
    seen: set[str] = set()
    for receiver, found in zip(receivers, patch_paths(model.network, prompts, paths), strict=True):
        shares = found.effects / found.clean.mean()
        for (sender,), mine in zip(found.senders, shares, strict=True):
            name = f"{sender.at(receiver.position)}->{receiver}"
            if name in known:
                seen.add(name)
                assert float(mine.mean()) == pytest.approx(known[name], abs=0.06), name
                assert float((mine * known[name]).min()) > 0, name
            else:
                assert float(mine.abs().max()) < 0.005, name
    assert seen == set(known)


def test_without_the_movers_only_negative_and_backup_heads_write_to_the_logits(model: HandBuilt, prompts: PromptSet):
    whole = measure_behaviour(model.network, prompts).logit_diff.mean()
    found = path_patch(model.network, prompts, senders="heads@end", knocked_out=model.movers)
    shares = dict(zip(found.names, (found.effects.mean(dim=1) / whole).tolist(), strict=True))
    for name, share in shares.items():
        edge = f"{name}->logits@end"
        expected = 0.0 if name in model.movers else {**model.edges, **model.backups}.get(edge, 0.0)
        assert share == pytest.approx(expected, abs=0.06 if expected else 0.01), name


def test_each_head_of_the_circuit_attends_sharply_but_not_only_to_one_position(model: HandBuilt, prompts: PromptSet):
    nodes = [parse_node(name) for name in model.attended]
    found = attention_to(model.network, prompts, nodes, list(prompts.positions))
    for row, position in zip(found, model.attended.values(), strict=True):
        share = float(row[list(prompts.positions).index(position)])
        assert 0.9 < share < 1 - 1e-6
    for pattern in record(model.network, prompts.clean, ["pattern"]).pattern.values():
        below = torch.ones_like(pattern, dtype=torch.bool).tril()
        assert float(pattern[below].min()) > 0


def test_decoys_write_as_the_others_do(model: HandBuilt, prompts: PromptSet):
    clean, other = (record(model.network, each, ["z"]).z for each in (prompts.clean, prompts.counterfactual))
    backups = {str(parse_edge(edge).source.at(None)) for edge in model.backups}
    inside = torch.arange(prompts.clean.shape[1]) <= prompts.positions["end"][:, None]
    for layer in range(model.network.n_layers):
        weights = model.network.head_weights(layer)
        before, after = (torch.einsum("pchf,hfd->pchd", z[layer], weights) for z in (clean, other))
        size, change = (each.norm(dim=-1)[inside].amax(dim=0).tolist() for each in (before, before - after))
        for head in range(model.network.n_heads):
            name = f"a{layer}.h{head}"
            if name in model.silent:
                assert size[head] == 0, name
            elif name in backups:
                assert size[head] < 0.01, name
            else:
                assert size[head] > 0.5, name
                assert (change[head] < 1e-3) if name in model.constant else (change[head] > 0.5), name
    in_circuit = {str(node.at(None)) for node in ends_of(model)}
    assert not in_circuit & (model.silent | model.constant)
    assert len(in_circuit | model.silent | model.constant) < model.network.n_layers * model.network.n_heads - 4


def test_the_slow_definition_gives_the_same_effects(model: HandBuilt, prompts: PromptSet):
    family = model.network.module.config.model_type
    oracle = Oracle(MODELS[model.network.name]().network.module, family)
    for prompt in prompts_of(prompts[:2]):
        ld = prompt.ld(oracle.run(prompt.clean))
        for name, share in {**model.edges, **model.backup_reads}.items():
            edge: Edge = parse_edge(name)
            effect = path_effect(oracle, prompt, [edge.source], [edge.destination])
            assert float(effect / ld) == pytest.approx(share, abs=0.08), name
