"""The two runs of a chunk of prompts that an intervention starts from: clean and counterfactual, or of two models."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuroplast.interventions.chunks import Chunk, logit_difference
from neuroplast.memory import Kept
from neuroplast.models.network import Network
from neuroplast.models.recording import Edit, Place, Recording, Window, at_positions
from neuroplast.models.replay import record


class Pair:
    """Two recordings of the same prompts: `base`, which is patched, and `source`, whose values are patched in."""

    @torch.no_grad()
    def __init__(
        self,
        model: Network,
        chunk: Chunk,
        base: Iterable[Place],
        source: Iterable[Place],
        *,
        into: str = "clean",
        donor: Network | None = None,
        edits: Mapping[int, Sequence[Edit]] | None = None,
        base_edits: Mapping[int, Sequence[Edit]] | None = None,
    ) -> None:
        """Runs both.

        Args:
            model: the model.
            chunk: the prompts.
            base: what to keep of the run that is patched.
            source: what to keep of the other.
            into: which run is patched, `clean` or `counterfactual`.
            donor: the model (the same, or another) that runs the same prompts instead of the other ones.
            edits: replacements in both runs, by layer.
            base_edits: replacements in the run that is patched, where they are other ones.
        """
        self.model, self.chunk = model, chunk
        tokens = (chunk.prompts.clean, chunk.prompts.counterfactual)
        of_base, of_source = tokens if into == "clean" else tokens[::-1]
        if donor is not None:
            of_source = of_base
        self.base: Recording = record(model, of_base, base, edits=edits if base_edits is None else base_edits)
        """The run that is patched."""
        self.source: Recording = record(donor or model, of_source, source, edits=edits)
        """The run whose values are patched in."""
        differences = [
            logit_difference(each, self.final(run)[:, None], chunk.prompts)[:, 0]
            for each, run in ((model, self.base), (donor or model, self.source))
        ]
        self.unpatched, self.other = differences
        """LD of the base run, and of the source run, by prompt."""
        self.clean, self.counterfactual = differences if into == "clean" else differences[::-1]

    def final(self, run: Recording) -> Float[Tensor, "prompt d_model"]:
        """The residual stream that leaves the last layer at END."""
        return at_positions(run.residual[self.model.n_layers], self.chunk.end[:, None])[:, 0]

    def difference(self, residual: Float[Tensor, "prompt copy d_model"]) -> Float[Tensor, "prompt copy"]:
        """LD from residual streams that leave the last layer at END."""
        return logit_difference(self.model, residual, self.chunk.prompts)

    def window(self, positions: Bool[Tensor, "prompt pos"]) -> Window:
        """From the first of the positions of each prompt up to END."""
        first = torch.where(positions.any(dim=1), positions.int().argmax(dim=1), self.chunk.end)
        return Window(first, self.chunk.end)


class Pairs:
    """Pairs that several measurements of the same chunks share, as many as a share of the free memory holds."""

    PLACES: tuple[frozenset[Place], frozenset[Place]] = (
        frozenset({"residual", "attention", "z", "query", "key", "value"}),
        frozenset({"z"}),
    )
    """What is kept of the clean and of the counterfactual run: enough for paths from heads to heads and logits."""
    SHARE = 0.3

    def __init__(self, model: Network, memory: str | int | None = None) -> None:
        self._model = model
        self._kept: Kept[Pair] = Kept(model.device, memory, self.SHARE)

    def of(self, chunk: Chunk) -> Pair:
        """The two runs of a chunk."""
        size = len(chunk.rows) * recorded_bytes(self._model, chunk.prompts.clean.shape[1], self.PLACES)
        return self._kept.of(chunk.key, size, lambda: Pair(self._model, chunk, *self.PLACES))


def recorded_bytes(model: Network, width: int, places: Iterable[Iterable[Place]]) -> int:
    """Bytes that recordings of some places take, a prompt of a width: one recording for each set of places."""
    heads, keys = model.n_heads * model.d_head, model.parts.n_kv_heads * model.d_head
    numbers: dict[Place, int] = {
        "query": heads,
        "key": keys + width,  # with the masks
        "value": keys,
        "pattern": model.n_heads * width,
        "z": heads,
    }
    row = sum(numbers.get(place, model.d_model) for kept in places for place in kept)
    return model.module.dtype.itemsize * model.n_layers * width * row


def columns_of(positions: Bool[Tensor, "prompt pos"], otherwise: Int[Tensor, "prompt"]) -> Int[Tensor, "prompt column"]:
    """The indices of the chosen positions; a prompt with fewer than the others repeats its last.

    Args:
        positions: which are chosen.
        otherwise: the position of a prompt where none is.
    """
    width = max(1, int(positions.sum(dim=1).max()))
    index = torch.arange(positions.shape[1], device=positions.device)
    order = torch.where(positions, index, positions.shape[1]).sort(dim=1).values[:, :width]
    last = torch.where(positions, index, 0).amax(dim=1)
    return torch.minimum(order, torch.where(positions.any(dim=1), last, otherwise)[:, None])
