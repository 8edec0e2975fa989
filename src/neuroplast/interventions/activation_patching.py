"""Activation patching at any place (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022, arXiv 2202.05262).

One run's activation at a place is put into the other run, and everything after it recomputes. Into the clean run it
shows what the place is needed for, into the counterfactual run what it suffices for. Head results are patched as z:
the output projection is linear, so the two are one.

Steps here: record both runs once. A copy of the prompts is the window from the patched position to END; it begins at
the patched layer and sees the recorded keys and values before it, so neither earlier layers nor earlier
positions are computed again (`neuroplast.models.replay`).

Sign: effect = LD(patched) - LD(unpatched), in logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import unknown_name
from neuroplast.interventions.chunks import Chunk, Progress, Size, copies_at_once, in_prompt_chunks
from neuroplast.interventions.effects import Effects
from neuroplast.interventions.pairs import Pair, columns_of, recorded_bytes
from neuroplast.interventions.selection import Group, Selection, select_sites
from neuroplast.models.network import Network
from neuroplast.models.recording import Edit, Place, Recording, Window, at_positions
from neuroplast.models.replay import Frame, walk_free
from neuroplast.tasks.prompts import PromptSet

INTO = ("clean", "counterfactual")
PLACE_OF: Mapping[str, Place] = {
    "q": "query",
    "k": "key",
    "v": "value",
    "pattern": "pattern",
    "keys": "keys",
    "values": "values",
    "head": "z",
    "attention": "attention",
    "mlp": "mlp",
    "residual": "residual",
    "input": "residual",
}
"""The place of a node, by its channel or else its kind."""
RECORDED: Mapping[Place, Place] = {"keys": "key", "values": "value"}
"""Where a recording has what one query sees."""
BASE_PLACES: tuple[Place, ...] = ("residual", "key", "value")
"""What copies need of the run that is patched."""

Differs = Callable[[Pair, Group, Mapping[str | None, Bool[Tensor, "prompt pos"]]], Bool[Tensor, "prompt"]]
Beside = Callable[[Pair, Node, Window], Sequence[Edit]]


def activation_patch(
    model: Network,
    prompts: PromptSet,
    *,
    sites: Selection = "residual@each",
    into: str = "clean",
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patches activations of one run into the other, exactly.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        sites: `heads` (z), `q`, `k`, `v`, `pattern`, `keys`, `values`, `attention`, `mlps`, `residual`, or nodes and
            groups, such as `r5@s2, a9.h1<q>@end, a0.h1+m0`; each is patched alone, at its position, at all, or at
            `each` in turn.
        into: the run that is patched: `clean` with counterfactual values, or `counterfactual` with clean ones.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Returns:
        Effects with shape (site, prompt).

    Raises:
        InputError: for a name that is none, a part or a position that is not there, or a budget that is too small.
    """
    if into not in INTO:
        raise unknown_name("run to patch into", into, INTO)
    groups = select_sites(sites, model, prompts)
    places: set[Place] = {recorded_of(node) for group in groups for node in group}

    def build_pair(chunk: Chunk) -> Pair:
        return Pair(model, chunk, BASE_PLACES, places, into=into)

    recorded = recorded_bytes(model, prompts.width, (BASE_PLACES, places))
    effects, base, source = patch_sites(model, prompts, groups, build_pair, recorded, memory=memory, progress=progress)
    clean, counterfactual = (base, source) if into == "clean" else (source, base)
    return Effects("activation", groups, (Node("logits", position="end"),), effects, clean, counterfactual, into)


def patch_sites(
    model: Network,
    prompts: PromptSet,
    groups: Sequence[Group],
    build_pair: Callable[[Chunk], Pair],
    recorded: int,
    *,
    differs: Differs | None = None,
    beside: Beside | None = None,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "site prompt"], Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
    """Patches each group of nodes of one run into another, whatever the two runs are.

    Args:
        model: the model of the run that is patched.
        prompts: the prompts.
        groups: what is patched, each alone.
        build_pair: records the two runs of a chunk.
        recorded: bytes that they take, a prompt.
        differs: on which prompts a group's values are not there already; elsewhere its effect is 0 and, where that is
            all prompts, not computed. None patches everything.
        beside: what else is edited for a node, at the positions of a window, each with one copy.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Returns:
        LD(patched) - LD(unpatched), LD of the run that is patched, and LD of the other.
    """
    effects = torch.zeros(len(groups), len(prompts))
    base, source = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    by_start: dict[frozenset[str | None], list[int]] = {}
    for number, group in enumerate(groups):
        by_start.setdefault(frozenset(node.position for node in group), []).append(number)

    def work(chunk: Chunk, copies: int, tick: Callable[[], None]) -> None:
        pair = build_pair(chunk)
        base[chunk.rows], source[chunk.rows] = pair.unpatched.cpu(), pair.other.cpu()
        for positions, numbers in by_start.items():
            where = {position: pair.chunk.where(position) for position in positions}
            new: dict[int, Tensor] = {}
            if differs is not None:
                new = {number: differs(pair, groups[number], where) for number in numbers}
                numbers = [number for number in numbers if bool(new[number].any())]
            for first in range(0, len(numbers), copies):
                part = {number: groups[number] for number in numbers[first : first + copies]}
                for number, effect in _patch(pair, part, where, tick, beside).items():
                    effects[number, chunk.rows] = (effect * new[number] if new else effect).cpu()

    copy = 2 * model.module.dtype.itemsize * prompts.width * model.d_model
    size = Size(recorded, copy, max(map(len, by_start.values())))
    in_prompt_chunks(model, prompts, size, work, model.n_layers * len(by_start), memory=memory, progress=progress)
    return effects, base, source


@torch.no_grad()
def _patch(
    pair: Pair,
    groups: Mapping[int, Group],
    where: Mapping[str | None, Bool[Tensor, "prompt pos"]],
    tick: Callable[[], None],
    beside: Beside | None,
) -> dict[int, Float[Tensor, "prompt"]]:
    """The effects of groups that stand at the same positions, by the groups' numbers."""
    at = torch.stack(list(where.values())).any(dim=0)
    if not bool(at.any()):
        return {}
    window = pair.window(at)
    seen = {position: window.mask(mask)[:, None] for position, mask in where.items()}
    births: dict[int, list[int]] = {}
    for number, group in groups.items():
        births.setdefault(min(node.layer or 0 for node in group), []).append(number)

    def edits_at(layer: int, members: Sequence[int]) -> list[Edit]:
        found: list[Edit] = []
        for row, number in enumerate(members):
            for node in (node for node in groups[number] if (node.layer or 0) == layer):
                value = values_of(pair.model, pair.source, node)
                if place_of(node) not in RECORDED:
                    value = at_positions(value, window.positions)
                mine = Edit(place_of(node), seen[node.position], value[:, None], node.head, slice(row, row + 1))
                more = beside(pair, node, window) if beside is not None else ()
                found += [mine, *(replace(edit, where=mine.where, copies=mine.copies) for edit in more)]
        return found

    limit = copies_at_once(pair.model, window.positions)
    effects: dict[int, Tensor] = {}
    for block in walk_free(Frame(pair.model, pair.base, window), births, edits_at, limit, tick):
        changes = pair.difference(block.residual[:, :, -1]) - pair.unpatched[:, None]
        effects.update(zip(block.members, changes.unbind(1), strict=True))
    return effects


def place_of(node: Node) -> Place:
    """The place of a layer where a node's value stands."""
    return PLACE_OF[node.channel or node.kind]


def recorded_of(node: Node) -> Place:
    """The place where a recording has a node's value."""
    return RECORDED.get(place_of(node), place_of(node))


def values_differ(
    pair: Pair, group: Group, where: Mapping[str | None, Bool[Tensor, "prompt pos"]]
) -> Bool[Tensor, "prompt"]:
    """On which prompts the values of some node of a group are not the same to the bit in both runs."""
    found = torch.zeros(len(pair.chunk.rows), dtype=torch.bool, device=pair.model.device)
    for node in group:
        chosen = where[node.position]
        mine, theirs = (values_of(pair.model, run, node) for run in (pair.base, pair.source))
        if mine.shape[1] > 1:
            columns = columns_of(chosen, pair.chunk.end)
            mine, theirs = at_positions(mine, columns), at_positions(theirs, columns)
        found |= (mine != theirs).flatten(1).any(dim=1) & chosen.any(dim=1)
    return found


def values_of(model: Network, run: Recording, node: Node) -> Float[Tensor, "prompt #pos d"]:
    """What stands at a node in a run, at every position; for `keys` and `values`, one row for all of them."""
    place = recorded_of(node)
    kept: Tensor = getattr(run, place)[node.layer or 0]
    if place == "z":
        return kept[:, :, node.head]
    if place in ("key", "value"):
        kept = kept[:, model.kv_head(node.head or 0)]
        return kept.flatten(1)[:, None] if place_of(node) in RECORDED else kept
    return kept[:, node.head] if place in ("query", "pattern") else kept
