"""A finished run read back from disk: every measured stage, the training curves, the claims.

Only JSON is read. The order of stages is that of `summary.json`; the last entry of an id is its final
point (`stages/<id>/measures.json`), the ones before are its ladder (`stages/<id>/epoch-<k>/measures.json`). A point
in which a circuit was looked for, or base's was tried, has `criteria.json` beside it, and `circuit.json` where one was
found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.files import load_circuit
from neuroplast.errors import InputError, StorageError
from neuroplast.report.documents import REMEDY, Document, load_document
from neuroplast.storage import load_jsonl

Kind = Literal["base", "tuned", "poisoned", "recovered", "control"]
Matrix = tuple[tuple[float, ...], ...]

RESTORATION_ROWS = (
    "behaviour",
    "mechanism",
    "damage_undone",
    "structure",
    "structure_edges",
    "function",
    "transfer",
)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why there is none."""

    value: float | None
    """The estimate; None where it is undefined or was not measured."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval over prompts."""
    why: str | None = None
    """Why `value` is None."""

    @property
    def known(self) -> float:
        """The value of an estimate that cannot be missing: a logit difference, a head effect."""
        if self.value is None:
            raise ValueError("an estimate that cannot be missing has no value")
        return self.value


def numbers(found: Estimate, digits: int = 4) -> list[float] | None:
    """Value, and the ends of the interval where there is one, for a script; None where there is no value."""
    if found.value is None:
        return None
    return [round(number, digits) for number in (found.value, *(found.interval or ()))]


@dataclass(frozen=True)
class Behaviour:
    """What a stage does on the task."""

    logit_diff: Estimate
    """Mean logit difference, right minus wrong answer."""
    accuracy: Estimate
    """Share of prompts with a positive logit difference."""
    top1: Estimate
    """Share of prompts whose most likely token is the right answer."""
    foil_top1: float | None
    """Share of prompts whose most likely token is the wrong answer."""
    answer_probability: float | None
    """Mean probability of the right answer; of several, the sum."""
    prob_diff: float | None
    """Mean probability difference, right minus wrong answers."""
    by_group: tuple[tuple[str, float], ...]
    """Mean logit difference of each group of prompts, such as a template order."""


@dataclass(frozen=True)
class HeadEffects:
    """Change of the logit difference when each head alone is patched from the counterfactual."""

    mean: Matrix
    """Mean over prompts, `[layer][head]`; negative: the head helps."""
    low: Matrix
    """Lower end of the 95 % bootstrap interval."""
    high: Matrix
    """Upper end of the 95 % bootstrap interval."""


@dataclass(frozen=True)
class RestorationRow:
    """One way to say how far a recovered stage is back at base."""

    name: str
    """One of `RESTORATION_ROWS`."""
    recovered: Estimate
    """Measured on the recovered stage."""
    control: Estimate
    """The same measured on the equal-step control."""
    floor: float | None
    """What base's own circuits reach on bootstrap resamples of the prompts; None where that is not measured."""


@dataclass(frozen=True)
class RandomCircuits:
    """What random circuits of the same shape give."""

    n: int
    """How many were drawn."""
    mean: float | None
    """Their mean."""
    largest: float | None
    """The best of them."""
    unit: str
    """Of both: a share of F(M), or logits where F(M) gives no ratio."""


@dataclass(frozen=True)
class Criteria:
    """How a stage's circuit was judged in the stage's own model."""

    model: Estimate
    """F(M): logit difference of the whole model."""
    circuit: Estimate
    """F(C): with every other head knocked out."""
    nothing: Estimate
    """F(∅): with every head knocked out."""
    faithfulness: Estimate
    """F(C) / F(M)."""
    foil_faithfulness: Estimate
    """The same of foil minus answer, for a model that prefers the foil."""
    completeness_gap: Estimate
    """F(C∖K) - F(M∖K) of the K where it is largest."""
    minimality: Estimate
    """The least of all nodes."""
    passing: int
    """Nodes whose minimality reaches the threshold."""
    n_judged: int
    """Nodes in all."""
    random: RandomCircuits
    """Matched random circuits."""
    stability: Estimate
    """Mean pairwise Jaccard of the nodes found on resamples of the prompts; its interval holds 95 % of the pairs."""
    edge_stability: Estimate
    """The same of edges."""
    methodology: str
    """How the numbers were made, in one line."""
    warnings: tuple[str, ...]
    """What a reader must not overlook."""
    document: Document
    """Everything that was measured."""


@dataclass(frozen=True)
class StageCircuit:
    """The circuit of one measured point."""

    found: Circuit
    """The circuit."""
    criteria: Criteria
    """How it was judged."""


@dataclass(frozen=True)
class Overlap:
    """How much of a stage's circuit is base's, by one way of counting."""

    shared: Estimate
    """Jaccard with base's circuit."""
    floor: float | None
    """What base's own circuits share on resamples of the prompts: what chance alone leaves."""


@dataclass(frozen=True)
class Stage:
    """One measured point of a run: a stage, or one step of the ladder towards it."""

    id: str
    """Stage id, such as `recovered/subject_duplication`; ladder points share the id of their stage."""
    kind: Kind
    """What kind of stage."""
    poison: str | None
    """Name of the poison, for poisoned and recovered stages."""
    seed: int
    """Seed of the fine-tuning."""
    epoch: float | None
    """Epochs trained in this fine-tuning."""
    step: int
    """Optimiser steps of this fine-tuning."""
    parent: str | None
    """Id of the stage that this one was trained from."""
    behaviour: Behaviour
    """What it does on the task."""
    effects: HeadEffects
    """Path-patching effect of every head on the logits."""
    similarity_to_equal_steps: Estimate
    """Of a reseeded control, the correlation of its head effects with those of the equal-step control."""
    similarity: Estimate
    """Correlation of its head effects with those of base."""
    nodes: Overlap
    """Its circuit's nodes beside base's."""
    edges: Overlap
    """Its circuit's edges beside base's."""
    edge_circuit_jaccard: float | None
    """Overlap of the circuits that were found by edges."""
    circuit: StageCircuit | None
    """Its circuit; None where none was looked for or found."""
    why_no_circuit: str | None
    """Why it has none."""
    base_circuit: Estimate
    """Faithfulness of base's circuit in its model."""
    base_circuit_foil: Estimate
    """The same of foil minus answer, for a model that prefers the foil."""
    transfer: Estimate
    """Faithfulness of its circuit in base's model."""
    restoration: tuple[RestorationRow, ...]
    """How far it is back at base; empty unless recovered."""
    n_prompts: int | None
    """Number of prompts measured on."""
    counterfactual: str | None
    """Name of the counterfactual that heads were patched from."""


@dataclass(frozen=True)
class TrainingRow:
    """One optimiser step."""

    step: int
    """Step of this fine-tuning, from 0 (before training)."""
    epoch: float | None
    """Epoch of this fine-tuning."""
    loss: float | None
    """Training loss; None before the first step."""
    learning_rate: float | None
    """Learning rate of the step."""
    logit_diff: float | None
    """Logit difference on held-out prompts, where it was measured."""
    accuracy: float | None
    """Accuracy on held-out prompts, where it was measured."""


@dataclass(frozen=True)
class Claim:
    """One finding, put to the test."""

    id: str
    """Short name."""
    statement: str
    """What is claimed."""
    estimate: Estimate
    """The number that decides."""
    supported: bool | None
    """Whether this run supports it; None: undecided."""
    why: str | None
    """Reason for the verdict, or for its absence."""


@dataclass(frozen=True)
class StudyResults:
    """Everything that a report shows."""

    model: str
    """Name of the model."""
    architecture: str | None
    """Its architecture's name."""
    weights_sha256: str | None
    """Hash of the base's weights; None in a run that does not tell."""
    n_layers: int
    """Number of layers."""
    n_heads: int
    """Heads a layer."""
    task: str
    """Name of the task."""
    preset: str | None
    """Name of the preset."""
    points: tuple[Stage, ...]
    """Every measured point, ladder included, in the order of the summary."""
    training: tuple[tuple[str, tuple[TrainingRow, ...]], ...]
    """Stage id and its training log, for the stages that have one."""
    claims: tuple[Claim, ...]
    """The findings put to the test."""
    manifest: Document
    """Provenance as saved; empty where there is none."""
    config: str | None
    """The resolved configuration, verbatim."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The final point of every stage, in order."""
        return tuple({point.id: point for point in self.points}.values())

    @property
    def ladder(self) -> tuple[Stage, ...]:
        """The points on the way to the final ones."""
        final = {id(stage) for stage in self.stages}
        return tuple(point for point in self.points if id(point) not in final)

    def base_of(self, stage: Stage) -> Stage:
        """The base that `stage` is compared with: that of its seed, else the first."""
        bases = [point for point in self.stages if point.kind == "base"]
        return next((base for base in bases if base.seed == stage.seed), bases[0])


def load_results(run: Path, summary: Document | None = None) -> StudyResults:
    """Reads a run directory.

    Args:
        run: the directory.
        summary: what a run has so far that is still under way; None reads `summary.json`.

    Raises:
        InputError: when it is no finished run, naming the file and the key.
    """
    summary = summary or load_document(run, "summary.json")
    model = summary["model"]
    n_layers, n_heads = model["n_layers"].integer(), model["n_heads"].integer()
    entries = summary["stages"].elements()
    last = {entry["id"].text(): index for index, entry in enumerate(entries)}
    points: list[Stage] = []
    for index, entry in enumerate(entries):
        stage_id = entry["id"].text()
        rung = "" if index == last[stage_id] else f"/epoch-{entry['epoch'].number():g}"
        folder = f"stages/{_checked(stage_id)}{rung}"
        measures = load_document(run, f"{folder}/measures.json")
        points.append(_stage(run, folder, measures, n_layers, n_heads))
        if points[-1].id != stage_id:
            raise InputError(f"{measures.where} is about {points[-1].id!r}, expected {stage_id!r}; {REMEDY}")
    if not any(point.kind == "base" for point in points):
        raise InputError(f"{run} is no finished run: summary.json lists no base stage; {REMEDY}")
    config = run / "study.toml"
    return StudyResults(
        model=model["name"].text(),
        architecture=model["architecture"].text_or_none(),
        weights_sha256=model["weights_sha256"].text_or_none(),
        n_layers=n_layers,
        n_heads=n_heads,
        task=summary["task"].text(),
        preset=summary["preset"].text_or_none(),
        points=tuple(points),
        training=tuple((name, rows) for name in last if (rows := _training(run, name))),
        claims=tuple(_claim(claim) for claim in summary["claims"].elements()),
        manifest=load_document(run, name) if (run / (name := "manifest.json")).exists() else Document(name, None),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
    )


def _checked(stage_id: str) -> str:
    if any(part in ("", ".", "..") for part in stage_id.split("/")):
        raise InputError(f"summary.json: {stage_id!r} is no stage id; {REMEDY}")
    return stage_id


def _stage(run: Path, folder: str, measures: Document, n_layers: int, n_heads: int) -> Stage:
    kind = measures["kind"].text()
    if kind not in get_args(Kind):
        raise InputError(f"{measures.where}: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}; {REMEDY}")
    effects, similarity = measures["heads_to_logits"], measures["similarity_to_base"]
    n_prompts, name = measures["n_prompts"], f"{folder}/criteria.json"
    criteria = load_document(run, name) if (run / name).exists() else Document(name, None)
    circuit = _circuit(run / folder / "circuit.json", criteria["evaluation"])
    return Stage(
        id=measures["id"].text(),
        kind=cast(Kind, kind),
        poison=measures["poison"].text_or_none(),
        seed=measures["seed"].integer() if measures["seed"] else 0,
        epoch=measures["epoch"].number_or_none(),
        step=measures["step"].integer() if measures["step"] else 0,
        parent=measures["parent"].text_or_none(),
        behaviour=_behaviour(measures["behaviour"]),
        effects=HeadEffects(*(effects[part].matrix(n_layers, n_heads) for part in ("mean", "low", "high"))),
        similarity_to_equal_steps=read_estimate(measures["similarity_to_equal_steps"]),
        similarity=_estimate(similarity, "effects"),
        nodes=_overlap(similarity, "nodes_jaccard"),
        edges=_overlap(similarity, "edges_jaccard"),
        edge_circuit_jaccard=similarity["edge_circuit_jaccard"].number_or_none(),
        circuit=circuit,
        why_no_circuit=measures["why"]["circuit"].text_or_none() if circuit is None else None,
        base_circuit=read_estimate(criteria["base_circuit"]["faithfulness"]),
        base_circuit_foil=read_estimate(criteria["base_circuit"]["foil_faithfulness"]),
        transfer=read_estimate(criteria["transfer"]["faithfulness"]),
        restoration=_restoration(measures["restoration"]),
        n_prompts=n_prompts.integer() if n_prompts else None,
        counterfactual=measures["counterfactual"].text_or_none(),
    )


def _circuit(path: Path, judged: Document) -> StageCircuit | None:
    if not judged:
        return None
    levels, random, minimality = judged["F"], judged["random"], judged["minimality"]
    nodes, edges = (judged["stability"][f"{level}_jaccard"] for level in ("nodes", "edges"))
    criteria = Criteria(
        model=read_estimate(levels["model"]),
        circuit=read_estimate(levels["circuit"]),
        nothing=read_estimate(levels["nothing"]),
        faithfulness=read_estimate(judged["faithfulness"]),
        foil_faithfulness=read_estimate(judged["foil_faithfulness"]),
        completeness_gap=read_estimate(judged["completeness"]["gap"]),
        minimality=read_estimate(minimality["min"]),
        passing=minimality["passing"].integer(),
        n_judged=len(minimality["nodes"].elements()),
        random=RandomCircuits(
            random["n"].integer() if random["n"] else 0,
            random["mean"].number_or_none(),
            random["max"].number_or_none(),
            random["unit"].text_or_none() or "",
        ),
        stability=read_estimate(nodes, "mean", "spread"),
        edge_stability=read_estimate(edges, "mean", "spread"),
        methodology=judged["methodology"].text(),
        warnings=tuple(each.text() for each in judged["warnings"].elements()),
        document=judged,
    )
    return StageCircuit(load_circuit(path), criteria)


def _overlap(similarity: Document, name: str) -> Overlap:
    return Overlap(_estimate(similarity, name), similarity["floor"][name].number_or_none())


def _behaviour(behaviour: Document) -> Behaviour:
    logit_diff = behaviour["logit_diff"]
    return Behaviour(
        logit_diff=Estimate(logit_diff["mean"].number(), logit_diff["ci95"].interval()),
        accuracy=_estimate(behaviour, "accuracy"),
        top1=_estimate(behaviour, "top1"),
        foil_top1=behaviour["foil_top1"].number_or_none(),
        answer_probability=behaviour["answer_probability"].number_or_none(),
        prob_diff=behaviour["prob_diff"].number_or_none(),
        by_group=tuple((name, _mean(group["logit_diff"])) for name, group in behaviour["by_group"].items()),
    )


def _mean(value: Document) -> float:
    return (value["mean"] if isinstance(value.value, dict) else value).number()


def read_estimate(block: Document, key: str = "value", interval: str = "ci95") -> Estimate:
    """A number that stands beside its own interval and reason.

    Raises:
        InputError: when one of them is of another type.
    """
    value = block[key].number_or_none()
    return Estimate(value, block[interval].interval(), block["why"].text_or_none() if value is None else None)


def _estimate(
    block: Document, key: str, *, values: str | None = None, intervals: str = "ci95", whys: str = "why"
) -> Estimate:
    """One number of a block that keeps its intervals and its reasons in siblings."""
    value = (block[values] if values else block)[key].number_or_none()
    reasons = block[whys]
    reason = reasons if isinstance(reasons.value, str) else reasons[key]
    return Estimate(
        value=value,
        interval=block[intervals][key].interval() if value is not None else None,
        why=reason.text_or_none() if value is None else None,
    )


def _restoration(block: Document) -> tuple[RestorationRow, ...]:
    # Runs of earlier versions lack the later rows, and give one reason for both columns.
    there = {name for name, _ in block.items()}
    whys = "control_why" if "control_why" in there else "why"
    return tuple(
        RestorationRow(
            name=name,
            recovered=_estimate(block, name),
            control=_estimate(block, name, values="control", intervals="control_ci95", whys=whys),
            floor=block["floor"][name].number_or_none(),
        )
        for name in RESTORATION_ROWS
        if name in there
    )


def _training(run: Path, stage_id: str) -> tuple[TrainingRow, ...]:
    name = f"stages/{stage_id}/train.jsonl"
    if not (run / name).exists():
        return ()
    try:
        rows = [Document(f"{name} row {n}", row) for n, row in enumerate(load_jsonl(run / name), start=1)]
    except StorageError as error:
        raise InputError(f"{run} is no finished run: {error}; {REMEDY}") from error
    return tuple(
        TrainingRow(
            step=row["step"].integer(),
            epoch=row["epoch"].number_or_none(),
            loss=row["loss"].number_or_none(),
            learning_rate=row["learning_rate"].number_or_none(),
            logit_diff=row["logit_diff"].number_or_none(),
            accuracy=row["accuracy"].number_or_none(),
        )
        for row in rows
    )


def _claim(claim: Document) -> Claim:
    supported = claim["supported"].value
    if not (supported is None or isinstance(supported, bool)):
        raise InputError(f"{claim.where}: supported is {supported!r}, expected true, false or null; {REMEDY}")
    why = claim["why"].text_or_none()
    value = claim["value"].number_or_none()
    return Claim(
        id=claim["id"].text(),
        statement=claim["statement"].text(),
        estimate=Estimate(value, claim["ci95"].interval(), why),
        supported=supported,
        why=why,
    )
