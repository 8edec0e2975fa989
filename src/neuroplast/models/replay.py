"""Running parts of a forward pass again, exactly, without running the rest.

`record` runs a model once, layer by layer, and keeps what it computed. From a recording, *copies* of the prompts,
each changed in its own way, go up the layers in two ways:

- **frozen** (`run_frozen`): every head keeps its recorded value. Attention then moves nothing between positions,
  so each position of a copy is a row of its own, and a layer costs its MLP.
- **free** (`walk_free`): everything recomputes. A change at one position can only reach later ones, so a copy is a
  *window* of positions up to END, and the keys and values of the positions before it are the recorded ones, as
  in decoding. All copies of a prompt go through a layer as one sequence; a block mask keeps them apart, and the
  model's own attention function does the rest.

A copy enters at the layer where it first differs. Copies go through a layer in blocks: enough rows for full speed of
the matrix products, and a bound on the memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.models.attention import AttentionCall, tapped
from neuroplast.models.network import LayerCall, Network, Start
from neuroplast.models.recording import BY_QUERY, PLACES, Edit, Place, Recording, Window, at_positions

QUERIES_A_BLOCK = 32
"""Queries of one prompt that share an attention call in a free walk: each sees the keys of all of them, masked."""


class Calls:
    """What the layers are called with at chosen positions of each prompt."""

    def __init__(self, start: Start, positions: Int[Tensor, "prompt kept"]) -> None:
        self._start, self._positions = start, positions
        self._picked: dict[tuple[int, int, int], Tensor] = {}

    def at(self, layer: int, copies: int, tail: int | None = None) -> LayerCall:
        """The call of a layer for some copies of the positions, or of the last `tail` of them."""
        call = self._start.calls[layer]
        tail = tail or self._positions.shape[1]

        def pick(value: Any) -> Any:
            if self._is_by_position(value):
                if (key := (id(value), copies, tail)) not in self._picked:
                    index = self._positions[:, -tail:].repeat(1, copies)
                    self._picked[key] = at_positions(value.expand(len(index), *value.shape[1:]), index)
                return self._picked[key]
            return tuple(map(pick, value)) if isinstance(value, tuple) else value

        return LayerCall(tuple(map(pick, call.args)), {name: pick(value) for name, value in call.kwargs.items()})

    def _is_by_position(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            return False
        n, width, _ = self._start.residual.shape
        return value.shape[0] in (1, n) and value.shape[1] == width


class Frame:
    """What copies in a window see around them: keys and values before it, masks, position encodings."""

    def __init__(self, network: Network, recording: Recording, window: Window) -> None:
        self.network = network
        self.recording = recording
        self.window = window
        self.calls = Calls(recording.start, window.positions)
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def residual(self, layer: int) -> Float[Tensor, "prompt window d_model"]:
        """The recorded residual stream entering a layer, in the window."""
        return at_positions(self.recording.residual[layer], self.window.positions)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """The recorded keys and values that stand beside some prompt's window."""
        keys, values = self.recording.key[layer], self.recording.value[layer]
        past = self.window.hides.shape[1]
        return keys[:, :, :past], values[:, :, :past]

    def mask(self, layer: int, copies: int, tail: int) -> Float[Tensor, "prompt 1 query key"]:
        """What the last `tail` positions of each of some copies see: the past, and their own copy's window."""
        whole = self.recording.mask[layer]
        if (key := (id(whole), copies, tail)) not in self._masks:
            self._masks[key] = self._build_mask(whole, copies, tail)
        return self._masks[key]

    def rows(self, whole: Float[Tensor, "#prompt 1 pos pos"], tail: int) -> Float[Tensor, "prompt tail pos"]:
        """The rows of a mask of whole prompts that belong to the last `tail` positions of the window."""
        queries = self.window.positions[:, -tail:, None].expand(-1, -1, whole.shape[-1])
        return whole.expand(len(queries), -1, -1, -1)[:, 0].gather(1, queries)

    def _build_mask(self, whole: Tensor, copies: int, tail: int) -> Tensor:
        window, never = self.window, torch.finfo(whole.dtype).min
        n, keys, rows = len(window.positions), window.positions, self.rows(whole, tail)
        own = rows.gather(2, keys[:, None].expand(-1, tail, -1)).masked_fill(~window.inside[:, None], never)
        before = rows[:, :, : window.hides.shape[1]].masked_fill(window.hides[:, None], never)
        blocks = whole.new_full((n, copies, tail, copies, window.width), never)
        blocks.diagonal(dim1=1, dim2=3).copy_(own[..., None])
        return torch.cat([before.repeat(1, copies, 1), blocks.flatten(3).flatten(1, 2)], dim=2)[:, None]


@torch.no_grad()
def record(
    network: Network,
    tokens: Int[Tensor, "prompt pos"],
    places: Iterable[Place],
    *,
    until: int | None = None,
    edits: Mapping[int, Sequence[Edit]] | None = None,
) -> Recording:
    """Runs a model and keeps what it computed.

    Args:
        network: the model.
        tokens: token ids, right-padded.
        places: what to keep; with `key`, the masks are kept too.
        until: stop before this layer; None runs them all.
        edits: replacements by layer, each with one copy and a window of all positions.
    """
    keep = frozenset(places)
    last = network.n_layers if until is None else until
    recording = Recording(network.start(tokens))
    residual = recording.start.residual
    for layer in range(last):
        run = _LayerRun(network, layer, (edits or {}).get(layer, ()), copies=1)
        residual = run(residual.unsqueeze(1), recording.start.calls[layer], recording, keep).squeeze(1)
    recording.residual[last] = residual
    return recording


@dataclass
class Copies:
    """A block of copies of the prompts that go up the layers together."""

    members: list[int]
    """Which copies these are, by their caller's numbers."""
    residual: Float[Tensor, "prompt copy window d_model"]
    """Their residual stream."""


def admit(blocks: list[Copies], members: Sequence[int], residual: Tensor, limit: int) -> None:
    """Adds new copies: to the last block while it has room, then as blocks of their own.

    Args:
        blocks: the blocks so far, changed in place.
        members: the new copies' numbers.
        residual: their residual stream, (prompt, copy, window, d_model).
        limit: copies a block.
    """
    taken = 0
    if blocks and (room := limit - len(blocks[-1].members)) > 0:
        last, taken = blocks[-1], min(room, len(members))
        last.members.extend(members[:taken])
        last.residual = torch.cat([last.residual, residual[:, :taken]], dim=1)
    for first in range(taken, len(members), limit):
        blocks.append(Copies(list(members[first : first + limit]), residual[:, first : first + limit]))


@torch.no_grad()
def run_frozen(
    network: Network,
    layer: int,
    residual: Float[Tensor, "prompt copy kept d_model"],
    attention: Float[Tensor, "prompt copy kept d_model"],
    mlp: Float[Tensor, "prompt copy kept d_model"] | None = None,
) -> Float[Tensor, "prompt copy kept d_model"]:
    """One layer with its attention answering from memory, and its MLP too where an answer is given."""
    answer = None if mlp is None else mlp.flatten(1, 2)
    out = network.run_layer(layer, residual.flatten(1, 2), attention=attention.flatten(1, 2), mlp=answer)
    return out.view(residual.shape)


@torch.no_grad()
def walk_free(
    frame: Frame,
    births: Mapping[int, Sequence[int]],
    edits_at: Callable[[int, Sequence[int]], Sequence[Edit]],
    limit: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Copies]:
    """Copies go up the layers from where each first differs, everything recomputing.

    Args:
        frame: the window and what stands around it.
        births: by layer, the numbers of the copies that first differ there.
        edits_at: for a layer and the numbers of a block's copies, the replacements there.
        limit: copies a block.
        tick: called after each layer.

    Returns:
        The copies with the residual stream that leaves the last layer, at END only.
    """
    network, last = frame.network, frame.network.n_layers - 1
    blocks: list[Copies] = []
    for layer in range(min(births, default=last), last + 1):
        if born := births.get(layer):
            residual = frame.residual(layer)
            admit(blocks, born, residual[:, None].expand(-1, len(born), -1, -1), limit)
        # What leaves the last layer matters at END only.
        tail = 1 if layer == last else frame.window.width
        for block in blocks:
            run = _LayerRun(network, layer, edits_at(layer, block.members), len(block.members), frame, tail)
            block.residual = run(block.residual, frame.calls.at(layer, len(block.members), tail))
        tick()
    return blocks


class _LayerRun:
    """One layer, everything computing, with replacements: the only place where they are carried out."""

    def __init__(
        self,
        network: Network,
        layer: int,
        edits: Sequence[Edit],
        copies: int,
        frame: Frame | None = None,
        tail: int | None = None,
    ) -> None:
        self.network, self.layer, self.copies, self.frame = network, layer, copies, frame
        self.edits: dict[Place, list[Edit]] = {
            place: found for place in PLACES if (found := [edit for edit in edits if edit.place == place])
        }
        self.tail = tail

    def __call__(
        self,
        residual: Float[Tensor, "prompt copy window d_model"],
        call: LayerCall,
        recording: Recording | None = None,
        keep: frozenset[Place] = frozenset(),
    ) -> Float[Tensor, "prompt copy tail d_model"]:
        width = residual.shape[2]
        tail = self.tail or width
        if "residual" in self.edits:
            residual = residual.clone()
            self._replace("residual", residual)
        if recording is not None and "residual" in keep:
            recording.residual[self.layer] = residual.squeeze(1)
        read: AttentionCall | None = None
        if tail < width and self.frame is not None:
            # Later positions of the window need the keys and values of the earlier ones, and nothing else.
            whole = self.frame.calls.at(self.layer, self.copies, width)
            read = self.network.read_heads(self.layer, residual.flatten(1, 2), whole)
            residual = residual[:, :, -tail:]
        network, layer = self.network, self.layer
        with ExitStack() as stack:
            stack.enter_context(tapped(lambda found: self._attend(found, read, tail, recording, keep)))
            if "attention" in self.edits or "attention" in keep:
                edit = self._hook("attention", residual, recording if "attention" in keep else None)
                stack.enter_context(network.edited_attention(layer, edit))
            if "mlp_input" in self.edits:
                stack.enter_context(network.edited_mlp_input(layer, self._hook("mlp_input", residual, None)))
            if "mlp" in self.edits or "mlp" in keep:
                edit = self._hook("mlp", residual, recording if "mlp" in keep else None)
                stack.enter_context(network.edited_mlp(layer, edit))
            out = network.run_layer(layer, residual.flatten(1, 2), call)
        return out.unflatten(1, (self.copies, tail))

    def _hook(self, place: Place, residual: Tensor, recording: Recording | None) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            # Some families flatten prompts and positions into rows before their MLP.
            if place in self.edits:
                value = value.clone()
                self._replace(place, value.view(residual.shape))
            if recording is not None:
                getattr(recording, place)[self.layer] = value.view(residual.flatten(1, 2).shape)
            return value

        return edit

    def _attend(
        self,
        call: AttentionCall,
        read: AttentionCall | None,
        tail: int,
        recording: Recording | None,
        keep: frozenset[Place],
    ) -> Float[Tensor, "prompt pos head d_head"]:
        source = read or call
        query, key, value = call.query, source.key, source.value
        if {"key", "value", *BY_QUERY} & set(self.edits):
            key, value = call.ungroup(key), call.ungroup(value)
        width = key.shape[2] // self.copies
        by_copy: dict[Place, Tensor] = {
            "query": query.unflatten(2, (self.copies, tail)),
            "key": key.unflatten(2, (self.copies, width)),
            "value": value.unflatten(2, (self.copies, width)),
        }
        for place in ("query", "key", "value"):
            self._replace_heads(place, by_copy[place])
        if self.frame is None:
            z, pattern = call.attend(query, key, value, call.mask)
        else:
            z, pattern = self._attend_in_blocks(call, query, key, value, tail), None
        by_head = z.unflatten(1, (self.copies, tail)).permute(0, 3, 1, 2, 4)
        self._replace_by_query(call, by_copy, by_head)
        self._replace_heads("z", by_head)
        if recording is not None:
            found = {"query": query, "key": key, "value": value, "pattern": pattern, "z": z}
            for place in keep & set(found):
                getattr(recording, place)[self.layer] = found[place]
            if "key" in keep and call.mask is not None:
                recording.mask[self.layer] = call.mask
        return z

    def _attend_in_blocks(
        self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, tail: int
    ) -> Float[Tensor, "prompt pos head d_head"]:
        assert self.frame is not None
        past_key, past_value = self.frame.past(self.layer)
        if key.shape[1] != past_key.shape[1]:
            past_key, past_value = call.ungroup(past_key), call.ungroup(past_value)
        width = key.shape[2] // self.copies
        together = max(1, QUERIES_A_BLOCK // width)
        parts: list[Tensor] = []
        for first in range(0, self.copies, together):
            n = min(together, self.copies - first)
            keys = slice(first * width, (first + n) * width)
            seen_keys = torch.cat([past_key, key[:, :, keys]], dim=2)
            seen_values = torch.cat([past_value, value[:, :, keys]], dim=2)
            queries = query[:, :, first * tail : (first + n) * tail]
            parts.append(call.attend(queries, seen_keys, seen_values, self.frame.mask(self.layer, n, tail))[0])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _replace_by_query(
        self,
        call: AttentionCall,
        by_copy: Mapping[Place, Tensor],
        z: Float[Tensor, "prompt head copy window d_head"],
    ) -> None:
        """Attends again where queries see keys, patterns or values of their own; z changes there, in place."""
        edits: dict[tuple[int, tuple[int, int, int]], list[Edit]] = {}
        for edit in (edit.tail(z.shape[3]) for place in BY_QUERY for edit in self.edits.get(place, ())):
            edits.setdefault((edit.head or 0, edit.copies.indices(self.copies)), []).append(edit)
        for (head, span), found in edits.items():
            copies, of = slice(*span), {place: [edit for edit in found if edit.place == place] for place in BY_QUERY}
            query = by_copy["query"][:, :, copies]
            keys, values = (self._seen(place, by_copy[place], head, copies) for place in ("key", "value"))
            # What is not replaced is live; of the pattern, that matters only for values.
            pattern = self._pattern(call, query, keys, head) if of["values"] else keys.new_zeros(())
            for edit in of["keys"]:
                pattern = edit.over(pattern, self._pattern(call, query, edit.of_all_positions(keys), head))
            for edit in of["pattern"]:
                pattern = edit.over(pattern, edit.value.to(keys.dtype))
            new = pattern @ values
            for edit in of["values"]:
                new = edit.over(new, pattern @ edit.of_all_positions(values))
            for edit in found:
                _replace(z[:, head], Edit("z", edit.where, new, head, copies))

    def _pattern(
        self,
        call: AttentionCall,
        query: Float[Tensor, "prompt head copy tail d_head"],
        keys: Float[Tensor, "prompt copy key d_head"],
        head: int,
    ) -> Float[Tensor, "prompt copy tail key"]:
        """What one head's queries make of keys at every position of the prompts."""
        copies, tail = query.shape[2:4]
        assert call.mask is not None
        if self.frame is None:
            mask = call.mask
        else:
            mask = self.frame.rows(self.frame.recording.mask[self.layer], tail)[:, None]
        mask = mask.expand(len(query), -1, -1, -1).repeat_interleave(copies, dim=0)
        # The family may give each head something of its own, so the head stays in its place among the others.
        all_heads = keys.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1, -1)
        queries = query.transpose(1, 2).flatten(0, 1)
        return call.attend(queries, all_heads, all_heads, mask)[1][:, head].unflatten(0, (-1, copies))

    def _seen(
        self, place: Literal["key", "value"], own: Tensor, head: int, copies: slice
    ) -> Float[Tensor, "prompt copy key d_head"]:
        """One head's keys or values at every position of the prompts, as some copies see them."""
        mine = own[:, head, copies]
        if self.frame is None:
            return mine
        recording, window = self.frame.recording, self.frame.window
        whole = (recording.key if place == "key" else recording.value)[self.layer]
        seen = whole[:, self.network.kv_head(head), None].repeat(1, mine.shape[1], 1, 1)
        # One place more than there are positions takes what lies outside the windows.
        index = window.positions.masked_fill(~window.inside, seen.shape[2])
        index = index[:, None, :, None].expand(-1, mine.shape[1], -1, mine.shape[3])
        return torch.nn.functional.pad(seen, (0, 0, 0, 1)).scatter(2, index, mine)[:, :, :-1]

    def _replace(self, place: Place, current: Float[Tensor, "prompt copy window d"]) -> None:
        for edit in self.edits.get(place, ()):
            _replace(current, edit.tail(current.shape[2]))

    def _replace_heads(self, place: Place, current: Float[Tensor, "prompt head copy window d"]) -> None:
        for edit in self.edits.get(place, ()):
            _replace(current[:, edit.head], edit.tail(current.shape[3]))


def _replace(current: Float[Tensor, "prompt copy window d"], edit: Edit) -> None:
    """Carries out one replacement, in place."""
    target = current[:, edit.copies]
    value = edit.value.to(target.dtype)
    target.copy_(torch.where(edit.where[..., None], target + value if edit.adds else value, target))
