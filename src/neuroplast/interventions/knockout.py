"""Knocking heads out: they give what says nothing of the clean prompt (`neuroplast.interventions.ablation`).

A knocked-out head keeps its new value whatever happens below. `Knockout` stands underneath other interventions;
`run_knockouts` measures what is left of the logit difference without some heads, or with nothing but some heads (a
circuit), for many sets at once.

Steps of `run_knockouts`: without some heads, a copy of the prompts begins at the first layer of the set and is the
window from its first position to END, on the recorded clean run. With nothing but some heads, everything starts from
a run in which all heads are knocked out. Nothing then moves between positions but through the heads that are kept,
so a copy is only the positions where some head is kept, and END; every other position stays as it was recorded.
MLPs always recompute. Sets that differ little from one set start from that set's run instead (`near`): a copy then
begins at the first layer, and is only the positions, where it can differ from that run.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.ablation import Ablation, build_ablation
from neuroplast.interventions.chunks import Chunk, Progress, Size, copies_at_once, in_prompt_chunks, logit_difference
from neuroplast.interventions.pairs import recorded_bytes
from neuroplast.interventions.selection import Selection, position_mask, require_prompts, select_senders
from neuroplast.memory import Kept
from neuroplast.models.network import Network
from neuroplast.models.recording import Columns, Edit, Place, Recording, Window, at_positions
from neuroplast.models.replay import Frame, record, walk_free
from neuroplast.tasks.prompts import PromptSet


@dataclass(frozen=True)
class Knockout:
    """Heads that are knocked out, with the values that they keep."""

    heads: tuple[Node, ...]
    """The heads, each at a position or at all."""
    ablation: Ablation
    """What they give."""

    def edits(self, model: Network, chunk: Chunk) -> dict[int, list[Edit]]:
        """The replacements on a chunk of those prompts, by layer, at every position."""
        found: dict[int, list[Edit]] = {}
        if not self.heads:
            return found
        values = self.ablation.values(model, chunk, _until(self.heads))
        for node in self.heads:
            where = position_mask(chunk.prompts, node.position)[:, None]
            value = values[node.layer or 0][:, None, :, node.head]
            found.setdefault(node.layer or 0, []).append(Edit("z", where, value, node.head))
        return found


def build_knockout(
    model: Network,
    prompts: PromptSet,
    heads: Selection,
    *,
    reference: PromptSet | None = None,
    memory: str | int | None = None,
) -> Knockout:
    """Computes the values that knocked-out heads keep: means by template and position.

    Args:
        model: the model.
        prompts: the prompts that are measured.
        heads: which heads, such as `a9.h9@end`; none where empty.
        reference: prompts over whose counterfactuals the means are taken; None takes the measured ones.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for a name that is none, a part that is no head, or a budget that is too small.
    """
    nodes = select_heads(heads, model, prompts)
    if not nodes:
        return Knockout((), build_ablation(model, prompts, "zero"))
    return Knockout(nodes, build_ablation(model, prompts, reference=reference, until=_until(nodes), memory=memory))


def select_heads(heads: Selection, model: Network, prompts: PromptSet) -> tuple[Node, ...]:
    """The heads to knock out; none where the selection is empty.

    Raises:
        InputError: for a name that is none, or a part that is no head.
    """
    if not isinstance(heads, str | Node):
        heads = list(heads)
    if not heads:
        return ()
    nodes = tuple(node for group in select_senders(heads, model, prompts) for node in group)
    if wrong := [node for node in nodes if node.kind != "head"]:
        raise InputError(f"{wrong[0]} cannot be knocked out: only heads can")
    return nodes


def run_knockouts(
    model: Network,
    prompts: PromptSet,
    sets: Sequence[Collection[Node]],
    ablation: Ablation,
    *,
    keep: bool = False,
    near: Collection[Node] = (),
    worlds: "Worlds | None" = None,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "set prompt"]:
    """The logit difference without some heads, or with nothing but some heads.

    Args:
        model: the model.
        prompts: the prompts.
        sets: sets of heads, each head at a position or at all; the empty set is allowed.
        ablation: what knocked-out heads give; built for these prompts.
        keep: False knocks out the heads of each set, True all heads but those.
        near: a set from which the others differ in few heads: what they share with it is run once. Results do not
            change.
        worlds: runs to share with other calls with the same model and prompts; that of `near` is not kept.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Returns:
        LD by set and prompt, on the CPU, in float32.

    Raises:
        InputError: for a part or a position that is not there, or a budget that is too small.
    """
    require_prompts(prompts)
    chosen = [frozenset(select_heads(each, model, prompts)) for each in sets]
    start = frozenset(select_heads(near, model, prompts))
    result = torch.zeros(len(chosen), len(prompts))
    # Sets that change the same positions go together: their copies are as narrow as they can be.
    together: dict[frozenset[str | None], list[int]] = {}
    for number, nodes in enumerate(chosen):
        together.setdefault(_changed(nodes, start, keep), []).append(number)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        make = partial(_Runs, model, chunk, ablation, keep, start)
        size = len(chunk.rows) * recorded_bytes(model, chunk.prompts.clean.shape[1], _Runs.PLACES)
        runs = make() if worlds is None or start else worlds.of((chunk.key, keep, id(ablation)), size, make)
        for changed, numbers in together.items():
            found = runs.run([chosen[number] for number in numbers], changed, tick)
            result[torch.tensor(numbers)[:, None], chunk.rows] = found.cpu()

    width = prompts.width
    recorded = recorded_bytes(model, width, _Runs.PLACES)
    copy = 4 * width * model.d_model * model.module.dtype.itemsize
    size = Size(recorded, copy, max(map(len, together.values()), default=1))
    in_prompt_chunks(model, prompts, size, work, model.n_layers * len(together), memory=memory, progress=progress)
    return result


class _Runs:
    """Sets of heads knocked out, or kept, on one chunk of prompts."""

    PLACES: tuple[tuple[Place, ...], ...] = (("residual", "key", "value"), ("z",))
    """What is held of the run that copies begin from, and of what knocked-out heads give."""

    def __init__(
        self, model: Network, chunk: Chunk, ablation: Ablation, keep: bool, near: frozenset[Node] = frozenset()
    ) -> None:
        self.model, self.chunk, self.keep, self.near = model, chunk, keep, near
        self.ablation = ablation  # lives as long as this does, so that its id tells shared runs apart
        self.values = ablation.values(model, chunk, model.n_layers)
        chosen = torch.zeros(model.n_layers, model.n_heads, *chunk.prompts.clean.shape, dtype=torch.bool)
        for node in near:
            chosen[node.layer or 0, node.head or 0] |= position_mask(chunk.prompts, node.position).cpu()
        replaced = ~chosen if keep else chosen
        edits = {
            layer: [
                Edit("z", where[:, None].to(model.device), z[:, None, :, head], head)
                for head, where in enumerate(replaced[layer])
                if bool(where.any())
            ]
            for layer, z in self.values.items()
        }
        self.base: Recording = record(model, chunk.prompts.clean, self.PLACES[0], edits=edits)

    @torch.no_grad()
    def run(
        self, sets: Sequence[frozenset[Node]], changed: Collection[str | None], tick: Callable[[], None]
    ) -> Float[Tensor, "set prompt"]:
        """LD of sets that change the same positions."""
        model, chunk, end = self.model, self.chunk, self.chunk.end
        final = at_positions(self.base.residual[model.n_layers], end[:, None])
        untouched = logit_difference(model, final, chunk.prompts)[:, 0]
        found = untouched.repeat(len(sets), 1)
        if not changed:
            return found
        positions = {node.position for nodes in sets for node in nodes} | set(changed)
        where = {position: position_mask(chunk.prompts, position) for position in positions}
        touched = torch.stack([where[position] for position in changed]).any(dim=0)
        window = Columns(touched, end) if self.keep else Window(touched.int().argmax(dim=1), end)
        masks = {position: window.mask(mask) for position, mask in where.items()}
        inside: Bool[Tensor, "prompt window"] = window.inside
        births: dict[int, list[int]] = {}
        for number, nodes in enumerate(sets):
            births.setdefault(_first_layer(nodes ^ self.near), []).append(number)

        def edits_at(layer: int, members: Sequence[int]) -> list[Edit]:
            edits: list[Edit] = []
            for head in range(model.n_heads):
                mine = torch.zeros(len(end), len(members), window.width, dtype=torch.bool, device=end.device)
                for row, number in enumerate(members):
                    for node in sets[number]:
                        if node.layer == layer and node.head == head:
                            mine[:, row] |= masks[node.position]
                replaced = inside[:, None] & ~mine if self.keep else mine
                if bool(replaced.any()):
                    value = at_positions(self.values[layer][:, :, head], window.positions)
                    edits.append(Edit("z", replaced, value[:, None], head))
            return edits

        limit = copies_at_once(model, window.positions)
        for block in walk_free(Frame(model, self.base, window), births, edits_at, limit, tick):
            found[block.members] = logit_difference(model, block.residual[:, :, -1], chunk.prompts).T
        return found


Worlds = Kept[_Runs]
"""Runs that several calls share: of the clean model, and of the model with every head knocked out."""


def _changed(nodes: frozenset[Node], near: frozenset[Node], keep: bool) -> frozenset[str | None]:
    """The positions that are computed anew: where a set differs, and where heads that are kept may pass that on."""
    differ = nodes ^ near
    found = {node.position for node in differ}
    if keep and differ:
        found |= {node.position for node in nodes if (node.layer or 0) > _first_layer(differ)}
    return frozenset(found)


def _first_layer(heads: Collection[Node]) -> int:
    return min(node.layer or 0 for node in heads)


def _until(heads: Sequence[Node]) -> int:
    return 1 + max(node.layer or 0 for node in heads)
