"""What a forward pass computed, what is put in its place, and at which positions."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuroplast.models.network import Start

Place = Literal["residual", "query", "key", "value", "keys", "pattern", "values", "z", "attention", "mlp_input", "mlp"]
"""Where a layer can be changed: the residual stream entering it, what its heads read and give, its attention's
output, what its MLP reads and gives. A `key` or a `value` is changed for all queries that see it; `keys`, `pattern` and
`values` are changed for one query each, whose output alone they change. Everything but `mlp_input`, `keys` and `values`
can be recorded."""

PLACES: tuple[Place, ...] = get_args(Place)
BY_QUERY: tuple[Place, ...] = ("keys", "pattern", "values")
"""What one query sees, in the order in which attention uses it."""


@dataclass(frozen=True)
class Recording:
    """What a forward pass computed, by layer, replacements included; at every position, as references to the pass's own
    tensors."""

    start: Start
    """What came before the layers."""
    residual: dict[int, Float[Tensor, "prompt pos d_model"]] = field(default_factory=dict)
    """The residual stream entering each layer; always kept is what leaves the last layer that ran."""
    query: dict[int, Float[Tensor, "prompt head pos d_head"]] = field(default_factory=dict)
    """Queries, position-encoded."""
    key: dict[int, Float[Tensor, "prompt kv_head pos d_head"]] = field(default_factory=dict)
    """Keys, position-encoded."""
    value: dict[int, Float[Tensor, "prompt kv_head pos d_head"]] = field(default_factory=dict)
    """Values."""
    mask: dict[int, Float[Tensor, "#prompt 1 pos pos"]] = field(default_factory=dict)
    """Attention masks; kept with the keys."""
    pattern: dict[int, Float[Tensor, "prompt head pos pos"]] = field(default_factory=dict)
    """Attention patterns."""
    z: dict[int, Float[Tensor, "prompt pos head d_head"]] = field(default_factory=dict)
    """Each head's value before the output projection."""
    attention: dict[int, Float[Tensor, "prompt pos d_model"]] = field(default_factory=dict)
    """Each attention module's output, before any norm that the layer applies to it."""
    mlp: dict[int, Float[Tensor, "prompt pos d_model"]] = field(default_factory=dict)
    """Each MLP's output, before any norm that the layer applies to it."""


@dataclass(frozen=True)
class Edit:
    """A replacement at one place of a layer, in some copies."""

    place: Place
    """What is replaced."""
    where: Bool[Tensor, "prompt #copy window"]
    """The positions that are replaced."""
    value: Float[Tensor, "prompt #copy #window _"]
    """What stands there instead; for a pattern, its row over all keys; for `keys` and `values`, those of all positions
    of the prompt, one after the other."""
    head: int | None = None
    """Which query head, for what heads read and give."""
    copies: slice = field(default_factory=lambda: slice(None))
    """Which copies."""
    adds: bool = False
    """Whether the value is added to what stands there, instead."""

    def tail(self, n: int) -> "Edit":
        """The same at the last `n` positions of the window."""
        return replace(self, where=self.where[..., -n:], value=self.value[:, :, -n:])

    def over(self, current: Tensor, value: Tensor) -> Tensor:
        """A value where this replaces something, what stands there elsewhere."""
        return torch.where(self.where[..., None], value, current)

    def of_all_positions(
        self, seen: Float[Tensor, "prompt copy pos d_head"]
    ) -> Float[Tensor, "prompt copy pos d_head"]:
        """The value of `keys` or `values`, in the shape of those that are seen."""
        return self.value[:, :, 0].to(seen.dtype).unflatten(-1, seen.shape[2:]).expand_as(seen)

    def through(self, window: "Window") -> "Edit":
        """A replacement at all positions, seen through a window."""
        where = torch.stack([window.mask(row) for row in self.where.unbind(1)], dim=1)
        value = torch.stack([at_positions(row, window.positions) for row in self.value.unbind(1)], dim=1)
        return replace(self, where=where, value=value)


class Window:
    """The positions of each prompt from where it can change up to END, aligned at END.

    Where a prompt's window is shorter than the longest, it begins earlier than it must: nothing changes there.
    """

    def __init__(self, first: Int[Tensor, "prompt"], end: Int[Tensor, "prompt"]) -> None:
        width = int((end - first).max()) + 1
        positions = end[:, None] - torch.arange(width - 1, -1, -1, device=end.device)
        self.inside = positions >= 0
        """False where a window would begin before its prompt."""
        self.positions: Int[Tensor, "prompt window"] = positions.clamp(min=0)
        """Index of each position."""
        starts = self.positions[:, 0]
        self.hides: Bool[Tensor, "prompt past"] = torch.arange(int(starts.max()), device=end.device) >= starts[:, None]
        """Which of the recorded positions beside it are its own: nothing in it sees them as they were recorded."""

    @property
    def width(self) -> int:
        """Positions in it."""
        return self.positions.shape[1]

    def place(self, positions: Int[Tensor, "prompt kept"]) -> Int[Tensor, "prompt kept"]:
        """Where in the window positions stand; 0 for those before it."""
        return (positions - self.positions[:, -1:] + self.width - 1).clamp(min=0)

    def mask(self, positions: Bool[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt window"]:
        """A mask of positions, seen through the window."""
        return positions.gather(1, self.positions) & self.inside


class Columns(Window):
    """Chosen positions of each prompt and END, where everything else keeps what was recorded: later positions too.

    Right where nothing that changes moves from the chosen positions to the others: no head there reads it.
    """

    def __init__(self, chosen: Bool[Tensor, "prompt pos"], end: Int[Tensor, "prompt"]) -> None:
        index = torch.arange(chosen.shape[1], device=end.device)
        chosen = chosen | (index == end[:, None])
        positions = torch.where(chosen, index, -1).sort(dim=1).values[:, -int(chosen.sum(dim=1).max()) :]
        self.inside = positions >= 0
        self.positions = positions.clamp(min=0)
        self.hides = chosen


def at_positions(
    values: Float[Tensor, "prompt pos *rest"] | Int[Tensor, "prompt pos *rest"], positions: Int[Tensor, "prompt kept"]
) -> Float[Tensor, "prompt kept *rest"] | Int[Tensor, "prompt kept *rest"]:
    """Picks some positions of every prompt."""
    return values[torch.arange(len(positions), device=positions.device)[:, None], positions]
