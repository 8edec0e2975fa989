"""From words to what is patched: `heads@s2, m3, a0.h1+a0.h2@end` for one model and one set of prompts.

A list is parted by commas. An item is a node (`a23.h3@end`), a word for many nodes, or several nodes joined by `+`,
which are patched together. Behind `@` stands a named position of the task, a token index, `other` for all positions
that have no name, or `each` for every named position in turn; without it, all positions are patched at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from neuroplast.components import CHANNELS, Node, is_receiver, parse_group, parse_node
from neuroplast.errors import InputError, unknown_name
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

Group = tuple[Node, ...]
"""Nodes that are patched together."""
Selection = str | Node | Iterable["str | Node | Sequence[str | Node]"]
"""Words, nodes or groups, as a user gives them."""

EACH = "each"
OTHER = "other"
"""All positions up to END that have no name, at once."""
NAMES = ("input", "logits")
EXAMPLE = "names such as a3.h1"
SENDER_WORDS = ("heads", "mlps", "input", "all")
DESTINATION_WORDS = ("q", "k", "v", "mlps", "logits", "all")
SITE_WORDS = ("heads", *CHANNELS, "attention", "mlps", "residual")


def select_senders(selection: Selection, model: Network, prompts: PromptSet) -> tuple[Group, ...]:
    """The senders of path patching or of edges: `heads`, `mlps`, `input`, `all`, nodes and groups.

    Raises:
        InputError: for a name that is none, or a part that the model does not have.
    """
    groups = _select(selection, SENDER_WORDS, model, prompts)
    for node in (node for group in groups for node in group):
        if node.kind not in ("input", "head", "mlp") or node.channel is not None:
            raise InputError(f"{node} cannot send: senders are heads, MLPs and the input")
    return groups


def select_receivers(selection: Selection, model: Network, prompts: PromptSet) -> Group:
    """The receivers of path patching: `logits`, or heads' q, k and v and MLPs, set together.

    Raises:
        InputError: for a name that is none, a part that the model does not have, or logits beside other receivers.
    """
    nodes = tuple(node for group in _select(selection, ("logits",), model, prompts) for node in group)
    _require_receivers(nodes)
    if any(node.kind == "logits" for node in nodes):
        if len(nodes) > 1:
            raise InputError("logits cannot be set together with other receivers: nothing else counts then")
        return (Node("logits", position="end"),)
    return nodes


def select_destinations(selection: Selection, model: Network, prompts: PromptSet) -> Group:
    """The ends of edges, one by one: `q`, `k`, `v`, `mlps`, `logits`, `all`, or nodes such as `a23.h3<q>`.

    Raises:
        InputError: for a name that is none, or a part that the model does not have.
    """
    if selection == "all":
        selection = DESTINATION_WORDS[:-1]
    nodes = tuple(node for group in _select(selection, DESTINATION_WORDS, model, prompts) for node in group)
    _require_receivers(nodes)
    return nodes


def select_sites(selection: Selection, model: Network, prompts: PromptSet) -> tuple[Group, ...]:
    """The places of activation patching: words of `SITE_WORDS`, nodes and groups.

    Raises:
        InputError: for a name that is none, or a part that the model does not have.
    """
    groups = _select(selection, SITE_WORDS, model, prompts)
    if any(node.kind == "logits" for group in groups for node in group):
        raise InputError("logits cannot be patched: they are what is measured")
    return groups


def position_mask(prompts: PromptSet, position: str | None) -> Bool[Tensor, "prompt pos"]:
    """The positions that a node's position names, on every prompt; none after END.

    Args:
        prompts: the prompts.
        position: a named position, a token index, `other` for all without a name, or None for all.

    Raises:
        InputError: when the prompts have no such position.
    """
    index = torch.arange(prompts.clean.shape[1], device=prompts.positions["end"].device)
    end = prompts.positions["end"][:, None]
    if position is None:
        return index <= end
    if position in prompts.positions:
        return index == prompts.positions[position][:, None]
    if position == OTHER:
        named = torch.stack([index == place[:, None] for place in prompts.positions.values()]).any(dim=0)
        return (index <= end) & ~named
    if position.isdecimal() and len(position) < 9:
        if int(position) > int(end.min()):
            raise InputError(f"position {position}: the shortest prompt has tokens 0 to {int(end.min())} only")
        return (index == int(position)).expand(len(prompts), -1).clone()
    raise unknown_name("position", position, [*prompts.positions, OTHER, EACH])


def require_prompts(prompts: PromptSet) -> None:
    """Checks that there is something to measure on.

    Raises:
        InputError: when there are no prompts.
    """
    if not len(prompts):
        raise InputError("there are no prompts: an effect needs at least one")


def _select(selection: Selection, words: Sequence[str], model: Network, prompts: PromptSet) -> tuple[Group, ...]:
    require_prompts(prompts)
    items: Any = [selection] if isinstance(selection, str | Node) else selection
    if not isinstance(items, Iterable):
        raise InputError(f"not a selection: {items!r}; expected words, names, nodes, or a list of them")
    groups: list[Group] = []
    for item in items:
        if isinstance(item, Node):
            groups += _spread((item,), prompts)
        elif isinstance(item, tuple | list):
            nodes = [part if isinstance(part, Node) else parse_node(str(part)) for part in item]
            if not nodes:
                raise InputError("a group of nodes is empty: leave it out")
            groups += _spread(tuple(nodes), prompts)
        else:
            for text in _split(str(item)):
                groups += _expand(text, words, model, prompts)
    if not groups:
        raise InputError(f"nothing is selected by {str(selection)!r}; expected {', '.join((*words, EXAMPLE))}")
    nodes = [node for group in groups for node in group]
    for node in nodes:
        _require_part(node, model)
    for position in {node.position for node in nodes}:
        position_mask(prompts, position)
    return tuple(groups)


def _split(text: str) -> list[str]:
    """Parts a list at its commas, but not inside `(23, 3)`."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _expand(text: str, words: Sequence[str], model: Network, prompts: PromptSet) -> list[Group]:
    word, _, position = text.partition("@")
    if text.endswith("@"):
        raise InputError(f"{text!r}: a position must stand behind @, such as end")
    if word in words and word not in NAMES:
        groups = [(node.at(position or None),) for node in _nodes_of(word, model)]
        return [spread for group in groups for spread in _spread(group, prompts)]
    if word.isalpha() and word not in NAMES:
        raise unknown_name("selection", word, [*words, EXAMPLE])
    return _spread(parse_group(text), prompts)


def _spread(group: Group, prompts: PromptSet) -> list[Group]:
    """A group at `each` position becomes a group for every named position."""
    if all(node.position != EACH for node in group):
        return [group]
    return [tuple(node.at(name) if node.position == EACH else node for node in group) for name in prompts.positions]


def _nodes_of(word: str, model: Network) -> list[Node]:
    layers = range(model.n_layers)
    if word == "heads" or word in CHANNELS:
        channel = CHANNELS.get(word)
        return [Node("head", layer, head, channel=channel) for layer in layers for head in range(model.n_heads)]
    if word == "input":
        return [Node("input")]
    if word == "all":
        return [node for part in ("input", "heads", "mlps") for node in _nodes_of(part, model)]
    if word == "mlps":
        return [Node("mlp", layer) for layer in layers]
    return [Node("attention" if word == "attention" else "residual", layer) for layer in layers]


def _require_receivers(nodes: Iterable[Node]) -> None:
    for node in nodes:
        if not is_receiver(node):
            read = replace(node, channel="q") if node.kind == "head" and not node.channel else None
            hint = f"; did you mean {read}, <k> or <v>?" if read else ""
            raise InputError(f"{node} cannot receive: receivers are a head's <q>, <k>, <v>, MLPs and logits{hint}")
        if node.kind == "logits" and node.position not in (None, "end"):
            raise InputError(f"{node}: the logits are read at the end only; leave out @{node.position}")


def _require_part(node: Node, model: Network) -> None:
    if node.layer is not None and node.layer >= model.n_layers:
        raise InputError(f"{node}: {model.name} has layers 0 to {model.n_layers - 1}")
    if node.head is not None and node.head >= model.n_heads:
        raise InputError(f"{node}: {model.name} has heads 0 to {model.n_heads - 1} in a layer")
    if node.kind == "mlp":
        model.require_mlps()
