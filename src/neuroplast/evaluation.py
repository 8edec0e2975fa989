"""A judgement from words to files: what `neuroplast evaluate` does.

A folder gets `evaluate.json` (the settings, the circuit's hash, the weights and prompts), `evaluation.json`,
`criteria.csv`, `minimality.csv`, `completeness.csv` and `evaluation.png`. What is measured is kept in `parts/` until
everything is done, so an interrupted evaluation goes on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.criteria import CriteriaSettings, require_heads
from neuroplast.circuits.edge_criteria import edge_curve, edge_faithfulness, random_edge_curve
from neuroplast.circuits.evaluate import estimate_document, evaluate
from neuroplast.circuits.files import load_circuit, require_model
from neuroplast.circuits.shape import shape_of
from neuroplast.errors import InputError, UnsupportedModelError
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.models.network import Network
from neuroplast.observer import Observer, Silent, about
from neuroplast.report.evaluation import EVALUATION_FILES, write_evaluation_report
from neuroplast.storage import Parts, hash_file, is_begun, load_json, write_json
from neuroplast.subject import MOST_PROMPTS, Subject, require_whole, versions
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import PromptSet

MARKER, RESULT = "evaluate.json", "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Subject):
    """Which circuit to judge, in which model, and how."""

    circuit: str
    """The circuit's file."""
    ablation: str = "mean-by-position"
    """What knocked-out heads give."""
    n_reference: int = 480
    """Prompts of the task that means are taken over; they are not measured. With prompts of your own, those serve."""
    n_random: int = 100
    """Matched random circuits."""
    n_subsets: int = 20
    """Random subsets for completeness."""
    greedy_steps: int = 10
    """Nodes that greedy completeness takes at most."""

    DEFAULT_PROMPTS = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("n_reference", self.n_reference)
        if not 1 <= self.n_reference <= MOST_PROMPTS:
            raise InputError(f"n_reference must be from 1 to {MOST_PROMPTS}, got {self.n_reference}")
        self.criteria()

    def criteria(self) -> dict[str, Any]:
        """The settings of the criteria."""
        kept = {name: getattr(self, name) for name in ("ablation", "n_random", "n_subsets", "greedy_steps")}
        CriteriaSettings(**kept)
        return kept

    def load_reference(self, model: Network, measured: PromptSet) -> PromptSet | None:
        """The prompts that means are taken over; None where the measured ones serve."""
        if self.prompts is not None:
            return None
        task, seed = load_task(self.task), self.seed or 0
        return task.reference(model, measured, self.n_reference, seed, counterfactual=self.counterfactual)


def run_evaluate(
    config: EvaluateConfig, out: Path | str, observer: Observer | None = None, *, memory: str | int | None = None
) -> dict[str, Any]:
    """Judges a circuit, writes the folder, and gives the document; what is measured already is not measured again.

    Args:
        config: what to judge, and how.
        out: the folder: new, empty, or of the same evaluation.
        observer: is told how it goes; by default nobody is.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for a file that is no circuit, or one of a model with other parts; a folder that holds something
            else; a wrong setting.
        StorageError: when the folder cannot be written.
    """
    config, out, observer = config.resolved(), Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    circuit = load_circuit(Path(config.circuit))
    require_heads(circuit)
    is_begun(out, MARKER, "evaluation")
    model, prompts = config.load(observer)
    require_model(circuit, shape_of(model))
    provenance = {**config.provenance(model, prompts), "circuit_sha256": hash_file(Path(config.circuit))}
    parts = Parts(out / "parts")
    with claimed(out, MARKER, "evaluation", provenance):
        if not (out / RESULT).is_file():
            document = judge(config, model, circuit, prompts, parts, observer, memory)
            write_json(out / RESULT, document | {"versions": versions()})
    document = load_json(out / RESULT)
    write_evaluation_report(document, out)
    parts.remove()
    files = {name: str(out / name) for name in (RESULT, *EVALUATION_FILES)}
    return document | {"files": files}


def judge(
    config: EvaluateConfig,
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    parts: Parts,
    observer: Observer,
    memory: str | int | None,
) -> dict[str, Any]:
    """The document of an evaluation: of its nodes, and of its edges where they have scores."""
    found = evaluate(
        model,
        circuit,
        prompts,
        reference=config.load_reference(model, prompts),
        counterfactual=config.counterfactual or "",
        memory=memory,
        parts=parts,
        progress=observer.progress,
        **config.criteria(),
    )
    return found.document() | {"edges": judge_edges(model, circuit, prompts, parts, observer, memory)}


def judge_edges(
    model: Network, circuit: Circuit, prompts: PromptSet, parts: Parts, observer: Observer, memory: str | int | None
) -> dict[str, Any]:
    """How much a circuit's own edges explain, and their ranking: by size, by who helps most, and a random one."""
    told: dict[str, Any] = {"memory": memory, "parts": parts, "progress": about(observer.progress, "edges")}
    try:
        chosen = estimate_document(edge_faithfulness(model, circuit, prompts, **told))
        curve = edge_curve(model, circuit, prompts, **told)
    except UnsupportedModelError as error:
        return {"why": str(error)}
    document = curve.document() | {"chosen": chosen}
    if curve.cmd.value is None:
        return document
    helping: dict[str, Any] = {"why": "the file does not say whether a score above 0 helps or hinders"}
    if "sign" in circuit.provenance:
        helping = edge_curve(model, circuit, prompts, rank="helping", **told).document()
    random = random_edge_curve(model, prompts, rankings=1, **told)
    return document | {"helping": helping, "random": random.document()}
