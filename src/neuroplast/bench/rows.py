"""The rows of the table, in their order."""

from collections.abc import Callable, Mapping, Sequence

from neuroplast.bench import checkpoints, circuits, sweeps
from neuroplast.bench.job import Job, Setting
from neuroplast.errors import unknown_name

ROWS: Mapping[str, Callable[[Setting], Job]] = {
    "heads-to-logits": sweeps.heads_to_logits,
    "heads-to-queries": sweeps.heads_to_queries,
    "activations": sweeps.activations,
    "edges": sweeps.edges,
    "discovery": circuits.discovery,
    "criteria": circuits.criteria,
    "ledger": checkpoints.ledger,
    "training": checkpoints.training,
    "study": checkpoints.study,
}
"""What makes each row ready to run, by the row's name."""


def choose_rows(names: Sequence[str]) -> tuple[str, ...]:
    """The rows of some names, in the order of the table; all where none is named.

    Raises:
        InputError: for a name that is none.
    """
    for name in names:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    return tuple(name for name in ROWS if not names or name in names)
