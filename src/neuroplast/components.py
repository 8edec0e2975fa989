"""Names for the parts of a model.

| name | part |
|---|---|
| `input` | the embedding: the residual stream entering layer 0 |
| `a23.h3` | a head; its value z is what is patched |
| `a23.h3<q>` | what a head reads: its query; its key (`<k>`) or value (`<v>`), as all later queries see it |
| `a23.h3<pattern>` | what one query makes of the others: its row of the attention pattern |
| `a23.h3<keys>` | the keys of all positions, as one query sees them; in the same way the values (`<values>`) |
| `a23` | a whole attention block: its output |
| `m11` | an MLP |
| `r5` | the residual stream entering layer 5 |
| `logits` | the end |

Each may stand at a position: `a23.h3@end`. An edge is `a20.h0->a23.h3<q>`.

The weights are named alike: a head's maps `a23.h3<q>`, `<k>`, `<v>` and `<o>`, the bias behind a layer's heads
`a23<bias>`, `m11`, the norms of a layer `norm11`, `input` (embedding), `norm` (the last one), `logits` (unembedding).
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from neuroplast.errors import InputError

NodeKind = Literal["input", "head", "attention", "mlp", "residual", "logits"]
ReadChannel = Literal["q", "k", "v"]
"""What a head reads the residual stream through."""
Channel = ReadChannel | Literal["pattern", "keys", "values"]
READ_CHANNELS: tuple[ReadChannel, ...] = ("q", "k", "v")

Kind = Literal["q", "k", "v", "o", "bias", "mlp", "norm", "embedding", "unembedding"]
"""What a part of the weights is for."""
HEAD_KINDS: tuple[Kind, ...] = ("q", "k", "v", "o")
LAYER_KINDS: tuple[Kind, ...] = ("bias", "mlp", "norm")

_HEAD = re.compile(
    r"^(?:a(\d+)\.h(\d+)|(\d+)\.(\d+)|L(\d+)H(\d+)|\((\d+),\s*(\d+)\))(?:<(q|k|v|pattern|keys|values)>)?$",
    re.IGNORECASE,
)
_LAYER = re.compile(r"^([amr])(\d+)$", re.IGNORECASE)
CHANNELS: dict[str, Channel] = {channel: channel for channel in (*READ_CHANNELS, "pattern", "keys", "values")}
_LAYER_KINDS: dict[str, NodeKind] = {"a": "attention", "m": "mlp", "r": "residual"}
_DIGITS = 9
"""More digits than that are no index; Python refuses to convert some thousand of them."""


@dataclass(frozen=True)
class Node:
    """One part of a model, optionally at one named position."""

    kind: NodeKind
    """`input`, `head`, `attention`, `mlp`, `residual` or `logits`."""
    layer: int | None = None
    """Layer index from 0; None for `input` and `logits`."""
    head: int | None = None
    """Head index from 0; None unless `kind` is `head`."""
    position: str | None = None
    """A named position of the task, such as `end`, or a token index; None means every position."""
    channel: Channel | None = None
    """What of a head, by the table above; None is the head itself, its output z."""

    def __post_init__(self) -> None:
        if (self.layer is not None) != (self.kind not in ("input", "logits")):
            raise InputError(f"a node of kind {self.kind!r} got layer {self.layer!r}")
        if (self.head is not None) != (self.kind == "head"):
            raise InputError(f"a node of kind {self.kind!r} got head {self.head!r}")
        indices: tuple[Any, Any] = (self.layer, self.head)
        position: Any = self.position
        for index in indices:
            if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
                raise InputError(f"a node of kind {self.kind!r} got index {index!r}; indices count from 0")
        if position is not None and not (isinstance(position, str) and position):
            raise InputError(f"a node got position {position!r}; expected a name, a token index as text, or None")
        if self.channel is not None and self.kind != "head":
            raise InputError(f"a node of kind {self.kind!r} got channel {self.channel!r}; only heads have channels")

    def __str__(self) -> str:
        letters = {"attention": "a", "mlp": "m", "residual": "r"}
        name = f"{letters[self.kind]}{self.layer}" if self.kind in letters else self.kind
        if self.kind == "head":
            name = f"a{self.layer}.h{self.head}" + (f"<{self.channel}>" if self.channel else "")
        return name + (f"@{self.position}" if self.position else "")

    def at(self, position: str | None) -> "Node":
        """The same part at another position."""
        return replace(self, position=position)

    @property
    def depth(self) -> float:
        """Where the part stands in a forward pass: a part can change only parts of greater depth."""
        if self.layer is None:
            return -1.0 if self.kind == "input" else float("inf")
        return self.layer + {"residual": -0.25, "mlp": 0.5}.get(self.kind, 0.0)


@dataclass(frozen=True)
class Edge:
    """What one part reads of another: `a20.h0->a23.h3<q>`."""

    source: Node
    """`input`, a head or an MLP."""
    destination: Node
    """A head's `<q>`, `<k>` or `<v>`, an MLP, or `logits`."""

    def __post_init__(self) -> None:
        if self.source.kind not in ("input", "head", "mlp") or self.source.channel:
            raise InputError(f"an edge begins at input, a head or an MLP, got {self.source}")
        if not is_receiver(self.destination):
            raise InputError(f"an edge ends at a head's <q>, <k> or <v>, an MLP or logits, got {self.destination}")
        if not self.source.depth < self.destination.depth:
            raise InputError(f"no edge {self}: {self.destination} is computed before {self.source}")

    def __str__(self) -> str:
        return f"{self.source}->{self.destination}"

    def anywhere(self) -> "Edge":
        """The same edge without positions."""
        return Edge(self.source.at(None), self.destination.at(None))


@dataclass(frozen=True)
class Component:
    """A part of the weights."""

    kind: Kind
    """`q`, `k`, `v`, `o` of a head, `bias` behind a layer's heads, `mlp`, `norm`, `embedding`, `unembedding`."""
    layer: int | None = None
    """Layer; None outside the layers."""
    head: int | None = None
    """Query head, for `q`, `k`, `v` and `o`."""

    def __str__(self) -> str:
        if self.head is not None:
            return f"a{self.layer}.h{self.head}<{self.kind}>"
        letters = {"bias": "a{}<bias>", "mlp": "m{}", "norm": "norm{}"}
        if self.layer is not None:
            return letters[self.kind].format(self.layer)
        return {"embedding": "input", "unembedding": "logits"}.get(self.kind, self.kind)

    @property
    def part(self) -> str:
        """The part of the model that it belongs to: its head, or itself."""
        return str(self) if self.head is None else f"a{self.layer}.h{self.head}"


def is_receiver(node: Node) -> bool:
    """Whether a node names an input of the model's parts: a head's q, k or v, an MLP, or the logits."""
    return node.channel in READ_CHANNELS or node.kind in ("mlp", "logits")


def parse_node(text: str) -> Node:
    """Reads a node's name.

    Args:
        text: a name of the table above, optionally with `@position`; for heads also `23.3`, `L23H3` and `(23, 3)`.

    Raises:
        InputError: when the text is none of these.
    """
    name, at, position = text.strip().partition("@")
    where = position or None
    if name in ("input", "logits") and not (at and not position):
        return Node("input" if name == "input" else "logits", position=where)
    longest = max(map(len, re.findall(r"\d+", name)), default=0)
    if longest <= _DIGITS and not (at and not position):
        if match := _HEAD.match(name):
            *indices, channel = match.groups()
            layer, head = (int(part) for part in indices if part is not None)
            return Node("head", layer, head, where, CHANNELS[channel.lower()] if channel else None)
        if match := _LAYER.match(name):
            return Node(_LAYER_KINDS[match.group(1).lower()], int(match.group(2)), position=where)
    raise InputError(
        f"not the name of a node: {text[:60]!r}; expected input, a head such as a23.h3 or a23.h3<q>, "
        "an attention block such as a23, an MLP such as m11, a residual stream such as r5, or logits, "
        "optionally with @position"
    )


def parse_group(text: str) -> tuple[Node, ...]:
    """Reads nodes that are patched together, such as `a0.h1+m0@s2`.

    A position may hold a plus too, as `s1+1` does: only where another node begins, a plus joins nodes.

    Raises:
        InputError: when the text is no group.
    """
    names: list[str] = []
    for piece in text.split("+"):
        if names and not _is_node(piece):
            names[-1] += f"+{piece}"
        else:
            names.append(piece)
    return tuple(parse_node(name) for name in names)


def _is_node(text: str) -> bool:
    try:
        parse_node(text)
    except InputError:
        return False
    return True


def parse_edge(text: str) -> Edge:
    """Reads an edge's name, such as `a20.h0->a23.h3<q>` or `m3->logits`.

    Raises:
        InputError: when the text is no edge.
    """
    source, arrow, destination = str(text).partition("->")
    if not arrow:
        raise InputError(f"not the name of an edge: {str(text)[:60]!r}; expected SOURCE->DESTINATION")
    return Edge(parse_node(source), parse_node(destination))
