"""TransformerLens with hooks, on the same weights: what people write today, one forward pass a head or place and step.

It works on a copy of the model, whose parts it exchanges for its own. A few heads or places are timed and scaled to
all; their effects are held against ours.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.bench.job import Missing, Peer, PeerTime
from neuroplast.bench.rate import timed
from neuroplast.components import READ_CHANNELS, Node
from neuroplast.errors import InputError, first_line
from neuroplast.interventions.edges import EdgeScores
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

TIMED = 2
"""Heads or places that are timed."""
NO_GROUPED_EDGES = (
    "TransformerLens gives grouped queries one key and one value input a group: edges into a single query head's key "
    "or value do not exist there"
)
NOT_INSTALLED = "TransformerLens is not installed: pip install 'neuroplast[peers]'"

Act = Callable[[Tensor], Tensor]
Measure = Callable[["Lens", Any], PeerTime]
"""Times one thing with TransformerLens; called with it and our result."""


def lens_peer(model: Network, prompts: PromptSet, measure: Measure) -> Peer | Missing:
    """TransformerLens as a row's peer, opened when it is measured; missing where it is not installed."""
    if find_spec("transformer_lens") is None:
        return Missing(NOT_INSTALLED)
    name = f"TransformerLens {version('transformer-lens')}"
    return Peer(name, lambda found: measure(Lens(model, prompts), found))


class Lens:
    """TransformerLens around a copy of a model, with both runs of some prompts."""

    @torch.no_grad()
    def __init__(self, model: Network, prompts: PromptSet) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        module = copy.deepcopy(model.module)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
                self.bridge: Any = TransformerBridge.boot_transformers(
                    model.name, hf_model=module, tokenizer=model.tokenizer, device=model.device
                )
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(f"TransformerLens cannot open {model.name!r}: {first_line(error)}") from error
        self.model, self.prompts = model, prompts.to(model.device)
        self.rows, self.end = torch.arange(len(prompts), device=model.device), self.prompts.positions["end"]
        self.z = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
        self.streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
        self.clean, self.other = self._seen(self.prompts.clean), self._seen(self.prompts.counterfactual)
        self.before = self._difference({})

    def heads_to_logits(self, found: Any) -> PeerTime:
        """Every head into the logits, with all others frozen."""
        return self._heads(found, self._to_logits, self.model.n_layers)

    def heads_to_queries(self, found: Any, receivers: Sequence[Node]) -> PeerTime:
        """Every head below the last receiver into some queries at END; the others cannot reach it."""
        last = max(node.layer or 0 for node in receivers)
        return self._heads(found, partial(self._to_queries, receivers=receivers), last)

    def sites(self, found: Any, positions: Sequence[str]) -> PeerTime:
        """The residual stream at every layer and position, patched one by one."""
        means = found.effects.view(self.model.n_layers, len(positions), -1).mean(dim=2)
        return self._few(means, lambda layer, number: self._site(layer, positions[number]), means.numel(), "places")

    def edges(self, found: EdgeScores) -> PeerTime:
        """All edges by one gradient (EAP), of a model whose heads have keys and values of their own."""
        scores: list[Tensor] = []
        for switch in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in"):
            getattr(self.bridge, switch)(True)
        seconds = timed(lambda: scores.append(self._edge_scores()), self.model)
        error = float((scores[0].cpu() - found.scores)[found.exists].abs().max())
        return PeerTime(seconds, "all edges", error)

    def _edge_scores(self) -> Float[Tensor, "source destination"]:
        layers = range(self.model.n_layers)
        outputs = [self.streams[0]]
        inputs: list[str] = []
        for layer in layers:
            outputs += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.mlp.hook_out"]
            inputs += [f"blocks.{layer}.attn.hook_{channel}_input" for channel in READ_CHANNELS]
            inputs.append(f"blocks.{layer}.hook_mlp_in")
        inputs.append(f"blocks.{layers[-1]}.hook_resid_post")
        with torch.no_grad():
            _, other = self._run(self.prompts.counterfactual, outputs)
        with torch.enable_grad():
            difference, clean = self._run(self.prompts.clean, [*outputs, *inputs])
            gradients = torch.autograd.grad(difference.sum(), [clean[name] for name in inputs])
        with torch.no_grad():
            # Heads, where there are some, stand before the width.
            written = torch.cat([_rows(other[name] - clean[name]) for name in outputs])
            return torch.cat([written @ _rows(each).T for each in gradients], dim=1) / len(self.prompts)

    def _run(self, tokens: Tensor, names: Sequence[str]) -> tuple[Float[Tensor, "prompt"], dict[str, Tensor]]:
        """The logit difference, and what some hooks saw, each a value of its own."""
        seen: dict[str, Tensor] = {}

        def look(value: Tensor, hook: Any, name: str) -> Tensor:
            seen[name] = value.clone()
            return seen[name]

        hooks = [(name, partial(look, name=name)) for name in names]
        logits = self.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[self.rows, self.end].float()
        return logits[self.rows, self.prompts.answer] - logits[self.rows, self.prompts.foil], seen

    @torch.no_grad()
    def _few(self, means: Float[Tensor, "one other"], run: Callable[[int, int], float], n: int, what: str) -> PeerTime:
        """Times those with the largest effects, and scales to all `n`."""
        few = min(TIMED, means.numel())
        places = [divmod(int(index), means.shape[1]) for index in means.abs().flatten().topk(few).indices]
        values: list[float] = []
        seconds = timed(lambda: values.extend(run(*place) for place in places), self.model)
        error = max(abs(float(means[place]) - value) for place, value in zip(places, values, strict=True))
        return PeerTime(seconds / few * n, f"{few} of {n} {what}", error)

    def _heads(self, found: Any, run: Callable[[int, int], float], layers: int) -> PeerTime:
        return self._few(found.by_head().mean(dim=2), run, layers * self.model.n_heads, "heads")

    def _seen(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the runs have that is patched: every head's value, and the residual stream."""
        kept: dict[str, Tensor] = {}
        hooks = [
            (name, lambda value, hook, name=name: kept.update({name: value.clone()}))
            for name in (*self.z, *self.streams)
        ]
        self.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept

    def _difference(self, hooks: Mapping[str, Act]) -> Float[Tensor, "prompt"]:
        """The logit difference on the clean prompts, with hooks."""
        listed = [(name, lambda value, hook, act=act: act(value)) for name, act in hooks.items()]
        logits = self.bridge.run_with_hooks(self.prompts.clean, fwd_hooks=listed)[self.rows, self.end].float()
        return logits[self.rows, self.prompts.answer] - logits[self.rows, self.prompts.foil]

    def _effect(self, hooks: Mapping[str, Act]) -> float:
        return float((self._difference(hooks) - self.before).mean())

    def _frozen(self, layer: int, head: int) -> dict[str, Act]:
        """Hooks that freeze every head and send one at END."""
        name, width = self.z[layer], self.model.d_head
        part = slice(head * width, (head + 1) * width)

        def send(_: Tensor) -> Tensor:
            z = self.clean[name].clone()
            z.flatten(2)[self.rows, self.end, part] = self.other[name].flatten(2)[self.rows, self.end, part]
            return z

        keep: dict[str, Act] = {each: lambda _, each=each: self.clean[each] for each in self.z}
        return keep | {name: send}

    def _to_logits(self, layer: int, head: int) -> float:
        return self._effect(self._frozen(layer, head))

    def _to_queries(self, layer: int, head: int, receivers: Sequence[Node]) -> float:
        read: dict[str, Tensor] = {}
        heads: dict[str, list[int]] = {}
        for node in receivers:
            heads.setdefault(f"blocks.{node.layer}.attn.hook_q", []).append(node.head or 0)

        def keep(query: Tensor, name: str) -> Tensor:
            read[name] = query.clone()
            return query

        def put(query: Tensor, name: str) -> Tensor:
            query = query.clone()
            for receiver in heads[name]:
                query[self.rows, self.end, receiver] = read[name][self.rows, self.end, receiver]
            return query

        self._difference(self._frozen(layer, head) | {name: partial(keep, name=name) for name in heads})
        return self._effect({name: partial(put, name=name) for name in heads})

    def _site(self, layer: int, position: str) -> float:
        name, at = self.streams[layer], self.prompts.positions[position]

        def put(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[self.rows, at] = self.other[name][self.rows, at]
            return stream

        return self._effect({name: put})


def _rows(values: Tensor) -> Float[Tensor, "part number"]:
    """A part a row: a head each, or the whole."""
    return values.movedim(2, 0).flatten(1) if values.ndim == 4 else values.flatten()[None]
