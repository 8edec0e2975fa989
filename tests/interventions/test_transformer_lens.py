"""A second library's numbers: TransformerLens hooks on the same weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from architectures import ARCHITECTURES, SHAPE, random_model
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models import sources
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

pytestmark = pytest.mark.filterwarnings("ignore")


class Lens:
    """TransformerLens around one tiny model."""

    def __init__(self, module, prompts: PromptSet, family: str) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = AutoTokenizer.from_pretrained(Path(sources.__file__).parent / "tiny")
        self.bridge = TransformerBridge.boot_transformers(family, hf_model=module, tokenizer=tokenizer, device="cpu")
        self.prompts, self.rows, self.end = prompts, torch.arange(len(prompts)), prompts.positions["end"]
        self.n_layers, self.n_heads = module.config.num_hidden_layers, module.config.num_attention_heads
        self.names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.n_layers)]

    def run(self, tokens, edits=None, keep=()):
        """LD, and what the named hooks saw; `edits` change values in place."""
        seen = {}

        def looking(name):
            # The hook itself may go by another name. A copy is what only the hook's own place goes on with.
            def look(value, hook):
                value = value.clone()
                if name in (edits or {}):
                    edits[name](value)
                if name in keep:
                    seen[name] = value
                return value

            return look

        hooks = [(name, looking(name)) for name in {*(edits or {}), *keep}]
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[self.rows, self.end]
        return logits[self.rows, self.prompts.answer] - logits[self.rows, self.prompts.foil], seen

    def path(self, layer: int, head: int, receiver: str | None, receiving: int, position: str):
        """Path patching of one head, at its position, into the logits or one hook of one head there."""
        at = self.prompts.positions[position]
        before, clean = self.run(self.prompts.clean, keep=self.names)
        _, other = self.run(self.prompts.counterfactual, keep=self.names)

        def freeze(name):
            def act(z):
                z.copy_(clean[name])
                if name == self.names[layer]:
                    z[self.rows, at, head] = other[name][self.rows, at, head]

            return act

        frozen, read = self.run(
            self.prompts.clean, {name: freeze(name) for name in self.names}, [receiver] if receiver else []
        )
        if receiver is None:
            return frozen - before

        def put(value):
            value[self.rows, at, receiving] = read[receiver][self.rows, at, receiving]

        return self.run(self.prompts.clean, {receiver: put})[0] - before


@pytest.fixture(params=["gpt2", "llama"])
def lens(request: pytest.FixtureRequest, named_prompts: PromptSet, monkeypatch) -> tuple[Lens, Network]:
    if request.param == "llama":
        # TransformerLens can patch a value of grouped queries only for all heads that share it.
        ungrouped = ARCHITECTURES["llama"].__class__(lambda: LlamaConfig(**SHAPE), "", {}, "")
        monkeypatch.setitem(ARCHITECTURES, "llama", ungrouped)
    network = build_network(random_model(request.param), None, request.param)
    return Lens(random_model(request.param), named_prompts, request.param), network


@torch.no_grad()
def test_heads_into_logits_queries_and_values_agree(lens, named_prompts: PromptSet):
    peer, network = lens
    logits = path_patch(network, named_prompts, senders="heads@end").by_head()
    queries = path_patch(network, named_prompts, senders="heads@end", receivers="a2.h1<q>@end").by_head()
    values = path_patch(network, named_prompts, senders="heads@b", receivers="a2.h3<v>@b").by_head()
    for layer in range(2):
        for head in range(4):
            slow = peer.path(layer, head, None, 0, "end")
            torch.testing.assert_close(logits[layer, head], slow, atol=1e-4, rtol=0)
            slow = peer.path(layer, head, "blocks.2.attn.hook_q", 1, "end")
            torch.testing.assert_close(queries[layer, head], slow, atol=1e-4, rtol=0)
            slow = peer.path(layer, head, "blocks.2.attn.hook_v", 3, "b")
            torch.testing.assert_close(values[layer, head], slow, atol=1e-4, rtol=0)
    assert all(each[:2].abs().amax() > 1e-2 for each in (logits, queries, values))


@torch.no_grad()
def test_activation_patching_of_z_and_of_the_residual_stream_agrees(lens, named_prompts: PromptSet):
    peer, network = lens
    heads = activation_patch(network, named_prompts, sites="heads@end").by_head()
    residual = activation_patch(network, named_prompts, sites="residual@each").effects.view(3, 3, -1)
    before, _ = peer.run(named_prompts.clean)
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    _, other = peer.run(named_prompts.counterfactual, keep=[*peer.names, *streams])
    for layer in range(3):
        for head in range(4):
            name = peer.names[layer]

            def put_head(z, name=name, head=head):
                z[peer.rows, peer.end, head] = other[name][peer.rows, peer.end, head]

            slow = peer.run(named_prompts.clean, {name: put_head})[0] - before
            torch.testing.assert_close(heads[layer, head], slow, atol=1e-4, rtol=0)
        for number, at in enumerate(named_prompts.positions.values()):
            name = streams[layer]

            def put_row(value, name=name, at=at):
                value[peer.rows, at] = other[name][peer.rows, at]

            slow = peer.run(named_prompts.clean, {name: put_row})[0] - before
            torch.testing.assert_close(residual[layer, number], slow, atol=1e-4, rtol=0)


def test_edge_attribution_on_gpt2_agrees(named_prompts: PromptSet):
    network = build_network(random_model("gpt2"), None, "gpt2")
    found = attribute_edges(network, named_prompts, method="eap", per_prompt=True)
    peer = Lens(random_model("gpt2"), named_prompts, "gpt2")
    for switch in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in"):
        getattr(peer.bridge, switch)(True)
    layers = range(3)
    outputs = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_result" for i in layers)]
    outputs += [f"blocks.{i}.mlp.hook_out" for i in layers]
    inputs = [f"blocks.{i}.attn.hook_{channel}_input" for i in layers for channel in "qkv"]
    inputs += [*(f"blocks.{i}.hook_mlp_in" for i in layers), "blocks.2.hook_resid_post"]
    with torch.no_grad():
        _, other = peer.run(named_prompts.counterfactual, keep=outputs)
    difference, seen = peer.run(named_prompts.clean, keep=[*outputs, *inputs])
    gradients = dict(zip(inputs, torch.autograd.grad(difference.sum(), [seen[name] for name in inputs]), strict=True))

    def written(node):
        if node.kind == "input":
            return other[outputs[0]] - seen[outputs[0]]
        name = f"blocks.{node.layer}." + ("mlp.hook_out" if node.kind == "mlp" else "attn.hook_result")
        change = other[name] - seen[name]
        return change if node.kind == "mlp" else change[:, :, node.head]

    def read(node):
        if node.kind == "logits":
            return gradients["blocks.2.hook_resid_post"]
        if node.kind == "mlp":
            return gradients[f"blocks.{node.layer}.hook_mlp_in"]
        return gradients[f"blocks.{node.layer}.attn.hook_{node.channel}_input"][:, :, node.head]

    reads = {node: read(node) for node in found.destinations}
    for u, source in enumerate(found.sources):
        change = written(source)
        for v, destination in enumerate(found.destinations):
            if found.exists[u, v]:
                slow = (change * reads[destination]).sum(dim=(1, 2))
                torch.testing.assert_close(found.per_prompt[u, v], slow, atol=1e-4, rtol=1e-4)
