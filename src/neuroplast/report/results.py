"""What a report shows of a finished run, as typed objects: every measured stage, the training curves, the claims."""

from dataclasses import dataclass
from typing import Literal

from neuroplast.circuits.circuit import Circuit
from neuroplast.report.documents import Document

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
