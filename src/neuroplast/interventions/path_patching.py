"""Path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1 and appendix B), general and exact.

A. Run the counterfactual prompts. B. Run the clean prompts. C. The clean prompts with every head frozen to B,
except the sender, which takes its value from A at its position; MLPs and norms recompute; keep what the receivers
read. D. The clean prompts with only the receivers set to what C kept, everything after them free. The effect is
LD(D) - LD(B). For the logits at END, C is the answer already.

Steps here: record A and B once. In C all attention is frozen, so nothing moves between positions: a sender's copy of
the prompts is a row at each position that a receiver reads, it begins at the sender's layer and goes up only to
the last receiver. In D a copy is the window from the first receiver's position to END, it begins at the first
receiver that its sender reaches, and sees the recorded keys and values before it (`neuroplast.models.replay`). With
`mlps="frozen"` C keeps the MLPs of B too: only direct paths are left, and the receivers' inputs are sums.

With heads knocked out underneath, A, B and D are runs of the model without them.

Sign: effect = LD(patched) - LD(clean), in logits; a negative effect says that the sender helps the task, along this
path. Deviation from the paper: the score is not divided by LD(clean); divide by `clean` for that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import unknown_name
from neuroplast.interventions.chunks import Chunk, Progress, Size, copies_at_once, in_prompt_chunks
from neuroplast.interventions.effects import Effects
from neuroplast.interventions.knockout import build_knockout
from neuroplast.interventions.pairs import Pair, Pairs, columns_of, recorded_bytes
from neuroplast.interventions.selection import Group, Selection, select_receivers, select_senders
from neuroplast.models.network import Network
from neuroplast.models.recording import Edit, Place, at_positions
from neuroplast.models.replay import Calls, Copies, Frame, admit, run_frozen, walk_free
from neuroplast.tasks.prompts import PromptSet

MLPS = ("live", "frozen")
READ_PLACES: Mapping[str | None, Place] = {"q": "query", "k": "key", "v": "value", None: "mlp_input"}
"""Where a receiver reads, by its channel; None is an MLP's."""


def path_patch(
    model: Network,
    prompts: PromptSet,
    *,
    senders: Selection = "heads",
    receivers: Selection = "logits",
    mlps: str = "live",
    knocked_out: Selection = (),
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Path-patches every sender into the receivers, exactly.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        senders: `heads`, `mlps`, `input`, `all`, or nodes and groups, such as `a9.h1@s2, a0.h1+m0`; each is patched
            alone, at its position or at all.
        receivers: `logits`, or nodes that are set together, such as `a23.h3<q>@end`: heads' q, k and v, and MLPs.
        mlps: between sender and receivers, MLPs recompute (`live`, the reference) or keep their clean outputs
            (`frozen`: direct paths only).
        knocked_out: heads that are knocked out underneath (`neuroplast.interventions.knockout`).
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Returns:
        Effects with shape (sender, prompt); `by_head` makes a grid of them.

    Raises:
        InputError: for a name that is none, a part or a position that is not there, or a budget that is too small.
    """
    (found,) = patch_paths(
        model,
        prompts,
        [(senders, receivers)],
        mlps=mlps,
        knocked_out=knocked_out,
        memory=memory,
        progress=progress,
    )
    return found


def patch_paths(
    model: Network,
    prompts: PromptSet,
    paths: Sequence[tuple[Selection, Selection]],
    *,
    mlps: str = "live",
    knocked_out: Selection = (),
    reference: PromptSet | None = None,
    apart: bool = False,
    pairs: Pairs | None = None,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> list[Effects]:
    """Several path patchings that share their two runs of the prompts.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        paths: senders and receivers of each, as `path_patch` takes them.
        mlps: as there; likewise `knocked_out`, `memory` and `progress`.
        knocked_out: heads that are knocked out underneath.
        reference: prompts over which knocked-out heads are averaged; None takes `prompts`.
        apart: set each of the receivers alone, not all together; what senders change on the way is computed once.
        pairs: runs to share with other calls on the same prompts, from heads, with nothing knocked out.
        memory: bound on the process's memory.
        progress: called with (steps done, steps in all).

    Returns:
        Effects with shape (sender, prompt), one for each pair, or one for each receiver of each pair.

    Raises:
        InputError: as `path_patch`.
    """
    if mlps not in MLPS:
        raise unknown_name("treatment of MLPs", mlps, MLPS)
    chosen = [
        (select_senders(senders, model, prompts), select_receivers(receivers, model, prompts))
        for senders, receivers in paths
    ]
    if mlps == "frozen":
        model.require_mlps()
    knockout = build_knockout(model, prompts, knocked_out, reference=reference, memory=memory)
    places = places_for([targets for _, targets in chosen], [group for groups, _ in chosen for group in groups], mlps)
    rows = [
        (groups, each, torch.zeros(len(groups), len(prompts)))
        for groups, targets in chosen
        for each in ([(node,) for node in targets] if apart else [targets])
    ]
    clean, counterfactual = torch.zeros(len(prompts)), torch.zeros(len(prompts))

    def work(chunk: Chunk, copies: int, tick: Callable[[], None]) -> None:
        edits = knockout.edits(model, chunk)
        shares = pairs is not None and not edits and places[0] <= pairs.PLACES[0] and places[1] <= pairs.PLACES[1]
        pair = pairs.of(chunk) if pairs is not None and shares else Pair(model, chunk, *places, edits=edits)
        clean[chunk.rows], counterfactual[chunk.rows] = pair.clean.cpu(), pair.counterfactual.cpu()
        number = 0
        for groups, targets in chosen:
            for first in range(0, len(groups), copies):
                part = groups[first : first + copies]
                patch = PathPatch(pair, part, targets, mlps, edits, tick)
                for offset, found in enumerate(patch.effects_apart() if apart else [patch.effects()]):
                    rows[number + offset][2][first : first + len(part), chunk.rows] = found.T.cpu()
            number += len(targets) if apart else 1

    sizes = [size_of_paths(model, prompts, targets, places, len(groups)) for groups, targets in chosen]
    size = max(sizes, key=lambda each: each.copies * each.copy)
    steps = sum(model.n_layers * (1 if targets[0].kind == "logits" else 2) for _, targets in chosen)
    in_prompt_chunks(model, prompts, size, work, steps, memory=memory, progress=progress)
    return [
        Effects("path", groups, targets, each, clean, counterfactual, mlps=mlps, knocked_out=knockout.heads)
        for groups, targets, each in rows
    ]


def places_for(
    receivers: Iterable[Sequence[Node]], senders: Iterable[Group], mlps: str
) -> tuple[set[Place], set[Place]]:
    """What must be recorded of the clean and of the counterfactual run."""
    base: set[Place] = {"residual", "attention", "z"}
    source: set[Place] = {"z"}
    nodes = [node for group in receivers for node in group]
    if any(node.kind != "logits" for node in nodes):
        base |= {"key", "value"}
    if any(node.channel == "q" for node in nodes):
        base.add("query")
    if mlps == "frozen" or any(node.kind == "mlp" for group in senders for node in group):
        base.add("mlp")
        source.add("mlp")
    return base, source


def size_of_paths(
    model: Network,
    prompts: PromptSet,
    receivers: Sequence[Node],
    places: tuple[set[Place], set[Place]],
    senders: int,
) -> Size:
    """What path patching holds, a prompt."""
    width = prompts.width
    columns = 1 if receivers[0].kind == "logits" else len({node.position for node in receivers})
    if any(node.position is None and node.kind != "logits" for node in receivers):
        columns = width
    window = 0 if receivers[0].kind == "logits" else width
    read = [model.d_model if node.kind == "mlp" else model.d_head for node in receivers if node.kind != "logits"]
    # Twice, because a layer's rows exist as what enters and what leaves.
    copy = 2 * model.d_model * (columns + window) + columns * sum(read)
    return Size(recorded_bytes(model, width, places), copy * model.module.dtype.itemsize, senders)


class PathPatch:
    """Path patching of some senders into one set of receivers, on one chunk of prompts."""

    def __init__(
        self,
        pair: Pair,
        senders: Sequence[Group],
        receivers: Sequence[Node],
        mlps: str = "live",
        edits: Mapping[int, Sequence[Edit]] | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._pair, self._model, self._receivers, self._mlps = pair, pair.model, receivers, mlps
        self._edits, self._tick, self._n_senders = edits or {}, tick, len(senders)
        self._to_logits = receivers[0].kind == "logits"
        self._top = self._model.n_layers if self._to_logits else max(node.layer or 0 for node in receivers)
        read = torch.stack([pair.chunk.where(node.position) for node in receivers]).any(dim=0)
        self._columns = columns_of(read, pair.chunk.end)
        self._window = pair.window(read)
        self._limit = copies_at_once(self._model, self._columns)
        self._window_limit = copies_at_once(self._model, self._window.positions)
        self._sends = self._find_sends(senders)

    def _find_sends(self, senders: Sequence[Group]) -> dict[int, dict[Node, Bool[Tensor, "prompt column"]]]:
        """By the sender's number, the parts that it replaces and at which columns; only what reaches a receiver."""
        deepest = max(node.depth for node in self._receivers)
        where = {
            position: self._pair.chunk.where(position).gather(1, self._columns)
            for position in {node.position for group in senders for node in group}
        }
        stands = {position: bool(mask.any()) for position, mask in where.items()}
        sends: dict[int, dict[Node, Tensor]] = {}
        for number, group in enumerate(senders):
            for node in group:
                if node.depth < deepest and stands[node.position]:
                    parts, mask = sends.setdefault(number, {}), where[node.position]
                    parts[node.at(None)] = mask | parts[node.at(None)] if node.at(None) in parts else mask
        return sends

    @torch.no_grad()
    def effects(self) -> Float[Tensor, "prompt sender"]:
        """LD(patched) - LD(clean), the receivers set together."""
        if not self._sends:
            return self._differences([])
        walk = self._walk_live if self._mlps == "live" else self._walk_direct
        if self._to_logits:
            return self._differences(walk({}))
        return self._differences(self._walk_free(self._read(walk)))

    @torch.no_grad()
    def effects_apart(self) -> list[Float[Tensor, "prompt sender"]]:
        """The same for each receiver alone: step C runs once, step D once for each."""
        if not self._sends or self._to_logits:
            return [self.effects()] * len(self._receivers)
        read = self._read(self._walk_live if self._mlps == "live" else self._walk_direct)
        return [self._differences(self._walk_free({node: read[node]})) for node in self._receivers]

    def _read(self, walk: Callable[[dict[Node, Tensor]], list[Copies]]) -> dict[Node, Tensor]:
        """What the receivers read when each sender is patched."""
        read = {node: self._recorded(node)[:, None].repeat(1, self._n_senders, 1, 1) for node in self._receivers}
        walk(read)
        return read

    def _differences(self, blocks: Iterable[Copies]) -> Float[Tensor, "prompt sender"]:
        effects = torch.zeros(len(self._columns), self._n_senders, device=self._columns.device)
        for block in blocks:
            effects[:, block.members] = self._pair.difference(block.residual[:, :, -1]) - self._pair.unpatched[:, None]
        return effects

    # Step C, MLPs live: copies of single positions go up the layers, every head frozen.

    def _walk_live(self, read: dict[Node, Tensor]) -> list[Copies]:
        """Takes the copies up to the last receiver; keeps in `read` what the receivers read on the way."""
        calls = Calls(self._pair.base.start, self._columns)
        blocks: list[Copies] = []
        for layer in range(min(map(_first_layer, self._sends.values())), min(self._top + 1, self._model.n_layers)):
            base = self._residual(layer)[:, None]
            if layer == 0 and (numbers := self._starting(Node("input"))):
                admit(blocks, numbers, self._exchanged(numbers, Node("input"), base), self._limit)
            for block in blocks:
                self._read_heads(layer, block, calls, read)
            if numbers := self._starting(Node("attention", layer)):
                admit(blocks, numbers, base.expand(-1, len(numbers), -1, -1), self._limit)
            for block in blocks:
                attention = self._answered(layer, block.members)
                self._read_mlp(layer, block, attention, read)
                if layer < self._top:
                    block.residual = self._step(layer, block, attention)
            if layer < self._top and (numbers := self._starting(Node("mlp", layer))):
                residual, attention = base.expand(-1, len(numbers), -1, -1), self._answered(layer, numbers)
                answer = self._exchanged(numbers, Node("mlp", layer), self._output(layer)[:, None])
                admit(blocks, numbers, run_frozen(self._model, layer, residual, attention, answer), self._limit)
            self._tick()
        return blocks

    def _step(self, layer: int, block: Copies, attention: Tensor) -> Float[Tensor, "prompt copy column d_model"]:
        mlp = Node("mlp", layer)
        if not any(mlp in self._sends[number] for number in block.members):
            return run_frozen(self._model, layer, block.residual, attention)

        def edit(output: Tensor) -> Tensor:
            return self._exchanged(block.members, mlp, output.view(attention.shape)).view(output.shape)

        with self._model.edited_mlp(layer, edit):
            return run_frozen(self._model, layer, block.residual, attention)

    def _starting(self, part: Node) -> list[int]:
        """The senders whose lowest part this is; a layer's attention stands for its heads."""
        return [number for number, parts in self._sends.items() if min(node.depth for node in parts) == part.depth]

    # Step C, MLPs frozen too: what a sender changes reaches every later residual stream as it is.

    def _walk_direct(self, read: dict[Node, Tensor]) -> list[Copies]:
        """The copies' residual streams at the last receiver; keeps in `read` what the receivers read on the way."""
        calls = Calls(self._pair.base.start, self._columns)
        model, numbers = self._model, list(self._sends)
        parts = [numbers[first : first + self._limit] for first in range(0, len(numbers), self._limit)]
        changes: list[Tensor | float] = [0.0] * len(parts)
        for layer in range(min(self._top + 1, model.n_layers)):
            base, output = self._residual(layer)[:, None], self._output(layer)[:, None]
            for index, members in enumerate(parts):
                shape = (-1, len(members), -1, -1)
                if layer == 0:
                    changes[index] = self._exchanged(members, Node("input"), base) - base
                block = Copies(members, base + changes[index])
                self._read_heads(layer, block, calls, read)
                attention = self._answered(layer, members)
                self._read_mlp(layer, block, attention, read)
                if layer < self._top and any(node.layer == layer for m in members for node in self._sends[m]):
                    answer = self._exchanged(members, Node("mlp", layer), output)
                    if model.adds_attention:
                        changes[index] += attention - self._attended(layer)[:, None] + answer - output
                    else:
                        after = run_frozen(model, layer, base.expand(shape), attention, answer.expand(shape))
                        changes[index] += after - self._residual(layer + 1)[:, None]
            self._tick()
        if not self._to_logits:
            return []
        final = self._residual(model.n_layers)[:, None]
        return [Copies(members, final + change) for members, change in zip(parts, changes, strict=True)]

    # What both have in common.

    def _residual(self, layer: int) -> Float[Tensor, "prompt column d_model"]:
        return at_positions(self._pair.base.residual[layer], self._columns)

    def _attended(self, layer: int) -> Float[Tensor, "prompt column d_model"]:
        return at_positions(self._pair.base.attention[layer], self._columns)

    def _output(self, layer: int) -> Float[Tensor, "prompt column d_model"]:
        return at_positions(self._pair.base.mlp[layer], self._columns)

    def _recorded(self, node: Node) -> Float[Tensor, "prompt column d"]:
        """What a receiver reads on the clean prompts."""
        base, layer = self._pair.base, node.layer or 0
        if node.kind == "mlp":
            attention = self._attended(layer)
            return self._model.read_mlp(layer, self._residual(layer), attention)
        if node.channel == "q":
            return at_positions(base.query[layer][:, node.head], self._columns)
        kept = base.key[layer] if node.channel == "k" else base.value[layer]
        return at_positions(kept[:, self._model.kv_head(node.head or 0)], self._columns)

    def _exchanged(
        self, numbers: Sequence[int], part: Node, base: Tensor
    ) -> Float[Tensor, "prompt copy column d_model"]:
        """The clean value of the input or an MLP, one copy a sender; the counterfactual's where the sender stands."""
        source = self._pair.source
        other = source.start.residual if part.kind == "input" else source.mlp[part.layer or 0]
        never = torch.zeros_like(self._columns, dtype=torch.bool)
        where = torch.stack([self._sends[number].get(part, never) for number in numbers], dim=1)
        return torch.where(where[..., None], at_positions(other, self._columns)[:, None], base)

    def _answered(self, layer: int, numbers: Sequence[int]) -> Float[Tensor, "prompt copy column d_model"]:
        """The clean output of a layer's attention, one copy a sender, with what its heads change of it."""
        attention = self._attended(layer)[:, None].expand(-1, len(numbers), -1, -1)
        pairs = [
            (row, node.head, where)
            for row, number in enumerate(numbers)
            for node, where in self._sends[number].items()
            if node.kind == "head" and node.layer == layer
        ]
        if not pairs:
            return attention
        rows, heads, masks = zip(*pairs, strict=True)
        difference = self._pair.source.z[layer] - self._pair.base.z[layer]
        change = at_positions(difference, self._columns)[:, :, list(heads)]
        change = torch.where(torch.stack(masks, dim=2)[..., None], change, 0)
        sent = torch.einsum("pchf,hfd->phcd", change, self._model.head_weights(layer)[list(heads)])
        return attention.index_add(1, torch.tensor(rows, device=sent.device), sent)

    def _read_heads(self, layer: int, block: Copies, calls: Calls, read: dict[Node, Tensor]) -> None:
        receivers = [node for node in read if node.kind == "head" and node.layer == layer]
        if not receivers:
            return
        call = calls.at(layer, len(block.members))
        found = self._model.read_heads(layer, block.residual.flatten(1, 2), call)
        for node in receivers:
            head, kv_head = node.head or 0, self._model.kv_head(node.head or 0)
            kept = {"q": found.query[:, head], "k": found.key[:, kv_head], "v": found.value[:, kv_head]}
            mine = kept[node.channel or "q"]
            read[node][:, block.members] = mine.unflatten(1, (len(block.members), -1))

    def _read_mlp(self, layer: int, block: Copies, attention: Tensor, read: dict[Node, Tensor]) -> None:
        for node in (node for node in read if node.kind == "mlp" and node.layer == layer):
            found = self._model.read_mlp(layer, block.residual.flatten(1, 2), attention.flatten(1, 2))
            read[node][:, block.members] = found.view(block.residual.shape)

    # Step D: only the receivers are set, everything after them recomputes.

    def _walk_free(self, read: Mapping[Node, Float[Tensor, "prompt sender column d"]]) -> list[Copies]:
        chunk, window = self._pair.chunk, self._window
        columns = {node: chunk.where(node.position).gather(1, self._columns) for node in read}
        births: dict[int, list[int]] = {}
        for number, parts in self._sends.items():
            reached = [
                node.layer or 0
                for node, at in columns.items()
                if any(part.depth < node.depth and bool((at & mask).any()) for part, mask in parts.items())
            ]
            if reached:
                births.setdefault(min(reached), []).append(number)
        where = {node: window.mask(chunk.where(node.position))[:, None] for node in read}
        place = window.place(self._columns)[:, None, :, None]

        def edits_at(layer: int, members: Sequence[int]) -> list[Edit]:
            # A knocked-out head keeps its value whatever it reads.
            found = [edit.through(window) for edit in self._edits.get(layer, ())]
            for node in (node for node in read if node.layer == layer):
                kept = read[node][:, list(members)]
                value = kept.new_zeros(*kept.shape[:2], window.width, kept.shape[3])
                value.scatter_(2, place.expand_as(kept), kept)
                found.append(Edit(READ_PLACES[node.channel], where[node], value, node.head))
            return found

        frame = Frame(self._model, self._pair.base, window)
        return walk_free(frame, births, edits_at, self._window_limit, self._tick)


def _first_layer(parts: Iterable[Node]) -> int:
    return min(node.layer or 0 for node in parts)
