"""Circuits that were published: to judge them again, here or in another checkpoint, and to compare new ones with them.

`ioi-gpt2` is the circuit of GPT-2 small for indirect object identification (Wang, Variengien, Conmy, Shlegeris and
Steinhardt 2022, arXiv 2211.00593). What is taken from where:

- Heads, classes and positions: figure 2 and section 3; appendices C (0.10, 5.8 and 5.9), D (previous token heads) and
  F (backups). The released code (Easy-Transformer, `ioi_circuit_extraction.py`) keeps the same 26 heads at the same
  positions: END, S2, and S1+1, which it calls S+1.
- Edges: paths between classes, expanded to all their heads. The paper measured the paths into the name movers' queries
  (section 3.2), the S-inhibition heads' values (3.3) and keys (appendix C) at S2, the induction heads' keys at S1+1
  (appendix D), and into the logits (3.1; backups: 3.4). It did not measure the queries of backup and negative name
  movers, nor the values of induction heads; here they are taken to read what their class reads. Not every head is said
  to take part in every path of its class: the values at S2 read 3.0, 0.1, 5.5 and 6.9, the keys also 0.10, 5.8, 5.9.
- Sets K for minimality: figure 20 (appendix K), which lists K ∪ {v}. For the backups 11.2, 10.6, 10.10, 10.2, 9.7 and
  10.1 it only says "all previous" movers, and its rows are in order of score, not of K. The order is that of the
  released code (`minimality.py`); the paper's own values agree: each row's F(C∖K) is the F(C∖(K∪{v})) of the head
  before it, and of no other. For 11.9 and 9.0 it is all name movers, backups too, and the negative ones.
- Sets K that greedy search found for completeness: figure 22, the four of the full circuit.

Scores of single heads and edges are only drawn in the paper, not printed, so there are none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from neuroplast.circuits.circuit import Circuit, Role, Shape
from neuroplast.components import Edge, Node, ReadChannel, parse_node
from neuroplast.errors import unknown_name

PUBLISHED = ("ioi-gpt2",)
"""Names of the circuits."""

SOURCE = "Wang et al. 2022, arXiv 2211.00593"

_GPT2 = Shape("gpt2", n_layers=12, n_heads=12, d_model=768)
_PREVIOUS, _DUPLICATE, _INDUCTION, _INHIBITION = "previous token", "duplicate token", "induction", "S-inhibition"
_MOVER, _BACKUP, _NEGATIVE = "name mover", "backup name mover", "negative name mover"


@dataclass(frozen=True)
class _Class:
    """Heads that do the same at one position."""

    position: str
    heads: str
    """In the paper's spelling and order."""
    why: str


_CLASSES: Mapping[str, _Class] = {
    _PREVIOUS: _Class("s1+1", "2.2 4.11", "attends from S1+1 to S1 and copies S there (appendix D)"),
    _DUPLICATE: _Class("s2", "0.1 0.10 3.0", "attends from S2 to S1 and tells its place (section 3.3, appendix C)"),
    _INDUCTION: _Class("s2", "5.5 5.8 5.9 6.9", "attends from S2 to S1+1 (section 3.3, appendix C)"),
    _INHIBITION: _Class("end", "7.3 7.9 8.6 8.10", "attends to S2 and turns the movers away from S (section 3.2)"),
    _NEGATIVE: _Class("end", "10.7 11.10", "writes against the names that it attends to (section 3.1)"),
    _MOVER: _Class("end", "9.9 10.0 9.6", "attends to IO and copies it to the output (section 3.1)"),
    _BACKUP: _Class(
        "end", "10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9", "moves a name once the name movers are gone (section 3.4)"
    ),
}
_MOVERS = (_NEGATIVE, _MOVER, _BACKUP)

_PATHS: tuple[tuple[tuple[str, ...], tuple[ReadChannel, ...], tuple[str, ...], str], ...] = (
    ((_PREVIOUS,), ("k", "v"), (_INDUCTION,), "s1+1"),
    ((_DUPLICATE, _INDUCTION), ("k", "v"), (_INHIBITION,), "s2"),
    ((_INHIBITION,), ("q",), _MOVERS, "end"),
)
"""Classes that write, what is read, classes that read it, and where."""

_IN_ORDER = "9.9 10.0 9.6 10.10 10.6 10.2 10.1 11.2 9.7"
"""Movers that are knocked out one after the other: K of each is those before it."""
_AFTER_NEGATIVE = "5.8 5.9"
"""Induction heads whose K is the negative name movers."""
_AFTER_ALL = "9.0 11.9"
"""Backups whose K is all other movers, the negative ones too."""
_GREEDY = ("9.9 9.6 5.8 5.5 2.2", "9.9 11.10 10.7 8.6 5.8 4.11", "10.7 5.5 2.2 4.11", "9.9 11.10 10.7 11.2 3.0 5.8 2.2")


def published_circuit(name: str = "ioi-gpt2") -> Circuit:
    """A circuit as it was published: heads at their positions with their roles, and edges; no scores.

    Raises:
        InputError: for a name that is not in `PUBLISHED`.
    """
    classes = published_classes(name)
    edges = {
        Edge(source, Node("head", reader.layer, reader.head, position, channel)): None
        for sources, channels, readers, position in _PATHS
        for channel in channels
        for reader in _members(classes, readers)
        for source in _members(classes, sources)
    }
    logits = Node("logits", position="end")
    edges |= {Edge(mover, logits): None for mover in _members(classes, _MOVERS)}
    return Circuit(
        _GPT2,
        dict.fromkeys(_members(classes, tuple(classes))),
        edges,
        roles={node: Role(role, _CLASSES[role].why) for role, nodes in classes.items() for node in nodes},
        positions=("s1+1", "s2", "end"),
        provenance={
            "method": "published",
            "source": f"{SOURCE}, figure 2",
            "task": "ioi",
            "edges": "paths between classes, expanded to all their heads",
        },
    )


@cache
def published_classes(name: str = "ioi-gpt2") -> Mapping[str, tuple[Node, ...]]:
    """The classes of a circuit's heads, from the inputs to the outputs: K by class, for completeness.

    Raises:
        InputError: for a name that is not in `PUBLISHED`.
    """
    if name not in PUBLISHED:
        raise unknown_name("published circuit", name, PUBLISHED)
    return {role: _nodes(each.heads, each.position) for role, each in _CLASSES.items()}


def minimality_sets(name: str = "ioi-gpt2") -> Mapping[Node, tuple[Node, ...]]:
    """For each head v the set K, without v, that its minimality was published with.

    Raises:
        InputError: for a name that is not in `PUBLISHED`.
    """
    classes = published_classes(name)
    found = {v: tuple(other for other in nodes if other != v) for nodes in classes.values() for v in nodes}
    found |= dict.fromkeys(_nodes(_AFTER_NEGATIVE, "s2"), classes[_NEGATIVE])
    in_order = _nodes(_IN_ORDER, "end")
    found |= {v: in_order[:before] for before, v in enumerate(in_order)}
    movers = _members(classes, _MOVERS)
    return found | {v: tuple(other for other in movers if other != v) for v in _nodes(_AFTER_ALL, "end")}


def greedy_sets(name: str = "ioi-gpt2") -> tuple[tuple[Node, ...], ...]:
    """Sets K for which greedy search found the circuit least complete.

    Raises:
        InputError: for a name that is not in `PUBLISHED`.
    """
    heads = {node.at(None): node for nodes in published_classes(name).values() for node in nodes}
    return tuple(tuple(heads[head] for head in _nodes(each, None)) for each in _GREEDY)


def _nodes(heads: str, position: str | None) -> tuple[Node, ...]:
    return tuple(parse_node(head).at(position) for head in heads.split())


def _members(classes: Mapping[str, tuple[Node, ...]], roles: tuple[str, ...]) -> tuple[Node, ...]:
    return tuple(node for role in roles for node in classes[role])
