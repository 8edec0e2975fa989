"""Rows of single interventions: every head, every place, every edge."""

from functools import partial
from typing import Any

from neuroplast.bench.job import Alternating, Counted, Job, Missing, Setting
from neuroplast.bench.operations import Operations
from neuroplast.bench.peers import NO_GROUPED_EDGES, Lens, lens_peer
from neuroplast.bench.plain import PlainPasses
from neuroplast.components import Node
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network

SITE_PROMPTS = 8
"""Prompts whose residual streams are patched, at most: each has a window for every layer and position."""


def late_queries(model: Network) -> tuple[Node, ...]:
    """The queries at END of two late heads; of smollm2-135m those of a23.h3 and a29.h1, its name movers."""
    places = ((model.n_layers * 7 // 9, 3), (model.n_layers - 1, 1))
    return tuple(Node("head", layer, head % model.n_heads, "end", "q") for layer, head in places)


def heads_to_logits(setting: Setting) -> Job:
    """Every head at END into the logits, by path patching."""
    model, prompts = setting.model, setting.prompts()
    operations = Operations(model, prompts).heads_to_logits()
    return Job(
        f"{model.n_layers * model.n_heads} heads → logits, {len(prompts)} prompts",
        partial(path_patch, model, prompts),
        Counted(lambda _: operations),
        lens_peer(model, prompts, Lens.heads_to_logits),
    )


def heads_to_queries(setting: Setting) -> Job:
    """Every head at END into the queries of two late heads."""
    model, prompts = setting.model, setting.prompts()
    receivers = late_queries(model)
    operations = Operations(model, prompts).heads_to_queries(receivers)
    names = " and ".join(f"a{node.layer}.h{node.head}" for node in receivers)
    return Job(
        f"{model.n_layers * model.n_heads} heads → queries of {names}, {len(prompts)} prompts",
        partial(path_patch, model, prompts, receivers=receivers),
        Counted(lambda _: operations),
        lens_peer(model, prompts, partial(Lens.heads_to_queries, receivers=receivers)),
    )


def activations(setting: Setting) -> Job:
    """The residual stream at every layer and named position, by activation patching."""
    model, prompts = setting.model, setting.prompts(SITE_PROMPTS)
    positions = tuple(prompts.positions)
    operations = Operations(model, prompts).sites(positions)
    return Job(
        f"residual stream, {model.n_layers} layers × {len(positions)} positions, {len(prompts)} prompts",
        partial(activation_patch, model, prompts),
        Counted(lambda _: operations),
        lens_peer(model, prompts, partial(Lens.sites, positions=positions)),
    )


def edges(setting: Setting) -> Job:
    """Every edge, estimated by one gradient."""
    model, prompts = setting.model, setting.prompts()
    plain = PlainPasses(model, prompts)

    def passes(_: Any) -> None:
        plain.forward(counterfactual=True)
        plain.backward()

    is_grouped = model.parts.n_kv_heads != model.n_heads
    return Job(
        f"all edges by EAP, {len(prompts)} prompts",
        partial(attribute_edges, model, prompts, method="eap"),
        Alternating(passes),
        Missing(NO_GROUPED_EDGES) if is_grouped else lens_peer(model, prompts, Lens.edges),
    )
