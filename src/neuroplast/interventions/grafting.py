"""Grafting: where a change between two checkpoints of one model is stored.

Some weights of the donor take the place of the receiver's, alone or together, and the prompts run: whatever the other
weights make of that. Into the other checkpoint it shows what has to be undone in the weights, into the base what
suffices to bring the change about. Unlike the ledger's shares the effects of single grafts need not add up.

Steps: the receiver's residual stream is recorded once at every layer; a graft runs again from its first layer on.

Sign: effect = LD(receiver, grafted) - LD(receiver), in logits.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.components import Component
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks, logit_difference
from neuroplast.interventions.pairs import recorded_bytes
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.between import require_same_parts
from neuroplast.models.network import Network
from neuroplast.models.recording import Recording, at_positions
from neuroplast.models.replay import record
from neuroplast.models.weights import Piece, WeightMap, choose_pieces, grafted
from neuroplast.tasks.prompts import PromptSet


@dataclass(frozen=True)
class GraftEffects:
    """The effect of each graft on the receiver's logit difference; on the CPU, in float32."""

    grafts: tuple[tuple[Component, ...], ...]
    """What was grafted together, a row each."""
    effects: Float[Tensor, "graft prompt"]
    """LD(receiver, grafted) - LD(receiver), in logits."""
    receiver: Float[Tensor, "prompt"]
    """LD of the receiver."""
    donor: Float[Tensor, "prompt"]
    """LD of the donor."""


def graft(
    receiver: Network,
    donor: Network,
    prompts: PromptSet,
    grafts: Sequence[Iterable[Component]],
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> GraftEffects:
    """Grafts weights of one checkpoint into another.

    Args:
        receiver: the model whose weights are exchanged; it is left as it was.
        donor: the model that gives its own.
        prompts: clean prompts; their counterfactuals do not matter.
        grafts: what is grafted together: components of `neuroplast.models.weights.WeightMap`.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: when the models are not checkpoints of one, for a component that the model has not, or a budget that
            is too small.
        UnsupportedModelError: when the heads' weights cannot be told apart.
    """
    require_prompts(prompts)
    require_same_parts(receiver, donor)
    rows = tuple(map(tuple, grafts))
    if not rows:
        raise InputError("0 grafts: name at least one set of components")
    known = WeightMap(receiver).pieces()
    pieces = [choose_pieces(known, row) for row in rows]
    embedding = {piece.name for piece in known[Component("embedding")]}
    firsts = [_first_layer(receiver, row, mine, embedding) for row, mine in zip(rows, pieces, strict=True)]
    effects = torch.zeros(len(rows), len(prompts))
    before, theirs = (measure_behaviour(model, prompts).logit_diff for model in (receiver, donor))

    @torch.no_grad()
    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        run = partial(_difference, receiver, chunk, record(receiver, chunk.prompts.clean, ("residual",)))
        unchanged = run(receiver.n_layers)
        for row, (mine, first) in enumerate(zip(pieces, firsts, strict=True)):
            with grafted(receiver, donor, mine):
                effects[row, chunk.rows] = (run(first) - unchanged).cpu()
            tick()

    size = Size(recorded_bytes(receiver, prompts.width, (("residual",),)), 1, 1)
    in_prompt_chunks(receiver, prompts, size, work, len(rows), memory=memory, progress=progress)
    return GraftEffects(rows, effects, before, theirs)


def _first_layer(
    model: Network, components: Iterable[Component], pieces: Iterable[Piece], embedding: Collection[str]
) -> int | None:
    """The first layer that a graft changes; None where it changes what comes before the layers."""
    if any(piece.name in embedding for piece in pieces):
        return None
    layers = [component.layer for component in components if component.layer is not None]
    return min(layers, default=model.n_layers)


def _difference(model: Network, chunk: Chunk, recorded: Recording, first: int | None) -> Float[Tensor, "prompt"]:
    """LD of the model as it is now, from a layer on."""
    if first is None:
        recorded, first = record(model, chunk.prompts.clean, ()), model.n_layers
    residual = recorded.residual[first]
    for layer in range(first, model.n_layers):
        residual = model.run_layer(layer, residual, recorded.start.calls[layer])
    final = at_positions(residual, chunk.end[:, None])
    return logit_difference(model, final, chunk.prompts)[:, 0]
