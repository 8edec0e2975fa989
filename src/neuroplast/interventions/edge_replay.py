"""Circuits of edges on one chunk of prompts, as changes that go up the layers of the counterfactual run.

The counterfactual prompts run once (`ChunkRuns`). A circuit is a copy of the prompts that goes up the layers as
*changes* of what the sources write there, in a window from the first token that differs to END. What a layer's
destinations read are matrix products (destinations × sources) of the changes. What reads no change is not computed: a
part without a path from the input or to the logits costs nothing, and circuits that differ from one that was run
(`CircuitState`) in some edges compute only what lies above these.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuroplast.components import READ_CHANNELS, ReadChannel
from neuroplast.interventions.chunks import Chunk, logit_difference, rows_at_once
from neuroplast.interventions.edges import EdgeGraph, Workspace
from neuroplast.models.attention import AttentionCall
from neuroplast.models.network import Network, replaced, weight_of
from neuroplast.models.readers import Projection
from neuroplast.models.recording import Place, Recording, Window, at_positions
from neuroplast.models.replay import QUERIES_A_BLOCK, Frame, record

RECORDED: tuple[Place, ...] = ("residual", "query", "key", "value", "z", "attention", "mlp")
"""What is kept of the counterfactual run."""
NUMBERS_A_PIECE = 2**18
"""Numbers that what heads read is normed by: a piece that stays in the processor's cache."""
EVERYWHERE, AT_END = slice(None), slice(-1, None)
"""Positions of a window."""


def width_of(graph: EdgeGraph, n_sources: int) -> int:
    """Residual streams that one copy holds whose changes come from `n_sources` sources."""
    return n_sources + 3 * graph.n_heads + 4


class ReadMap:
    """The linear map of a layer's heads' queries, keys or values, by head."""

    def __init__(self, projection: Projection, model: Network) -> None:
        self.linear = projection.linear
        self.outputs = projection.outputs.flatten()
        self._projection = projection
        nothing = torch.zeros(model.d_model, device=model.device, dtype=model.module.dtype)
        with torch.no_grad():
            self.bias: Float[Tensor, "kv_head d_head"] = projection.made_of(nothing)

    @property
    def weight(self) -> Float[Tensor, "kv_head d_head d_model"]:
        """A copy of the weight, not kept: all layers together are a good part of the model."""
        return self._projection.weight


@dataclass(frozen=True)
class CircuitState:
    """A circuit's run on a chunk of prompts."""

    kept: Bool[Tensor, "source destination"]
    """Its edges."""
    sources: Int[Tensor, "some"]
    """The sources that write otherwise than on the counterfactual prompts."""
    changes: Float[Tensor, "some prompt window d_model"]
    """What each writes more: an MLP as it reaches the residual stream, a head before any norm behind the attention."""
    difference: Float[Tensor, "prompt"]
    """LD."""
    heads: Mapping[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor, Tensor]])
    """By layer, what each query head reads as its query, key and value, position-encoded, each (prompt, window, head,
    d_head); where it is missing, what it reads on the counterfactual prompts."""


class ChunkRuns:
    """Circuits on one chunk of prompts, all on the same counterfactual run."""

    @torch.no_grad()
    def __init__(
        self,
        model: Network,
        chunk: Chunk,
        graph: EdgeGraph,
        read: Sequence[Mapping[ReadChannel, ReadMap]],
        workspace: Workspace,
    ) -> None:
        self.model, self.chunk, self.graph, self.read, self.workspace = model, chunk, graph, read, workspace
        self.recording: Recording = record(model, chunk.prompts.counterfactual, RECORDED)
        changed = chunk.changed
        first = torch.where(changed.any(dim=1), changed.int().argmax(dim=1), chunk.end)
        self.window = Window(first, chunk.end)
        self.frame = Frame(model, self.recording, self.window)

    def at(self, values: Float[Tensor, "prompt pos *rest"]) -> Float[Tensor, "prompt window *rest"]:
        """Recorded values in the window."""
        return at_positions(values, self.window.positions)

    @torch.no_grad()
    def counterfactual(self) -> CircuitState:
        """The run with no edges: only the input writes otherwise."""
        clean = self.model.start(self.chunk.prompts.clean).residual
        change = self.at(clean - self.recording.residual[0])[None]
        final = self.at(self.recording.residual[self.model.n_layers])[:, AT_END]
        difference = logit_difference(self.model, final, self.chunk.prompts)[:, 0]
        return CircuitState(torch.zeros_like(self.graph.exists), torch.zeros(1, dtype=torch.long), change, difference)

    @torch.no_grad()
    def run(
        self,
        base: CircuitState,
        kept: Sequence[Bool[Tensor, "source destination"]],
        budget: int,
        tick: Callable[[], None] = lambda: None,
    ) -> Float[Tensor, "copy prompt"]:
        """LD of some circuits.

        Args:
            base: a run that they may share parts with.
            kept: their edges.
            budget: residual streams that the copies may hold together.
            tick: called after each circuit.
        """
        masks = torch.stack(list(kept))
        read, written = self.graph.changes(masks, base.kept)
        found = base.difference.repeat(len(masks), 1)
        rows = max(1, rows_at_once(self.model) // self.window.positions.numel())
        first = 0
        while first < len(masks):
            last = first + 1
            while last < len(masks) and last - first < rows and self._held(written[first : last + 1]) <= budget:
                last += 1
            part = slice(first, last)
            found[part] = _Copies(self, base, masks[part], read[part], written[part]).run()
            for _ in range(first, last):
                tick()
            first = last
        return found

    def _held(self, written: Bool[Tensor, "copy source"]) -> int:
        return len(written) * width_of(self.graph, int(written.any(dim=0).sum()))

    @torch.no_grad()
    def follow(self, base: CircuitState, kept: Bool[Tensor, "source destination"]) -> CircuitState:
        """The run of one circuit, to go on from."""
        read, written = self.graph.changes(kept[None], base.kept)
        copies = _Copies(self, base, kept[None], read, written, keep=True)
        difference = copies.run()[0]
        stays = ~written[0][base.sources]
        sources = torch.cat([base.sources[stays], copies.slots])
        changes = torch.cat([base.changes[stays.to(base.changes.device)], copies.own[0]])
        return CircuitState(kept, sources, changes, difference, {**base.heads, **(copies.heads or {})})

    def heads(self, base: CircuitState, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What each query head reads in a run, as `CircuitState.heads` has it."""
        if layer in base.heads:
            return base.heads[layer]
        kept = (self.recording.query[layer], self.recording.key[layer], self.recording.value[layer])
        query, key, value = (self.at(each.transpose(1, 2)) for each in kept)
        groups = query.shape[2] // key.shape[2]
        return query, key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)

    def behind_attention(
        self, layer: int, change: Float[Tensor, "pair prompt at d_model"], at: slice
    ) -> Float[Tensor, "pair prompt at d_model"]:
        """What the residual stream gets more when the attention's output changes."""
        residual, attention, mlp, after = (
            self.at(each)[:, at].expand(change.shape)
            for each in (
                self.recording.residual[layer],
                self.recording.attention[layer],
                self.recording.mlp[layer],
                self.recording.residual[layer + 1],
            )
        )
        attention = (attention + change).flatten(0, 1)
        out = self.model.run_layer(layer, residual.flatten(0, 1), attention=attention, mlp=mlp.flatten(0, 1))
        return out.view(change.shape) - after


class _Copies:
    """Some circuits on their way up the layers; a pair is a copy and a destination."""

    def __init__(
        self,
        runs: ChunkRuns,
        base: CircuitState,
        kept: Bool[Tensor, "copy source destination"],
        read: Bool[Tensor, "copy destination"],
        written: Bool[Tensor, "copy source"],
        keep: bool = False,
    ) -> None:
        self.runs, self.model, self.graph, self.base = runs, runs.model, runs.graph, base
        self.kept, self.read, self.written = kept, read, written
        self.slots = written.any(dim=0).nonzero()[:, 0]
        """The sources that write otherwise than in the base run."""
        self.slot_of = {source: slot for slot, source in enumerate(self.slots.tolist())}
        shape = (len(kept), len(self.slots), *base.changes.shape[1:])
        self.own = self.runs.workspace.take("own", base.changes, shape)
        """What they write more than on the counterfactual prompts, (copy, slot, prompt, window, d_model)."""
        for copy, source in (~written[:, self.slots]).nonzero().tolist():
            self.own[copy, source] = 0
        self.heads: dict[int, tuple[Tensor, Tensor, Tensor]] | None = {} if keep else None
        """What the heads of the first copy read, as `CircuitState.heads` has it, where it is to be kept."""

    def run(self) -> Float[Tensor, "copy prompt"]:
        """LD."""
        for layer in range(self.model.n_layers):
            self._run_heads(layer)
            self._run_mlp(layer)
        found = self.base.difference.repeat(len(self.kept), 1)
        copies = self.read[:, -1].nonzero()[:, 0]
        if len(copies):
            change = self._arriving(copies, torch.full_like(copies, -1), len(self.graph.sources), AT_END)[:, :, 0]
            final = self.runs.at(self.runs.recording.residual[self.model.n_layers])[:, -1] + change
            found[copies] = logit_difference(self.model, final.transpose(0, 1), self.runs.chunk.prompts).T
        return found

    # What arrives at destinations.

    def _arriving(
        self, copies: Int[Tensor, "pair"], destinations: Int[Tensor, "pair"], below: int, at: slice
    ) -> Float[Tensor, "pair prompt at d_model"]:
        """What each destination reads more than on the counterfactual prompts, from the first `below` sources."""
        chosen = torch.arange(len(self.graph.sources)) < below
        if self.model.adds_attention:
            return self._sum(copies, destinations, chosen, at, "read")
        heads = torch.tensor([node.kind == "head" for node in self.graph.sources])
        found = self._sum(copies, destinations, chosen & ~heads, at, "read")
        for layer in range(self.model.n_layers):
            mine = torch.zeros_like(chosen)
            mine[self.graph.heads_written(layer)] = True
            if bool((self.kept[copies, :, destinations] & mine & chosen).any()):
                change = self._sum(copies, destinations, mine & chosen, at, "read of heads")
                found += self.runs.behind_attention(layer, change, at)
        return found

    def _sum(
        self,
        copies: Int[Tensor, "pair"],
        destinations: Int[Tensor, "pair"],
        chosen: Bool[Tensor, "source"],
        at: slice,
        name: str,
    ) -> Float[Tensor, "pair prompt at d_model"]:
        """The sum of the changes over the kept edges from some sources, in a buffer of the workspace."""
        shape = (len(copies), *self.base.changes[0, :, at].shape)
        found = self.runs.workspace.take(name, self.own, (len(copies), math.prod(shape[1:])))
        kept, written = self.kept[copies, :, destinations] & chosen, self.written[copies]
        as_in_base, otherwise = (kept & ~written)[:, self.base.sources], (kept & written)[:, self.slots]
        if bool(as_in_base.any()):
            # Copies mostly keep the same of these edges: each sum is made once.
            rows, which = as_in_base.unique(dim=0, return_inverse=True)
            torch.index_select(_product(rows, self.base.changes, at), 0, which.to(found.device), out=found)
        else:
            found.zero_()
        for copy, part in _by_copy(copies):
            if bool(otherwise[part].any()):
                _product(otherwise[part], self.own[copy], at, onto=found[part])
        return found.view(shape)

    # What a layer makes of it.

    def _run_heads(self, layer: int) -> None:
        columns, n_heads = self.graph.heads_read(layer), self.model.n_heads
        members = self.read[:, columns].any(dim=1).nonzero()[:, 0]
        if not len(members):
            return
        read = self.read[members, columns]
        member, column = read.nonzero(as_tuple=True)
        below = self.graph.heads_written(layer).start
        x = self._arriving(members[member], columns.start + column, below, EVERYWHERE)
        residual = self.runs.at(self.runs.recording.residual[layer])
        for piece in x.split(max(1, NUMBERS_A_PIECE // residual.numel())):
            piece.copy_(self.model.read_attention(layer, (piece + residual).flatten(0, 1)).view(piece.shape))
        made: dict[ReadChannel, Tensor] = {}
        for index, channel in enumerate(READ_CHANNELS):
            weight, bias = self.runs.read[layer][channel].weight, self.runs.read[layer][channel].bias
            values = x.new_zeros(x.shape[1], len(members), x.shape[2], n_heads, weight.shape[1])
            for head in range(n_heads):
                mine = (column == index * n_heads + head).nonzero()[:, 0]
                if len(mine):
                    row = head * len(weight) // n_heads
                    values[..., head, :][:, member[mine]] = (x[mine] @ weight[row].T + bias[row]).transpose(0, 1)
            made[channel] = values
        self._attend(layer, members, made, read.unflatten(1, (3, -1)))

    def _attend(
        self,
        layer: int,
        members: Int[Tensor, "member"],
        made: Mapping[ReadChannel, Float[Tensor, "prompt member window head d"]],
        read: Bool[Tensor, "member channel head"],
    ) -> None:
        """Attention of some copies; where a head's q, k or v changes, from what its projection `made`."""
        shared = self.runs.heads(self.base, layer)
        found = [each[:, None].expand(-1, len(members), -1, -1, -1) for each in shared]
        groups = self.model.n_heads // self.model.parts.n_kv_heads
        call: AttentionCall | None = None
        for turn in range(groups):
            # Query heads that share a key take turns in its place.
            mine = slice(turn, None, groups)
            call = self._encode(layer, made, mine)
            encoded = (call.query, call.key, call.value)
            for index, (channel, values) in enumerate(zip(READ_CHANNELS, encoded, strict=True)):
                if channel == "q" and turn:
                    continue
                heads = EVERYWHERE if channel == "q" else mine
                new = values.transpose(1, 2).unflatten(1, (len(members), -1))
                where = read[:, index, heads].to(new.device)[None, :, None, :, None]
                former = found[index]
                if turn == 0:
                    found[index] = former = former.clone()
                former[..., heads, :] = torch.where(where, new, former[..., heads, :])
        assert call is not None
        if self.heads is not None:
            self.heads[layer] = (found[0][:, 0], found[1][:, 0], found[2][:, 0])
        z = self._values(layer, call, *found) - self.runs.at(self.runs.recording.z[layer])[:, None]
        weights, first = self.model.head_weights(layer), self.graph.heads_written(layer).start
        for head in range(self.model.n_heads):
            mine = self.written[members, first + head].nonzero()[:, 0]
            if len(mine):
                sent = z[:, mine.to(z.device), :, head] @ weights[head]
                self.own[:, self.slot_of[first + head]][members[mine]] = sent.transpose(0, 1)

    def _encode(
        self, layer: int, made: Mapping[ReadChannel, Float[Tensor, "prompt member window head d"]], turn: slice
    ) -> AttentionCall:
        """The layer's own way from the outputs of its projections to queries, keys and values."""
        n, copies, width = made["q"].shape[:3]
        answers: dict[torch.nn.Module, Tensor] = {}
        for channel, values in made.items():
            projection = self.runs.read[layer][channel]
            own = values if channel == "q" else values[..., turn, :]
            if projection.linear not in answers:
                d_out = weight_of(projection.linear).shape[1]
                answers[projection.linear] = values.new_zeros(n, copies * width, d_out)
            answers[projection.linear][..., projection.outputs] = own.flatten(1, 2).flatten(2)
        nothing = self.own.new_zeros(1, 1, 1).expand(n, copies * width, self.model.d_model)
        with ExitStack() as stack:
            for linear, answer in answers.items():
                stack.enter_context(replaced(linear, lambda *_, answer=answer, **__: answer))
            return self.model.read_heads(layer, nothing, self.runs.frame.calls.at(layer, copies))

    def _values(
        self, layer: int, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
    ) -> Float[Tensor, "prompt member window head d_head"]:
        """Each head's value z from its query, and its keys and values, those before the window as recorded."""
        frame, (copies, width) = self.runs.frame, query.shape[1:3]
        past_key, past_value = (call.ungroup(each) for each in frame.past(layer))
        together = max(1, QUERIES_A_BLOCK // width)
        parts: list[Tensor] = []
        for first in range(0, copies, together):
            queries, keys, values = (
                each[:, first : first + together].flatten(1, 2).transpose(1, 2) for each in (query, key, value)
            )
            seen_keys = torch.cat([past_key, keys], dim=2)
            seen_values = torch.cat([past_value, values], dim=2)
            mask = frame.mask(layer, queries.shape[2] // width, width)
            z, _ = call.attend(queries, seen_keys, seen_values, mask)
            parts.append(z.unflatten(1, (-1, width)))
        return torch.cat(parts, dim=1)

    def _run_mlp(self, layer: int) -> None:
        copies = self.read[:, self.graph.mlp_reads(layer)].nonzero()[:, 0]
        if not len(copies):
            return
        model, runs, recording = self.model, self.runs, self.runs.recording
        source = self.graph.mlp_written(layer)
        change = self._arriving(copies, torch.full_like(copies, self.graph.mlp_reads(layer)), source, EVERYWHERE)
        residual = runs.at(recording.residual[layer])
        attention = runs.at(recording.attention[layer]).expand(change.shape).flatten(0, 1)
        answers: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            answers.append(output)
            return output

        with model.edited_mlp(layer, keep):
            model.run_layer(layer, (residual + change).flatten(0, 1), attention=attention)
        if model.adds_attention:
            sent = answers[0].view(change.shape) - runs.at(recording.mlp[layer])
        else:
            same = residual.expand(change.shape).flatten(0, 1)
            out = model.run_layer(layer, same, attention=attention, mlp=answers[0].view(same.shape))
            sent = out.view(change.shape) - runs.at(recording.residual[layer + 1])
        self.own[:, self.slot_of[source]][copies] = sent


def _by_copy(copies: Int[Tensor, "pair"]) -> list[tuple[int, slice]]:
    """Each copy with its pairs, which stand in the order of the copies."""
    numbers, counts = copies.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(n, slice(end - count, end)) for n, count, end in zip(numbers.tolist(), counts.tolist(), ends, strict=True)]


def _product(
    rows: Bool[Tensor, "pair source"],
    changes: Float[Tensor, "source prompt window d_model"],
    at: slice,
    onto: Float[Tensor, "pair number"] | None = None,
) -> Float[Tensor, "pair number"]:
    """The sums of some changes, as a matrix product over the sources that any row takes; added to `onto` in place."""
    used = rows.any(dim=0).nonzero()[:, 0]
    span = slice(int(used[0]), int(used[-1]) + 1)
    if 2 * len(used) < span.stop - span.start:
        picked, columns = changes[used.to(changes.device)], rows[:, used]
    else:
        picked, columns = changes[span], rows[:, span]
    columns, picked = columns.to(changes.device, changes.dtype), picked[:, :, at].flatten(1)
    return columns @ picked if onto is None else onto.addmm_(columns, picked)
