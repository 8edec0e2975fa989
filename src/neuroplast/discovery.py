"""A circuit from words to files: what `neuroplast discover` does.

A folder gets `discover.json` (the settings, and the weights and prompts that were measured), `circuit.json`,
`circuit.svg` and `circuit.png`, `nodes.csv`, `edges.csv`, `steps.json` (each step's candidates and cuts) and
`prompts.jsonl`. What is measured is kept in `parts/` until the circuit is whole, so an interrupted discovery goes on.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.discover import METHODS, SETTINGS, discover, require_settings
from neuroplast.circuits.evaluate import circuit_document
from neuroplast.circuits.files import load_circuit, save_circuit
from neuroplast.errors import InputError, NothingFoundError, unknown_name
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.observer import Observer, Silent
from neuroplast.report.circuit import write_circuit_report
from neuroplast.storage import Parts, is_begun, write_json, write_jsonl
from neuroplast.subject import Subject, spelled, versions

MARKER, CIRCUIT = "discover.json", "circuit.json"
METHOD_SETTINGS = ("threshold", "attention", "positions", "backups", "select", "n", "steps", "prune")
"""Settings that some methods have and others do not."""


@dataclass(frozen=True, kw_only=True)
class DiscoverConfig(Subject):
    """What to look for, and how. Settings that are None take what suits the method."""

    method: str = "path"
    """`path`, or by edges `eap`, `eap-ig`, `ceap`, `exact`."""
    threshold: float | None = None
    """Least effect as a share of |LD|."""
    attention: float | None = None
    """Of `path`: keys and values are read where a head attends at least this much."""
    positions: str | None = None
    """Of `path`: the named positions to look at, parted by commas."""
    backups: bool | None = None
    """Of `path`: whether to look again with the movers knocked out."""
    select: str | None = None
    """By edges: `top-n`, `threshold` or `greedy`."""
    n: int | None = None
    """By edges: how many."""
    steps: int | None = None
    """Of `eap-ig` and `ceap`: points on the way."""
    prune: float | None = None
    """By edges: then remove, one at a time, edges that change LD by less than this share, exactly."""

    DEFAULT_PROMPTS = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and name not in SETTINGS[self.method]:
                having = [method for method, settings in SETTINGS.items() if name in settings]
                raise InputError(
                    f"method {self.method!r} has no setting {spelled(name)}: it is for {', '.join(having)}"
                )
        require_settings(self.method, self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings of the method that were given."""
        values = {name: getattr(self, name) for name in METHOD_SETTINGS}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        if self.positions is not None:
            given["positions"] = tuple(part.strip() for part in self.positions.split(",") if part.strip())
        return given


def run_discover(
    config: DiscoverConfig, out: Path | str, observer: Observer | None = None, *, memory: str | int | None = None
) -> dict[str, Any]:
    """Finds a circuit, writes the folder, and gives a summary; what the folder has already is not done again.

    Args:
        config: what to look for.
        out: the folder: new, empty, or of the same discovery.
        observer: is told how it goes; by default nobody is.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        NothingFoundError: when nothing passes.
        InputError: for a wrong setting, or a folder that holds something else.
        StorageError: when the folder cannot be written.
    """
    config, out, observer = config.resolved(), Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    is_begun(out, MARKER, "discovery")
    model, prompts = config.load(observer)
    provenance = config.provenance(model, prompts)
    parts = Parts(out / "parts")
    with claimed(out, MARKER, "discovery", provenance):
        if not (out / CIRCUIT).is_file():
            try:
                found = discover(
                    model,
                    prompts,
                    method=config.method,
                    memory=memory,
                    parts=parts,
                    progress=observer.progress,
                    say=observer.say,
                    **config.settings(),
                )
            except NothingFoundError:
                parts.remove()
                raise
            shape = replace(found.shape, weights_sha256=provenance["weights_sha256"])
            kept = {**found.provenance, "counterfactual": config.counterfactual, "seed": config.seed}
            save_circuit(out / CIRCUIT, replace(found, shape=shape, provenance={**kept, "versions": versions()}))
    circuit = load_circuit(out / CIRCUIT)
    write_jsonl(out / "prompts.jsonl", (record.row() for record in prompts.records))
    write_json(out / "steps.json", {"steps": circuit.provenance.get("steps", [])})
    write_circuit_report(circuit, out)
    parts.remove()
    return summarise(circuit, out)


def summarise(circuit: Circuit, out: Path) -> dict[str, Any]:
    """What the command prints."""
    return {
        "schema": 1,
        "model": circuit.shape.name,
        "method": circuit.provenance.get("method"),
        "n_prompts": circuit.provenance.get("n_prompts"),
        "circuit": circuit_document(circuit),
        "nodes": [
            {
                "node": str(node),
                "score": score,
                "role": circuit.roles[node].name if node in circuit.roles else None,
                "why": circuit.roles[node].why if node in circuit.roles else None,
            }
            for node, score in circuit.nodes.items()
            if node.kind == "head"
        ],
        "stability": circuit.provenance.get("stability"),
        "files": {name: str(out / f"circuit.{name}") for name in ("json", "svg", "png")},
    }
