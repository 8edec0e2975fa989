"""Names for the parts of a model: `input`, head `a23.h3`, MLP `m11`, `logits`; with a position `a23.h3@end`."""

import re
from dataclasses import dataclass
from typing import Literal

from neuroplast.errors import InputError

NodeKind = Literal["input", "head", "mlp", "logits"]

_HEAD = re.compile(r"^(?:a(\d+)\.h(\d+)|(\d+)\.(\d+)|L(\d+)H(\d+)|\((\d+),\s*(\d+)\))$", re.IGNORECASE)
_MLP = re.compile(r"^m(\d+)$", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Node:
    """One part of a model, optionally at one named position."""

    kind: NodeKind
    """`input`, `head`, `mlp` or `logits`."""
    layer: int | None = None
    """Layer index from 0; None for `input` and `logits`."""
    head: int | None = None
    """Head index from 0; None unless `kind` is `head`."""
    position: str | None = None
    """A named position of the task, such as `end`; None means every position."""

    def __post_init__(self) -> None:
        if (self.layer is not None) != (self.kind in ("head", "mlp")):
            raise InputError(f"a node of kind {self.kind!r} got layer {self.layer!r}")
        if (self.head is not None) != (self.kind == "head"):
            raise InputError(f"a node of kind {self.kind!r} got head {self.head!r}")

    def __str__(self) -> str:
        names = {"head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}
        return names.get(self.kind, self.kind) + (f"@{self.position}" if self.position else "")


def parse_node(text: str) -> Node:
    """Reads a node's name.

    Args:
        text: `a23.h3`, `m11`, `input` or `logits`, optionally with `@position`; for heads also `23.3`,
            `L23H3` and `(23, 3)`.

    Raises:
        InputError: when the text is none of these.
    """
    name, _, position = text.strip().partition("@")
    where = position or None
    if name in ("input", "logits"):
        return Node("input" if name == "input" else "logits", position=where)
    if match := _HEAD.match(name):
        layer, head = (int(part) for part in match.groups() if part is not None)
        return Node("head", layer, head, where)
    if match := _MLP.match(name):
        return Node("mlp", int(match.group(1)), position=where)
    raise InputError(
        f"not the name of a node: {text!r}; expected input, a LAYER.h HEAD such as a23.h3, "
        "an MLP such as m11, or logits, optionally with @position"
    )
