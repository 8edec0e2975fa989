"""Two checkpoints from words to files: what `neuroplast compare` and `neuroplast audit` do.

A folder gets `comparison.json` (the settings, weights and prompts), `audit.json` (everything that was found),
`prompts.jsonl`, `parts.csv`, `audit.png`, `audit.html` and `junit.xml`. What is measured is kept in `parts/` until
everything is done, so an interrupted run goes on.

A gate names what must not be: a verdict, `damaged` (any task, or text), or `damaged:TASK`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroplast.circuits.files import load_heads
from neuroplast.circuits.shape import shape_of
from neuroplast.comparison.compare import compare_document
from neuroplast.comparison.comparison import TEXT, CompareSettings
from neuroplast.comparison.text import SAMPLES
from neuroplast.comparison.verdict import LABELS, TOLERANCE, UNCHANGED
from neuroplast.errors import GateError, InputError, unknown_name
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.models.between import require_same_parts, shared_weights
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.observer import Observer, Silent
from neuroplast.report.audit_report import AUDIT_FILES, write_audit_report
from neuroplast.statistics import can_tell
from neuroplast.storage import Parts, hash_file, is_begun, load_json, telling, write_json
from neuroplast.subject import Subject, require_whole, versions
from neuroplast.tasks import TASKS, load_task
from neuroplast.tasks.records import save_records

MARKER, RESULT, PROMPTS = "comparison.json", "audit.json", "prompts.jsonl"
DAMAGED = "damaged"
UNDECIDED, ADAPTER, OWN_PROMPTS = "undecided", "adapter", "own prompts"


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Subject):
    """Which checkpoints are compared, on what, and how; `model` is the one, `tuned` the other."""

    tuned: str
    """The other checkpoint: a named model, a hub id or a folder; an adapter's folder too."""
    circuit: str | None = None
    """A circuit's file; None takes the heads that act on the logits in `model`."""
    battery: bool = True
    """Whether other tasks and text are looked at."""
    n_battery: int = 32
    """Prompts of each other task."""
    n_drift: int = 19
    """Twins that drift as far in random directions."""
    n_profiles: int = 2
    """Of these, how many at most are patched and split as well."""
    n_random: int = 1000
    """Matched random sets of heads."""
    n_samples: int = SAMPLES
    """Samples of text."""
    tolerance: float = TOLERANCE
    """Share of a task, or of a mechanism's likeness, up to which a change does not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("n_battery", self.n_battery)
        if self.n_battery < 1:
            raise InputError(f"n_battery must be at least 1, got {self.n_battery}")
        self.settings()

    @property
    def measured(self) -> str:
        """What is measured, by name; prompts of one's own are no task that is known."""
        return load_task(self.task).name if self.prompts is None else OWN_PROMPTS

    def settings(self) -> dict[str, Any]:
        """The settings of the comparison."""
        names = ("n_drift", "n_profiles", "n_random", "n_samples", "tolerance")
        kept = {name: getattr(self, name) for name in names} | {"seed": self.seed or 0}
        return asdict(CompareSettings(**kept))


def run_audit(
    config: AuditConfig,
    out: Path | str,
    observer: Observer | None = None,
    *,
    fail_on: Sequence[str] = (),
    memory: str | int | None = None,
) -> dict[str, Any]:
    """Compares two checkpoints, writes the folder, and gives the document.

    Args:
        config: what to compare, and how.
        out: the folder: new, empty, or of the same comparison.
        observer: is told how it goes; by default nobody is.
        fail_on: what must not be; the document tells in `gate`, and `require_gate` raises.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for checkpoints that cannot be compared, a folder that holds something else, a wrong setting.
        StorageError: when the folder cannot be written.
    """
    config, out, observer = config.resolved(), Path(out), observer or Silent()
    for name in fail_on:
        _require_gate(name, config)
    if memory is not None:
        parse_size(memory)
    is_begun(out, MARKER, "comparison")
    start, prompts = config.load(observer)
    end = load_model(config.tuned, device=config.device, dtype=config.dtype, say=observer.say)
    require_same_parts(start, end)
    if end.source == ADAPTER and not shared_weights(start, end):
        raise InputError(
            f"the adapter {config.tuned} leaves no weight of {config.model} as it is, so it is of another base: "
            "compare it with that one"
        )
    circuit = None if config.circuit is None else load_heads(Path(config.circuit), shape_of(start)).heads
    provenance = {**config.provenance(start, prompts), "tuned_sha256": weights_sha256(end)}
    if config.circuit is not None:
        provenance["circuit_sha256"] = hash_file(Path(config.circuit))
    parts = Parts(out / "parts")
    with claimed(out, MARKER, "comparison", provenance):
        if not (out / RESULT).is_file():
            found = compare_document(
                start,
                end,
                prompts,
                battery=config.n_battery if config.battery else 0,
                task=config.measured,
                circuit=circuit,
                memory=memory,
                parts=parts,
                progress=observer.progress,
                **config.settings(),
            )
            described = {
                "schema": 1,
                "base": {"name": config.model, "weights_sha256": provenance["weights_sha256"]},
                "tuned": {"name": config.tuned, "weights_sha256": provenance["tuned_sha256"]},
                "architecture": start.architecture,
                "task": config.measured,
            }
            write_json(out / RESULT, described | found | {"versions": versions()})
    document = load_json(out / RESULT)
    save_records(out / PROMPTS, prompts.records)
    with telling(out / RESULT):
        document["gate"] = judge_gate(document, fail_on)
        write_audit_report(document, out)
    parts.remove()
    return document | {"files": {name: str(out / name) for name in (RESULT, *AUDIT_FILES)}}


def _require_gate(name: str, config: AuditConfig) -> None:
    """Checks that it can be told whether something to fail on came true.

    Raises:
        InputError: when nothing is called so; the message suggests the nearest. When too few twins are asked for.
    """
    tasks = dict.fromkeys((*TASKS, TEXT, load_task(config.task).name))
    known = [*LABELS[1:], DAMAGED, *(f"{DAMAGED}:{task}" for task in tasks)]
    if name not in known:
        raise unknown_name("thing to fail on", name, known)
    if name in LABELS and name != UNDECIDED and not can_tell(config.n_drift):
        raise InputError(f"cannot fail on {name} with n_drift {config.n_drift}: a verdict takes 19 twins at least")


def judge_gate(document: Mapping[str, Any], fail_on: Collection[str]) -> dict[str, Any]:
    """What of `fail_on` came true, and what cannot be told."""
    label, task = document["verdict"]["label"], document["task"]
    statuses = {name: each["status"] for name, each in document["spared"].items()}
    if label != UNCHANGED.label:
        statuses[task] = document["behaviour"]["status"]
    failed: list[str] = []
    unknown: list[str] = []
    for name in fail_on if label != UNCHANGED.label else ():
        kind, _, which = name.partition(":")
        if kind != DAMAGED:
            is_true, is_unknown = name == label, label == UNDECIDED
        elif which:
            status = statuses.get(which, "undefined")
            is_true, is_unknown = status == DAMAGED, status == "undefined"
        else:
            is_true, is_unknown = DAMAGED in statuses.values(), set(statuses.values()) <= {"undefined"}
        if is_true:
            failed.append(name)
        elif is_unknown:
            unknown.append(name)
    damaged = sorted(name for name, status in statuses.items() if status == DAMAGED)
    return {"fail_on": list(fail_on), "failed": failed, "unknown": unknown, "damaged": damaged}


def require_gate(document: Mapping[str, Any]) -> None:
    """Ends where a gate says no.

    Raises:
        GateError: something came true that was asked to fail on.
        InputError: it cannot be told whether it did.
    """
    gate = document["gate"]
    if gate["failed"]:
        damaged = f" Damaged: {', '.join(gate['damaged'])}." if gate["damaged"] else ""
        raise GateError(f"failed on {', '.join(gate['failed'])}: {document['verdict']['statement']}{damaged}")
    if gate["unknown"]:
        name = gate["unknown"][0]
        found = document["spared"].get(name.partition(":")[2])
        why = document["verdict"]["statement"].rstrip(".") if found is None else found["why"]
        raise InputError(f"cannot tell {name}: {why}; leave it out of --fail-on")
