"""How much arithmetic results need: the multiplications and additions of their matrix products, and nothing else.

A product of a row with a weight matrix of n numbers counts 2n operations. No norms, no softmax, no attention between
positions, no reading or writing of memory. `docs/performance.md` derives the counts; where a position's share is not
worth a formula it is left out, so that a count is never too large.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuroplast.bench.rate import linear_weights
from neuroplast.components import Node, parse_node
from neuroplast.interventions.chunks import build_chunk
from neuroplast.interventions.selection import position_mask
from neuroplast.models.network import Network, unembedding_of
from neuroplast.tasks.prompts import PromptSet
from neuroplast.training.data import Example


def weights_of(parts: Iterable[nn.Module]) -> int:
    """Numbers in all linear maps under some modules: half the operations that a row costs."""
    return sum(weight.numel() for part in parts for weight in linear_weights(part))


class Operations:
    """The operations of results of one model on some prompts."""

    def __init__(self, model: Network, prompts: PromptSet) -> None:
        self.model, self.prompts = model, prompts
        self.heads = model.n_heads * len(prompts)
        """Copies of the prompts in which one head of a layer is changed."""
        self.tokens = int((prompts.positions["end"] + 1).sum())
        """Tokens up to END, without padding."""
        self.layer = [weights_of([layer]) for layer in model.layers]
        """Weights of each layer."""
        attention = [weights_of([attention]) for attention in model.attentions]
        self.mlp = [whole - own for whole, own in zip(self.layer, attention, strict=True)]
        """Weights of each layer's MLP."""
        self.head_out = model.d_head * model.d_model
        """Weights of one head's output projection; or of its query's map."""
        self.reads = [own - model.n_heads * self.head_out for own in attention]
        """Weights of each layer's queries, keys and values."""
        self.chunk = build_chunk(prompts, torch.arange(len(prompts)), torch.device("cpu"))

    def run(self, layers: int) -> float:
        """A forward pass over every token, up to a layer."""
        return 2 * self.tokens * sum(self.layer[:layers])

    def read_out(self, rows: int) -> float:
        """Two logits a row."""
        return 2 * rows * 2 * self.model.d_model

    def heads_to_logits(self) -> float:
        """Two runs, every head's row up to the top, two logits a row."""
        layers = self.model.n_layers
        return 2 * self.run(layers) + self._frozen(layers) + self.read_out(layers * self.heads)

    def heads_to_queries(self, receivers: Sequence[Node]) -> float:
        """Every head's row up to some heads' queries at END, and one-token suffixes from there."""
        top = max(node.layer or 0 for node in receivers)
        return self.run(self.model.n_layers) + self.run(top) + self._into(receivers)

    def sites(self, positions: Iterable[str]) -> float:
        """Two runs, and the residual stream patched at every layer and position: windows from there to END."""
        layers = self.model.n_layers
        total = self.run(layers) + self.run(layers - 1)
        for span in map(self._span, positions):
            total += sum(self._suffix(layer, span) for layer in range(layers)) + self.read_out(layers * span.prompts)
        return total

    def circuits(self, sets: Sequence[Collection[Node]]) -> float:
        """One run with all heads knocked out, and each circuit's positions, and END, from its first layer up."""
        queries = self.model.n_layers * self.model.n_heads * self.head_out
        total = 2 * self.tokens * (sum(self.layer) - queries)
        ends, last = len(self.prompts), self.model.n_layers - 1
        for nodes in sets:
            where = {node: position_mask(self.prompts, node.position) for node in nodes}
            rows = int(torch.stack([*where.values(), position_mask(self.prompts, "end")]).any(dim=0).sum())
            first = min(node.layer or 0 for node in nodes)
            # What the heads of the first layer read is as it was: they give it, and the MLP takes it.
            total += 2 * sum(int(where[node].sum()) for node in nodes if node.layer == first < last) * self.head_out
            total += 2 * (rows if first < last else ends) * self.mlp[first]
            if first < last:
                total += 2 * (rows * sum(self.layer[first + 1 : last]) + ends * self.layer[last])
        return total + self.read_out(len(sets) * ends)

    def discovery(self, steps: Sequence[Mapping[str, Any]]) -> float:
        """Two runs, and of every step of a discovery without screening: all heads into its receivers together, and the
        heads that were found into each of them.

        Args:
            steps: the log, as a circuit's provenance has it.
        """
        layers, heads = self.model.n_layers, self.model.n_layers * self.model.n_heads
        total = 2 * self.run(layers)
        for step in steps:
            receivers = [parse_node(name) for name in step["receivers"]]
            if receivers[0].kind == "logits":
                # Movers are left out once they are knocked out; they are late, so less than their part is counted.
                whole = self._frozen(layers) + self.read_out(layers * self.heads)
                total += whole * step["candidates"] / heads
                continue
            total += self._into(receivers)
            found, span = [parse_node(name) for name in step["found"]], self._span(receivers[0].position)
            if len(receivers) > 1:
                pairs = ((sender, node) for sender in found for node in receivers if sender.depth < node.depth)
                total += sum(self._suffix((node.layer or 0) + 1, span) for _, node in pairs)
        return total

    def _frozen(self, top: int, position: str | None = "end") -> float:
        """All heads below a layer, as rows that go up to it: MLPs, and each head's own output once."""
        rows = self.model.n_heads * self._span(position).rows
        return sum(2 * rows * ((layer + 1) * self.mlp[layer] + self.head_out) for layer in range(top))

    def _into(self, receivers: Sequence[Node]) -> float:
        """All heads into some heads' queries, keys and values at one position, and from there to END."""
        position, layers = receivers[0].position, self.model.n_layers
        span, at = self._span(position), [node.layer or 0 for node in receivers]
        total, alive, born = self._frozen(max(at), position), 0, 0
        for layer in range(min(at), layers):
            total += (alive - born) * self._layer(layer, span, is_first=False)
            total += born * self._layer(layer, span, is_first=True)
            born = 0
            if layer in at:
                # What each sender below gives the receivers; where it first reaches one here, its output and the MLP.
                senders = layer * self.model.n_heads
                total += 2 * senders * at.count(layer) * span.rows * self.head_out
                born, alive = senders - alive, senders
                total += 2 * born * span.rows * (self.head_out + self.mlp[layer])
        return total + self.read_out(alive * span.prompts)

    def _suffix(self, layer: int, span: "_Span") -> float:
        """One copy of the prompts, changed at a position, from a layer up."""
        return sum(self._layer(each, span, is_first=each == layer) for each in range(layer, self.model.n_layers))

    def _layer(self, layer: int, span: "_Span", *, is_first: bool) -> float:
        """One layer of a copy: its window, of which the last layer needs END alone.

        In the first layer above a change only the position itself has other queries, keys and values.
        """
        is_last = layer == self.model.n_layers - 1
        tokens = span.prompts if is_last else span.window
        reading = tokens
        if is_first and span.rows < span.window:
            reading = 0 if is_last else span.rows
        return 2 * (tokens * (self.layer[layer] - self.reads[layer]) + reading * self.reads[layer])

    def _span(self, position: str | None) -> "_Span":
        where = self.chunk.where(position)
        there = where.any(dim=1)
        first = where.int().argmax(dim=1)
        return _Span(int(there.sum()), int(where.sum()), int((self.chunk.end + 1 - first)[there].sum()))


@dataclass(frozen=True)
class _Span:
    """Where a change at a position can be, over all prompts."""

    prompts: int
    """Prompts where the two of a pair can differ there."""
    rows: int
    """Tokens at the position itself."""
    window: int
    """Tokens from there to END."""


def training_operations(model: Network, examples: Sequence[Example]) -> float:
    """Training on examples: three times the products of a forward pass, with the unembedding at the target alone.

    A backward pass makes two products of each of the forward pass: the gradient of the input and of the weights.
    """
    tokens = sum(len(example.tokens) for example in examples)
    unembedding = unembedding_of(model.module).weight.numel()
    return 3 * 2 * (tokens * weights_of(model.layers) + len(examples) * unembedding)
