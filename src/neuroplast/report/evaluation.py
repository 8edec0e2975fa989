"""The tables and the picture of one judgement of a circuit, from its saved document alone."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neuroplast.errors import StorageError
from neuroplast.report.figures import DPI
from neuroplast.report.style import KIND_COLOURS
from neuroplast.storage import atomic_file, write_text

EVALUATION_FILES = ("criteria.csv", "completeness.csv", "minimality.csv", "evaluation.png")
KINDS = {
    "none": ("s", "#333333"),
    "class": ("o", KIND_COLOURS["tuned"]),
    "random": (".", KIND_COLOURS["base"]),
    "greedy": ("D", "#d55e00"),
}
"""Marker and colour of a set K, by how it was chosen."""
MIB = ": MIB's"
"""Marks what MIB publishes: its CPR takes the edges that help first, its CMD those with large scores."""
MOST_NODES = 40
"""Most nodes in the picture of minimality: those with the least."""

Document = Mapping[str, Any]


def write_evaluation_report(document: Document, folder: Path) -> None:
    """Writes `EVALUATION_FILES` beside an evaluation.

    Raises:
        StorageError: when the document lacks something, or the folder cannot be written.
    """
    try:
        tables = {
            "criteria.csv": criteria_rows(document),
            "completeness.csv": _completeness_rows(document),
            "minimality.csv": _minimality_rows(document),
        }
        figure = draw_evaluation(document)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{folder / 'evaluation.json'} is damaged ({error}); remove it and run again") from error
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(folder / name, text.getvalue())
    with atomic_file(folder / "evaluation.png") as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def criteria_rows(document: Document) -> list[Sequence[Any]]:
    """The table of criteria: a name, a value, the ends of its interval, and what it means or why it is missing."""
    rows: list[Sequence[Any]] = [("criterion", "value", "low", "high", "note")]

    def add(name: str, found: Document, note: str = "") -> None:
        low, high = found.get("ci95") or (None, None)
        rows.append((name, found["value"], low, high, found.get("why") or note))

    add("F(M)", document["F"]["model"], "LD of the whole model")
    add("F(C)", document["F"]["circuit"], "LD with every other head knocked out")
    add("F(∅)", document["F"]["nothing"], "LD with every head knocked out")
    add("faithfulness", document["faithfulness"], "F(C) / F(M), ratio of means")
    add("faithfulness to the foil", document["foil_faithfulness"], "the same of foil minus answer")
    if "difference" in document:  # runs of earlier versions lack it
        add("F(M) - F(C)", document["difference"], "what the circuit lacks, in logits")
    add("normalised faithfulness", document["normalised"], "(F(C) - F(∅)) / (F(M) - F(∅))")
    add("mean of ratios", document["mean_of_ratios"], "of the prompts' own F(C) / F(M)")
    for name, row in document["by_group"].items():
        add(f"faithfulness, {name}", row["faithfulness"], "prompts of this group only")
    for name, row in document["by_ablation"].items():
        add(f"faithfulness, ablation {name}", row["faithfulness"], "F(C) / F(M)")
    random = document["random"]
    if not random["n"]:
        rows.append(("random circuits", None, None, None, random.get("why")))
    else:
        note = f"{random['unit']} of {random['n']} matched random circuits"
        rows.append(("random circuits, mean", random["mean"], None, None, note))
        rows.append(("random circuits, largest", random["max"], None, None, note))
    add(
        "completeness gap",
        document["completeness"]["gap"],
        "F(C∖K) - F(M∖K), the largest over all K; K was chosen on these prompts",
    )
    add("minimality, least", document["minimality"]["min"], "|F(C∖(K∪{v})) - F(C∖K)| / |F(M)|")
    stability = document.get("stability") or {}
    for level in ("nodes", "edges"):
        if found := stability.get(f"{level}_jaccard"):
            low, high = found["spread"] or (None, None)
            note = f"mean pairwise Jaccard of {stability['resamples']} resamples; ends: 95 % of the pairs"
            rows.append((f"stability, {level}", found["mean"], low, high, note))
    edges = document.get("edges") or {}
    if (chosen := edges.get("chosen")) and chosen["value"] is not None:
        add("faithfulness of the chosen edges", chosen, "every other edge carries its source's counterfactual output")
    for ranking, curve in (("", edges), (", helping first", edges.get("helping")), (", random", edges.get("random"))):
        if curve and curve.get("n_scored"):
            note = "area under f over the share of edges" + MIB * ("helping" in ranking)
            add(f"edges{ranking}, CPR", curve["cpr"], note)
            add(f"edges{ranking}, CMD", curve["cmd"], "area of |1 - f|" + MIB * (not ranking))
        elif curve and "cpr" not in curve:
            rows.append((f"edges{ranking}", None, None, None, curve["why"]))
    return rows


def _completeness_rows(document: Document) -> Iterable[Sequence[Any]]:
    yield "kind", "name", "nodes", "F(C∖K)", "F(M∖K)", "gap", "low", "high"
    for row in document["completeness"]["sets"]:
        low, high = row["gap"]["ci95"] or (None, None)
        values = (row["circuit"]["value"], row["model"]["value"], row["gap"]["value"])
        yield row["kind"], row["name"], " ".join(row["nodes"]), *values, low, high


def _minimality_rows(document: Document) -> Iterable[Sequence[Any]]:
    yield "node", "role", "K", "minimality", "low", "high", "alone"
    for row in document["minimality"]["nodes"]:
        low, high = row["score"]["ci95"] or (None, None)
        values = (row["score"]["value"], low, high, row["alone"]["value"])
        yield row["node"], row["role"], " ".join(row["given"]), *values


def draw_evaluation(document: Document) -> Figure:
    """Faithfulness beside its controls, completeness of every K, minimality of every node."""
    figure = Figure(figsize=(13, 4.6), dpi=DPI, layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.2))
    _draw_faithfulness(first, document)
    _draw_completeness(second, document)
    _draw_minimality(third, document)
    for axes in (first, second, third):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_axisbelow(True)
        axes.grid(color="#e3e3e3", linewidth=0.6)
    return figure


def _draw_faithfulness(axes: Axes, document: Document) -> None:
    random = document["random"]
    rows: list[tuple[str, Document]] = [("F(M)", document["F"]["model"]), ("F(C)", document["F"]["circuit"])]
    rows.append(("F(∅)", document["F"]["nothing"]))
    rows += [(f"F(C), {name}", row["circuit"]) for name, row in document["by_ablation"].items()]
    rows += [(f"F(C), {name}", row["circuit"]) for name, row in document["by_group"].items()]
    for number, (_, found) in enumerate(rows):
        colour = KIND_COLOURS["tuned"] if number == 1 else KIND_COLOURS["base"]
        axes.plot([found["value"]], [number], "o", color=colour, markersize=6)
        if found["ci95"]:
            axes.plot(found["ci95"], (number, number), color=colour, linewidth=2, solid_capstyle="butt")
    if random["n"]:
        scale = document["F"]["model"]["value"] if random["unit"] != "F, in logits" else 1
        ends = [random[name] * scale for name in ("mean", "max")]
        axes.plot(ends, (len(rows), len(rows)), color="#b8578f", linewidth=2)
        axes.plot(ends, (len(rows), len(rows)), "|", color="#b8578f", markersize=9)
    names = [name for name, _ in rows] + ([f"{random['n']} random: mean, largest"] if random["n"] else [])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xlabel("logit difference", fontsize=9)
    axes.set_title("Faithfulness", fontsize=10)


def _draw_completeness(axes: Axes, document: Document) -> None:
    sets = document["completeness"]["sets"]
    values = [row[side]["value"] for row in sets for side in ("circuit", "model")]
    if values:
        ends = (min(*values, 0), max(values))
        axes.plot(ends, ends, color="#888888", linewidth=0.9, linestyle="--")
    for kind, (marker, colour) in KINDS.items():
        chosen = [row for row in sets if row["kind"] == kind]
        points = ([row["model"]["value"] for row in chosen], [row["circuit"]["value"] for row in chosen])
        axes.plot(*points, marker, color=colour, label=f"K: {kind}", linestyle="none")
    axes.set_xlabel("F(M∖K)", fontsize=9)
    axes.set_ylabel("F(C∖K)", fontsize=9)
    axes.set_title("Completeness: on the line is complete", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _draw_minimality(axes: Axes, document: Document) -> None:
    known = [row for row in document["minimality"]["nodes"] if row["score"]["value"] is not None]
    known = sorted(known, key=lambda row: -row["score"]["value"])[-MOST_NODES:]
    for number, row in enumerate(known):
        axes.barh(number, 100 * row["score"]["value"], color=KIND_COLOURS["tuned"], height=0.7)
        axes.plot([100 * end for end in row["score"]["ci95"]], (number, number), color="#333333", linewidth=1)
    names = [f"{row['node']} {row['role'] or ''}" for row in known]
    axes.set_yticks(range(len(names)), names, fontsize=min(8, 260 / max(1, len(names))))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(100 * document["minimality"]["threshold"], color="#d55e00", linewidth=1, linestyle="--")
    if known:
        axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("minimality, % of F(M), given the rest of its class", fontsize=9)
    left_out = len(document["minimality"]["nodes"]) - len(known)
    axes.set_title("Minimality" + (f" (the least {len(known)}; {left_out} more)" if left_out else ""), fontsize=10)
