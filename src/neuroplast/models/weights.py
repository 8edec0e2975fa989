"""Which weights belong to which component: every head's query, key, value and output map, every MLP, norm, embedding.

Found by measurement, as in `neuroplast.models.readers`, not by the names of a family's modules.

- Keys and values that grouped queries share belong to all query heads of their group: taking them from one takes them
  from all.
- A weight that is tied belongs to both components that use it, embedding and unembedding.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType

from torch import Tensor, nn

from neuroplast.components import HEAD_KINDS, LAYER_KINDS, Component, Kind, ReadChannel
from neuroplast.errors import unknown_name
from neuroplast.models.network import Network, unembedding_of
from neuroplast.models.readers import Projection, find_projections


@dataclass(frozen=True)
class Piece:
    """Some entries of one weight."""

    name: str
    """The weight's name in the model."""
    index: EllipsisType | tuple[slice | Tensor, ...]
    """Which entries; `...` for all."""


class WeightMap:
    """The components of a model's weights."""

    def __init__(self, model: Network) -> None:
        """Finds them.

        Raises:
            UnsupportedModelError: when the heads' weights cannot be told apart.
        """
        self.model = model
        self.unembedding = unembedding_of(model.module)
        self.layer_of: dict[int, int] = {
            id(part): layer for layer, block in enumerate(model.layers) for part in block.modules()
        }
        """The layer of each module in one, by the module's `id`."""
        self.attention_of = {
            id(part): layer for layer, block in enumerate(model.attentions) for part in block.modules()
        }
        """The layer of each module in an attention module."""
        self.projections: dict[int, list[tuple[ReadChannel, int, Projection]]] = {}
        """By linear map, what it makes: channel, layer, and which outputs."""
        for layer in range(model.n_layers):
            for channel, projection in find_projections(model, layer).items():
                self.projections.setdefault(id(projection.linear), []).append((channel, layer, projection))
        layers, heads = range(model.n_layers), range(model.n_heads)
        self.components: tuple[Component, ...] = (
            Component("embedding"),
            *(Component(kind, at, head) for at in layers for head in heads for kind in HEAD_KINDS),
            *(Component(kind, at) for at in layers for kind in LAYER_KINDS),
            Component("norm"),
            Component("unembedding"),
        )
        """All of them, in a fixed order."""
        self._rows = {component: row for row, component in enumerate(self.components)}

    def row(self, kind: Kind, layer: int | None = None, head: int | None = None) -> int:
        """The place of a component among all."""
        return self._rows[Component(kind, layer, head)]

    def row_of(self, module: nn.Module) -> int:
        """The place of a module that no head has a part in."""
        layer = self.layer_of.get(id(module))
        is_norm = all(weight.ndim < 2 for weight in module.parameters(recurse=False))
        if module is self.unembedding:
            return self.row("unembedding")
        if is_norm:
            return self.row("norm", layer)
        if layer is None:
            return self.row("embedding")
        return self.row("bias" if id(module) in self.attention_of else "mlp", layer)

    def pieces(self) -> Mapping[Component, Sequence[Piece]]:
        """The weights of every component that has any."""
        found: dict[Component, list[Piece]] = {}
        names = {id(weight): name for name, weight in self.model.module.named_parameters()}
        for module in self.model.module.modules():
            for kind, weight in module.named_parameters(recurse=False):
                for row, index in self._parts(module, kind == "bias"):
                    found.setdefault(self.components[row], []).append(Piece(names[id(weight)], index))
        return found

    def _parts(
        self, module: nn.Module, is_bias: bool
    ) -> Iterable[tuple[int, EllipsisType | tuple[slice | Tensor, ...]]]:
        """Rows of components, and which entries of a module's weight or bias are theirs."""
        model = self.model
        of_outputs = isinstance(module, nn.Linear) or is_bias
        layer = self.attention_of.get(id(module))
        if layer is not None and module is model.parts.projections[layer]:
            if is_bias:
                yield self.row("bias", layer), ...
            else:
                for head in range(model.n_heads):
                    inputs = slice(head * model.d_head, (head + 1) * model.d_head)
                    yield self.row("o", layer, head), (slice(None), inputs) if of_outputs else (inputs,)
            return
        if (made := self.projections.get(id(module))) is None:
            yield self.row_of(module), ...
            return
        for channel, at, projection in made:
            for head in range(model.n_heads):
                outputs = projection.outputs[head if channel == "q" else model.kv_head(head)]
                yield self.row(channel, at, head), (outputs,) if of_outputs else (slice(None), outputs)


def choose_pieces(pieces: Mapping[Component, Sequence[Piece]], components: Iterable[Component]) -> tuple[Piece, ...]:
    """The weights of some components; those that several share come several times.

    Args:
        pieces: from `WeightMap.pieces`.
        components: which.

    Raises:
        InputError: for a component that the model has not.
    """
    chosen: list[Piece] = []
    for component in components:
        if component not in pieces:
            raise unknown_name("part of the weights", str(component), map(str, pieces))
        chosen += pieces[component]
    return tuple(chosen)


def put_weights(receiver: Network, donor: Network, pieces: Iterable[Piece]) -> None:
    """Puts some of the donor's weights into the receiver, for good."""
    theirs = dict(donor.module.named_parameters())
    for piece in pieces:
        receiver.module.get_parameter(piece.name).data[piece.index] = theirs[piece.name].data[piece.index]


@contextmanager
def grafted(receiver: Network, donor: Network, pieces: Sequence[Piece]) -> Generator[None]:
    """Puts some of the donor's weights into the receiver inside the block."""
    places = [(receiver.module.get_parameter(piece.name).data, piece) for piece in pieces]
    former = [weight[piece.index].clone() for weight, piece in places]
    try:
        put_weights(receiver, donor, pieces)
        yield
    finally:
        for (weight, piece), value in zip(places, former, strict=True):
            weight[piece.index] = value
