"""A finished run read back from disk into the objects of `results.py`.

Only JSON is read. The order of stages is that of `summary.json`; the last entry of an id is its final
point (`stages/<id>/measures.json`), the ones before are its ladder (`stages/<id>/epoch-<k>/measures.json`). A point
in which a circuit was looked for, or base's was tried, has `criteria.json` beside it, and `circuit.json` where one was
found.
"""

from pathlib import Path
from typing import cast, get_args

from neuroplast.circuits.files import load_circuit
from neuroplast.errors import InputError, StorageError
from neuroplast.reading import LARGEST_SETTINGS, read_bytes
from neuroplast.report.documents import REMEDY, Document, load_document
from neuroplast.report.results import (
    RESTORATION_ROWS,
    Behaviour,
    Claim,
    Criteria,
    Estimate,
    HeadEffects,
    Kind,
    Overlap,
    RandomCircuits,
    RestorationRow,
    Stage,
    StageCircuit,
    StudyResults,
    TrainingRow,
)
from neuroplast.storage import load_jsonl


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
        config=_lines(config) if config.is_file() else None,
    )


def _lines(config: Path) -> str:
    try:
        return read_bytes(config, LARGEST_SETTINGS).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise InputError(f"{config} cannot be read ({error}); {REMEDY}") from error


def _checked(stage_id: str) -> str:
    if not stage_id.isprintable() or any(part in ("", ".", "..") for part in stage_id.split("/")):
        raise InputError(f"summary.json: {stage_id[:60]!r} is no stage id; {REMEDY}")
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
