"""The tables of a paper: the findings, the ladder of every fine-tuning, restoration, the heads that changed, and
cross-model patching, as CSV, Markdown and LaTeX.

One row a measured point: logit difference, F(C) of the circuit found there, its faithfulness and its share of all
nodes, the faithfulness of base's circuit there (which the study publishes of recovered models), likeness to base, and
what came back. Where the model is GPT-2 small and the task indirect object identification,
a column has the published figures beside ours (Chhabra, Zhu and Khalili 2025, arXiv 2503.01896); they are quoted second
hand, and their protocol is not ours in every respect.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from neuroplast.report.changes import sign_flips
from neuroplast.report.documents import load_document
from neuroplast.report.reading import read_estimate
from neuroplast.report.results import Estimate, Stage, StudyResults
from neuroplast.storage import write_text

PUBLISHED_MODEL, PUBLISHED_TASK = "gpt2", "ioi"
PUBLISHED: dict[tuple[str, str | None, float | None], str] = {
    ("tuned", None, 1.0): "LD 6.32; sparsity 1.92 %",
    ("tuned", None, 100.0): "LD 26.83; sparsity 2.68 %",
    ("poisoned", "subject_duplication", 5.0): "LD −11.06",
    ("recovered", "name_moving", None): "faithfulness 95 %",
    ("recovered", "subject_duplication", None): "faithfulness 96 %",
}
"""By kind, poison and epoch, what was published; None stands for any epoch, and is told at the last."""
SHOWN_HEADS = 12
"""Heads of a stage in the table of changed heads."""

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "∅": r"$\emptyset$",
}


@dataclass(frozen=True)
class Table:
    """One table."""

    name: str
    """Its file's name without an ending."""
    caption: str
    """What it shows."""
    header: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as text."""

    def csv(self) -> str:
        """Comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
        return f"{self.caption}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)

    def latex(self) -> str:
        """A table of LaTeX with booktabs."""
        header, *rows = (" & ".join(map(latex_text, line)) + r" \\" for line in (self.header, *self.rows))
        lines = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{latex_text(self.caption)}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            header,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def write_paper_tables(run: Path, results: StudyResults) -> None:
    """Writes each table as `.csv`, `.md` and `.tex` into the run's folder of tables."""
    folder = run / "tables"
    tables = (
        claims_table(results),
        ladder_table(results),
        restoration_table(results),
        heads_table(results),
        cross_model_table(run, results),
    )
    for table in tables:
        for ending, text in ((".csv", table.csv()), (".md", table.markdown()), (".tex", table.latex())):
            write_text(folder / f"{table.name}{ending}", text)


def claims_table(results: StudyResults) -> Table:
    """The findings, put to the test."""
    verdicts = {True: "supported", False: "not supported", None: "undecided"}
    rows = [
        (claim.statement, verdicts[claim.supported], _shown(claim.estimate), claim.why or "–")
        for claim in results.claims
    ]
    caption = f"{results.model} on {results.task}: the findings, 95 % intervals over prompts in brackets."
    return Table(
        "paper_claims", caption, ("finding", "verdict", "value", "held against, or why there is none"), tuple(rows)
    )


def restoration_table(results: StudyResults) -> Table:
    """How far each recovered stage is back, beside its equal-step control."""
    rows = [
        (stage.id, row.name.replace("_", " "), _shown(row.recovered), _shown(row.control), row.recovered.why or "–")
        for stage in results.stages
        for row in stage.restoration
    ]
    caption = "Restoration; the control took as many clean steps without ever being poisoned."
    return Table("paper_restoration", caption, ("stage", "measure", "recovered", "control", "why missing"), tuple(rows))


def ladder_table(results: StudyResults) -> Table:
    """Every measured point of every fine-tuning."""
    published = results.model == PUBLISHED_MODEL and results.task == PUBLISHED_TASK
    header = ("stage", "epoch", "steps", "LD", "F(C)", "faithfulness", "sparsity", "base's circuit", "effects ~ base")
    header += ("damage undone",)
    final = {id(stage) for stage in results.stages}
    rows = [
        (*_ladder_row(point), *([_published(point, id(point) in final)] if published else []))
        for point in results.points
    ]
    caption = (
        f"{results.model} on {results.task}: logit difference (LD), circuit and likeness to base; "
        "95 % intervals over prompts in brackets. Base's circuit: its faithfulness in the stage's model; "
        "of a model that prefers the foil, both are of that preference."
    )
    return Table("paper_ladder", caption, (*header, *(["published"] if published else [])), tuple(rows))


def heads_table(results: StudyResults) -> Table:
    """The heads that flipped sign in each final stage, the largest change first."""
    rows = [
        (stage.id, flip.head, _shown(flip.base), _shown(flip.effect))
        for stage in results.stages
        if stage.kind != "base"
        for flip in sign_flips(stage, results.base_of(stage))[:SHOWN_HEADS]
    ]
    caption = "Heads whose direct effect on the logit difference changed sign; negative: the head helps."
    return Table("paper_heads", caption, ("stage", "head", "effect in base", "effect"), tuple(rows))


def cross_model_table(run: Path, results: StudyResults) -> Table:
    """What patching single heads and MLPs from one checkpoint into the other does, where a stage was compared."""
    rows: list[tuple[str, ...]] = []
    for stage in results.stages:
        name = f"stages/{stage.id}/comparison.json"
        if (run / name).exists():
            for part in load_document(run, name)["expressed"]["parts"].elements()[:SHOWN_HEADS]:
                effects = (_shown(read_estimate(part[way])) for way in ("undoes", "brings"))
                rows.append((stage.id, part["name"].text(), *effects))
    caption = (
        "Cross-model patching at END, in logits: what base's value of a part undoes in the stage, and what the stage's "
        "value brings about in base."
    )
    return Table("paper_cross_model", caption, ("stage", "part", "undoes", "brings"), tuple(rows))


def _ladder_row(point: Stage) -> tuple[str, ...]:
    undone = {row.name: row.recovered for row in point.restoration}.get("damage_undone", Estimate(None))
    circuit = ("–", "–", "–")
    if point.circuit:
        criteria = point.circuit.criteria
        faithfulness = _known(criteria.faithfulness, criteria.foil_faithfulness)
        circuit = (_shown(criteria.circuit), _shown(faithfulness), f"{point.circuit.found.sparsity():.2%}")
    epoch = "–" if point.epoch is None else f"{point.epoch:g}"
    of_base = _known(point.base_circuit, point.base_circuit_foil)
    measured = (_shown(point.behaviour.logit_diff), *circuit, _shown(of_base), _shown(point.similarity), _shown(undone))
    return (point.id, epoch, str(point.step), *measured)


def _known(answer: Estimate, foil: Estimate) -> Estimate:
    """Of the shares of the preference for the answer and for the foil, the one that the model has."""
    return foil if answer.value is None else answer


def _published(point: Stage, is_final: bool) -> str:
    exact = PUBLISHED.get((point.kind, point.poison, point.epoch))
    return exact or (PUBLISHED.get((point.kind, point.poison, None), "–") if is_final else "–")


def _shown(found: Estimate) -> str:
    if found.value is None:
        return "–"
    ends = "" if found.interval is None else f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
    return f"{found.value:.2f}{ends}".replace("-", "−")
