import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from architectures import random_model
from neuroplast.behaviour import measure_behaviour
from neuroplast.components import Node, parse_edge
from neuroplast.errors import InputError
from neuroplast.interventions import chunks, edge_knockout
from neuroplast.interventions.edge_knockout import CircuitRun, run_edge_circuits
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.edges import EdgeGraph, build_edge_graph
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, Prompt, key_of, prompts_of, read_key

FEW = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def state_of(network: Network, prompts: PromptSet):
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), "forward" in vars(part))
        for part in network.module.modules()
    ]
    gradients = [parameter.grad for parameter in network.module.parameters()]
    return hooks, gradients, network.logits(prompts.clean, prompts.positions["end"]), torch.random.get_rng_state()


def draw(graph: EdgeGraph, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return graph.exists & (torch.rand(graph.exists.shape, generator=generator) < share)


def without(graph: EdgeGraph, *edges: str) -> Tensor:
    return graph.exists & ~graph.mask(map(parse_edge, edges))


def circuit_difference(oracle: Oracle, graph: EdgeGraph, kept: Tensor, prompt: Prompt) -> Tensor:
    """One full forward pass a destination: it reads kept sources as they are in this run, the others as in theirs."""
    everywhere = prompt.where(None)
    other = oracle.run(prompt.counterfactual)
    now = {("residual", 0, 0): oracle.run(prompt.clean).seen["residual", 0, 0]}

    def run(changed: dict):
        return oracle.run(prompt.counterfactual, {key: (everywhere, value) for key, value in changed.items()})

    def arriving(destination: Node) -> dict:
        column = kept[:, graph.destinations.index(destination)]
        before = [u for u in range(len(column)) if graph.exists[u, graph.destinations.index(destination)]]
        keys = {key_of(graph.sources[u]): bool(column[u]) for u in before}
        return {key: now[key] if mine else other.seen[key] for key, mine in keys.items()}

    for layer in range(graph.n_layers):
        heads = [node for node in graph.destinations if node.kind == "head" and node.layer == layer]
        read = {read_key(node): run(arriving(node)).seen[read_key(node)] for node in heads}
        now |= {key: value for key, value in run(read).seen.items() if key[:2] == ("z", layer)}
        mlp = Node("mlp", layer)
        seen = run(arriving(mlp)).seen[read_key(mlp)]
        now[key_of(mlp)] = run({read_key(mlp): seen}).seen[key_of(mlp)]
    return prompt.ld(run(arriving(Node("logits"))))


@FEW
@given(share=st.sampled_from([0.15, 0.4, 0.8, 0.95]), seed=st.integers(0, 99))
def test_a_circuit_gives_what_a_forward_pass_a_destination_gives(network, named_prompts, family, share, seed):
    graph = build_edge_graph(network)
    kept = draw(graph, share, seed)
    fast = run_edge_circuits(network, named_prompts, [kept])[0]
    oracle = Oracle(random_model(family), family)
    slow = [circuit_difference(oracle, graph, kept, prompt) for prompt in prompts_of(named_prompts)]
    torch.testing.assert_close(fast, torch.stack(slow), atol=1e-4, rtol=1e-4)


def test_with_all_edges_it_is_the_clean_run_and_with_none_the_counterfactual_one(
    network: Network, token_prompts: PromptSet
):
    graph = build_edge_graph(network)
    every, none = run_edge_circuits(network, token_prompts, [graph.exists, torch.zeros_like(graph.exists)])
    swapped = PromptSet("", (), token_prompts.counterfactual, token_prompts.clean, *vars_of(token_prompts))
    clean, counterfactual = (measure_behaviour(network, each).logit_diff for each in (token_prompts, swapped))
    torch.testing.assert_close(every, clean, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(none, counterfactual, atol=2e-5, rtol=1e-4)
    assert (clean - counterfactual).abs().min() > 0.01


def vars_of(prompts: PromptSet) -> tuple:
    return prompts.answer, prompts.foil, prompts.positions


def test_without_a_single_edge_it_is_that_edge_patched(network: Network, named_prompts: PromptSet):
    graph = build_edge_graph(network)
    edges = ["input->a0.h0<k>", "m0->a1.h3<v>", "a0.h1->a2.h2<q>", "a1.h0->m2", "a2.h1->logits", "m1->logits"]
    patched = patch_edges(network, named_prompts, edges)
    found = run_edge_circuits(network, named_prompts, [without(graph, edge) for edge in edges])
    torch.testing.assert_close(found - patched.clean, patched.effects, atol=2e-5, rtol=1e-4)
    assert patched.effects.abs().amax(dim=1).min() > 0.01


def test_edges_that_lead_nowhere_change_nothing_and_are_not_live(network: Network, named_prompts: PromptSet):
    graph = build_edge_graph(network)
    path = [parse_edge(name) for name in ("input->a0.h1<v>", "a0.h1->m1", "m1->logits")]
    from_nothing = [parse_edge(name) for name in ("a1.h0->a2.h3<q>", "a2.h3->logits", "a0.h2->m1")]
    to_nothing = [parse_edge(name) for name in ("input->a0.h3<q>", "a0.h3->a1.h1<k>", "a0.h1->m2")]
    kept, more = graph.mask(path), graph.mask([*path, *from_nothing, *to_nothing])
    assert graph.edges(graph.live(more)) == graph.edges(kept) and len(graph.edges(kept)) == 3
    assert not graph.live(graph.mask([*path[1:], *from_nothing, *to_nothing])).any()
    one, other = run_edge_circuits(network, named_prompts, [kept, more])
    assert torch.equal(one, other)


def test_several_circuits_at_once_are_each_alone(network: Network, named_prompts: PromptSet, monkeypatch):
    graph = build_edge_graph(network)
    circuits = [draw(graph, share, seed) for seed, share in enumerate((0.9, 0.1, 0.5, 0.0, 1.0, 0.3))]
    alone = torch.cat([run_edge_circuits(network, named_prompts, [circuit]) for circuit in circuits])
    torch.testing.assert_close(run_edge_circuits(network, named_prompts, circuits), alone, atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(edge_knockout, "VARIANTS", 2)
    for rows in (1, 60, 120, 400):
        monkeypatch.setitem(chunks.ROWS, "cpu", rows)
        torch.testing.assert_close(run_edge_circuits(network, named_prompts, circuits), alone, atol=2e-5, rtol=1e-4)
    assert len({round(float(value), 4) for value in alone[:, 0]}) > 4


def test_a_tight_budget_changes_nothing_or_is_refused(network: Network, named_prompts: PromptSet, monkeypatch):
    graph = build_edge_graph(network)
    circuits = [draw(graph, 0.5, seed) for seed in range(3)]
    whole = run_edge_circuits(network, named_prompts, circuits)
    enough = 0
    for free in (10_000, 200_000, 400_000, 800_000, 1_600_000):
        monkeypatch.setattr(chunks, "working_memory", lambda *_, free=free: free)
        try:
            found = run_edge_circuits(network, named_prompts, circuits)
        except InputError as error:
            assert not enough and "of memory are left for the work, and one prompt takes" in str(error)
            continue
        enough += 1
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)
    assert 2 <= enough < 5


def test_variants_of_a_circuit_are_those_circuits(network: Network, named_prompts: PromptSet, monkeypatch):
    graph = build_edge_graph(network)
    for rows, rounds in ((2048, 2), (100, 1)):
        monkeypatch.setitem(chunks.ROWS, "cpu", rows)
        run = CircuitRun(network, named_prompts, draw(graph, 0.6, 1))
        for round_ in range(rounds):
            # Edges into the logits, into an MLP and into heads of each layer, one at a time and together.
            places = run.kept.nonzero()[torch.randperm(int(run.kept.sum()), generator=torch.Generator().manual_seed(2))]
            masks = [run.kept.clone() for _ in range(4)]
            for number, (u, v) in enumerate(places[:9].tolist()):
                masks[min(number, 3)][u, v] = False
            expected = run_edge_circuits(network, named_prompts, [run.kept, *masks])
            torch.testing.assert_close(run.difference, expected[0], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(run.variants(masks), expected[1:], atol=2e-5, rtol=1e-4)
            run.become(masks[3 - round_])
            assert torch.equal(run.kept, graph.live(masks[3 - round_]))
    with pytest.raises(InputError, match="others were added"):
        run.become(graph.exists)


def watched(real, layers: list[int]):
    def call(layer: int, *args):
        layers.append(layer)
        return real(layer, *args)

    return call


def test_a_variant_computes_nothing_below_the_edge_in_which_it_differs(network: Network, named_prompts, monkeypatch):
    graph = build_edge_graph(network)
    run = CircuitRun(network, named_prompts, graph.exists)
    layers: list[int] = []
    for name in ("read_attention", "read_heads", "edited_mlp"):
        monkeypatch.setattr(network, name, watched(getattr(network, name), layers))
    run.variants([without(graph, "m1->logits"), without(graph, "input->logits")])
    assert layers == []
    run.variants([without(graph, "m0->m1")])
    assert layers[0] == 1 and set(layers) == {1, 2}
    layers.clear()
    run.variants([without(graph, "input->a2.h2<k>")])
    assert set(layers) == {2}


def test_a_run_that_the_memory_cannot_hold_is_one_clear_line(network: Network, named_prompts, monkeypatch):
    monkeypatch.setattr(edge_knockout, "working_memory", lambda *_: 1000)
    with pytest.raises(InputError, match=r"run on 4 prompts takes .* give fewer prompts, a smaller circuit"):
        CircuitRun(network, named_prompts, build_edge_graph(network).exists)


def test_a_model_whose_only_way_is_one_head_needs_exactly_its_edges(named_prompts: PromptSet):
    module = random_model("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        # Head 2 of layer 1 alone writes something.
        module.model.layers[1].self_attn.o_proj.weight[:, 32:48].normal_(std=0.3)
    network = build_network(module, None, "one head")
    graph = build_edge_graph(network)
    names = ["input->a1.h2<q>", "input->a1.h2<k>", "input->a1.h2<v>", "a1.h2->logits", "input->logits"]
    needed = [parse_edge(name) for name in names]
    every, exactly, *fewer = run_edge_circuits(
        network,
        named_prompts,
        [graph.exists, graph.mask(needed), *(graph.mask(set(needed) - {edge}) for edge in needed)],
    )
    torch.testing.assert_close(exactly, every, atol=1e-5, rtol=1e-5)
    for edge, lacking in zip(names, fewer, strict=True):
        assert (lacking - every).abs().max() > 0.01, f"{edge} does not matter"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_after_an_error_anywhere_the_model_is_as_before(network: Network, named_prompts, monkeypatch, share: float):
    graph = build_edge_graph(network)
    circuits = [draw(graph, 0.5, 1), graph.exists]
    before = state_of(network, named_prompts)
    for name in ("run_layer", "read_heads", "read_attention", "readout"):
        real, calls, fails_at = getattr(network, name), [0], [None]

        def fails(*args, real=real, calls=calls, fails_at=fails_at, **more):
            found = real(*args, **more)
            calls[0] += 1
            if calls[0] == fails_at[0]:
                raise FloatingPointError("in the middle")
            return found

        monkeypatch.setattr(network, name, fails)
        run_edge_circuits(network, named_prompts, circuits)
        fails_at[0], calls[0] = 1 + int(share * calls[0]), 0
        with pytest.raises(FloatingPointError, match="in the middle"):
            run_edge_circuits(network, named_prompts, circuits)
        monkeypatch.undo()
        after = state_of(network, named_prompts)
        assert after[0] == before[0] and all(gradient is None for gradient in after[1])
        assert torch.equal(after[2], before[2]) and torch.equal(after[3], before[3])


def test_in_bfloat16_it_is_near_float32_with_the_same_weights(family: str, named_prompts: PromptSet):
    rough = build_network(random_model(family).bfloat16(), None, family)
    exact = build_network(random_model(family).bfloat16().float(), None, family)
    circuits = [draw(build_edge_graph(exact), share, 3) for share in (0.4, 0.8)]
    found, expected = (run_edge_circuits(each, named_prompts, circuits) for each in (rough, exact))
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97


def test_progress_counts_up_to_the_end(network: Network, named_prompts: PromptSet):
    graph, calls = build_edge_graph(network), []
    masks = [draw(graph, 0.5, seed) for seed in range(3)]
    run_edge_circuits(network, named_prompts, masks, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12) and calls == sorted(calls) and all(done < 12 for done, _ in calls[:-1])
    assert run_edge_circuits(network, named_prompts, []).shape == (0, 4)


def test_what_is_no_edge_is_refused(network: Network, named_prompts: PromptSet):
    graph = build_edge_graph(network)
    for edges, message in (
        ([parse_edge("m0@a->m2")], "stands at a position"),
        ([parse_edge("m0->m7")], "the model has no edge m0->m7"),
    ):
        with pytest.raises(InputError, match=message):
            graph.mask(edges)
    with pytest.raises(InputError, match=r"the model has no edge from m1 to a0\.h0<q>"):
        wrong = graph.exists.clone()
        wrong[graph.sources.index(Node("mlp", 1)), 0] = True
        run_edge_circuits(network, named_prompts, [wrong])
    with pytest.raises(InputError, match=r"a circuit's matrix is \(2, 2\)"):
        run_edge_circuits(network, named_prompts, [torch.ones(2, 2, dtype=torch.bool)])


def test_the_matrix_has_the_edges_of_the_model(network: Network):
    graph = build_edge_graph(network)
    edges = graph.edges(graph.exists)
    assert torch.equal(graph.mask(edges), graph.exists) and torch.equal(graph.live(graph.exists), graph.exists)
    for column, node in enumerate(graph.destinations[:-1]):
        heads = graph.heads_read(node.layer)
        assert (heads.start <= column < heads.stop) == (node.kind == "head")
        assert (graph.mlp_reads(node.layer) == column) == (node.kind == "mlp")
    for row, node in enumerate(graph.sources[1:], start=1):
        assert (graph.mlp_written(node.layer) == row) == (node.kind == "mlp")
        assert (row in range(*graph.heads_written(node.layer).indices(99))) == (node.kind == "head")
