"""Is it the circuit? Faithfulness, completeness, minimality (Wang et al. 2022, arXiv 2211.00593, sections 4 and
appendix), with the controls and the methodology that such numbers need (arXiv 2407.08734, 2411.16105).

F(X) is the mean logit difference with every head outside X knocked out; a head of X works at its own position only.
MLPs stay. M is the whole model, C the circuit, ∅ no head at all.

- **Faithfulness** F(C) ÷ F(M), a ratio of means; beside it F(M) - F(C), (F(C) - F(∅)) ÷ (F(M) - F(∅)), the mean of
  the prompts' own ratios, F by group of prompts (the two orders of names), and F(C) under every kind of ablation.
- **Completeness** F(C∖K) - F(M∖K) for sets K of the circuit's nodes: none, each class (role, or position where there
  are no roles), random subsets, and a greedy one. Greedy: ten times, of ten nodes drawn from those left, the one is
  added that makes the gap largest, if it makes it larger. The largest gap is chosen on the prompts that it is measured
  on: its interval is that of this K, not of the choice.
- **Minimality** of a node v: |F(C∖(K∪{v})) - F(C∖K)| ÷ |F(M)|, K being the rest of v's class; of movers, those with a
  larger effect, where effects are known. Beside it the same with K = ∅, which is all there is without classes. A node
  passes at 1 %.
- **Controls**: random circuits with as many heads in the same layers and at the same positions, none of them the
  circuit's own; where a layer has too few others, the nearest layers give theirs. There are none where the circuit
  has so many heads at a position that too few others are left.

A ratio is undefined, and says why, where the interval of F(M) includes 0 or F(M) is negative; for a model that was
poisoned towards the foil the same ratio against the foil is given then. F(C) ÷ F(M) above 1 is a warning, not a
success: the circuit leaves out what works against it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.random_circuits import matched_random
from neuroplast.circuits.roles import MOVERS
from neuroplast.circuits.shares import faithfulness, foil_faithfulness, quotient, share_of, undefined
from neuroplast.components import Node
from neuroplast.errors import InputError, StorageError, unknown_name
from neuroplast.interventions.ablation import ABLATIONS, Ablation, build_ablation
from neuroplast.interventions.knockout import Worlds, run_knockouts
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import RESAMPLES, Estimate, Weights, bootstrap_weights, estimate_mean
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet, group_keys

PASSES = 0.01
"""Least minimality of a node, as a share of |F(M)|: the paper's."""


@dataclass(frozen=True)
class CriteriaSettings:
    """How a circuit is judged."""

    ablation: str = "mean-by-position"
    """What knocked-out heads give, where nothing else is said."""
    ablations: tuple[str, ...] = ABLATIONS
    """The kinds under which faithfulness is given."""
    n_random: int = 100
    """Matched random circuits."""
    n_subsets: int = 20
    """Random subsets K for completeness."""
    greedy_steps: int = 10
    """Nodes that greedy K takes at most; 0 leaves it out."""
    greedy_draws: int = 10
    """Nodes that greedy K chooses from at each step."""
    resamples: int = RESAMPLES
    """Bootstrap resamples of each interval."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        least = {"n_random": 0, "n_subsets": 0, "greedy_steps": 0, "greedy_draws": 1, "resamples": 100, "seed": 0}
        for name, lowest in least.items():
            value: Any = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise InputError(f"{name} must be a whole number, at least {lowest}, got {value!r}")
        for kind in (self.ablation, *self.ablations):
            if kind not in ABLATIONS:
                raise unknown_name("ablation", kind, ABLATIONS)


@dataclass(frozen=True)
class Gap:
    """Completeness for one set K."""

    kind: str
    """`none`, `class`, `random` or `greedy`."""
    name: str
    """The class, or the number of the draw."""
    nodes: tuple[Node, ...]
    """K."""
    circuit: Estimate
    """F(C∖K)."""
    model: Estimate
    """F(M∖K)."""
    gap: Estimate
    """F(C∖K) - F(M∖K)."""


@dataclass(frozen=True)
class Need:
    """Minimality of one node."""

    node: Node
    """v."""
    given: tuple[Node, ...]
    """K."""
    score: Estimate
    """|F(C∖(K∪{v})) - F(C∖K)| ÷ |F(M)|."""
    alone: Estimate
    """The same with K = ∅."""


@dataclass(frozen=True)
class Criteria:
    """Everything that was measured of one circuit in one model."""

    n_prompts: int
    """Prompts that LD is the mean over."""
    n_reference: int
    """Prompts that means and samples come from."""
    smallest_group: int
    """The fewest of them that one mean by position is over."""
    counterfactual: str
    """How the prompts were broken."""
    settings: CriteriaSettings
    """How it was measured."""
    model: Estimate
    """F(M)."""
    circuit: Estimate
    """F(C)."""
    nothing: Estimate
    """F(∅)."""
    faithfulness: Estimate
    """F(C) ÷ F(M), ratio of means."""
    difference: Estimate
    """F(M) - F(C)."""
    normalised: Estimate
    """(F(C) - F(∅)) ÷ (F(M) - F(∅))."""
    foil_faithfulness: Estimate
    """F(C) ÷ F(M) of the difference foil minus answer, where that is what the model gives."""
    mean_of_ratios: Estimate
    """The mean over prompts of LD(C) ÷ LD(M), of prompts whose LD(M) is not near 0."""
    spread: Mapping[str, float | None]
    """Over prompts, of LD(C): `sd` (None of a single prompt) and the points `p5`, `p25`, `p50`, `p75`, `p95`."""
    by_group: Mapping[str, Mapping[str, Estimate]]
    """By group of prompts, F(M), F(C) and their ratio, as `share` has it."""
    by_ablation: Mapping[str, Estimate]
    """F(C) ÷ F(M) by kind of ablation, as `share` has it."""
    circuit_by_ablation: Mapping[str, Estimate]
    """F(C) by kind of ablation."""
    random: np.ndarray
    """F ÷ F(M) of each matched random circuit, (circuit,); F itself where the ratio is undefined."""
    gaps: tuple[Gap, ...]
    """Completeness by set."""
    needs: tuple[Need, ...]
    """Minimality by node."""

    @property
    def completeness_gap(self) -> Estimate:
        """The gap of largest size, whatever its K."""
        known = [gap.gap for gap in self.gaps if gap.gap.value is not None]
        return max(known, key=lambda each: abs(each.value or 0)) if known else Estimate(None, None, "no sets K")

    @property
    def minimality_min(self) -> Estimate:
        """The least minimality of all nodes."""
        known = [need.score for need in self.needs if need.score.value is not None]
        if known:
            return min(known, key=lambda each: each.value or 0.0)
        return self.needs[0].score if self.needs else Estimate(None, None, "the circuit has no heads")

    @property
    def share(self) -> Estimate:
        """F(C) ÷ F(M), of the answer or, where the model gives the foil, of that; undefined where it gives neither."""
        return self.foil_faithfulness if self.foil_faithfulness.value is not None else self.faithfulness

    @property
    def level(self) -> float:
        """What random circuits are held against, in their unit: `share`, or F(C) where that is undefined."""
        value = self.share.value if self.share.value is not None else self.circuit.value
        return float("nan") if value is None else value

    @property
    def random_above(self) -> float | None:
        """Share of random circuits that do as well as the circuit or better, by (1 + number) ÷ (1 + draws)."""
        return float(1 + (self.random >= self.level).sum()) / (1 + len(self.random)) if len(self.random) else None


def measure_criteria(
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    *,
    reference: PromptSet | None = None,
    settings: CriteriaSettings | None = None,
    counterfactual: str = "",
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
) -> Criteria:
    """Judges a circuit in a model: the one that it was found in, or another with the same parts.

    Args:
        model: the model.
        circuit: its nodes are kept; edges do not count here.
        prompts: the prompts; named positions must include those of the circuit's nodes.
        reference: prompts that means and samples are taken from; None takes the measured ones.
        settings: how it is judged.
        counterfactual: name of the counterfactual, for the methodology.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (activity, done, total).

    Raises:
        InputError: when the circuit has no heads, or parts and positions that are not there.
    """
    require_heads(circuit)
    settings = settings or CriteriaSettings()
    judge = _Judge(model, circuit, prompts, reference, settings, memory, parts or Parts(), progress)
    return judge.run(counterfactual)


def require_heads(circuit: Circuit) -> None:
    """Checks that there is something to judge.

    Raises:
        InputError: when the circuit has no heads.
    """
    if not circuit.heads:
        raise InputError("the circuit has no heads: there is nothing to judge")


def classes_of(circuit: Circuit) -> dict[str, tuple[Node, ...]]:
    """The circuit's heads by role, or by position where no roles are known; heads with neither are in none."""
    found: dict[str, list[Node]] = {}
    for node in circuit.heads:
        role = circuit.roles.get(node)
        if role or node.position:
            found.setdefault(role.name if role else f"@{node.position}", []).append(node)
    return {name: tuple(nodes) for name, nodes in found.items()}


class _Judge:
    def __init__(
        self,
        model: Network,
        circuit: Circuit,
        prompts: PromptSet,
        reference: PromptSet | None,
        settings: CriteriaSettings,
        memory: str | int | None,
        parts: Parts,
        progress: Told | None,
    ) -> None:
        self.model, self.circuit, self.prompts, self.reference = model, circuit, prompts, reference
        self.settings, self.memory, self.parts, self.progress = settings, memory, parts, progress
        self.weights: Weights = bootstrap_weights(len(prompts), settings.seed, settings.resamples)
        self.ablations: dict[str, Ablation] = {}
        self.nodes = circuit.heads
        self.worlds: Worlds = Worlds(model.device, memory, share=0.3)

    def run(self, counterfactual: str) -> Criteria:
        settings, nodes = self.settings, self.nodes
        kind = settings.ablation
        only = self._measure("circuit", [nodes, ()], keep=True)
        whole = self._measure("model", [()])[0]
        inside, nothing = only
        f_model, f_circuit = self._mean(whole), self._mean(inside)
        kinds: dict[str, np.ndarray] = {}
        refused: dict[str, Estimate] = {}
        for name in settings.ablations:
            try:
                kinds[name] = inside if name == kind else self._measure(f"circuit, {name}", [nodes], True, name)[0]
            except InputError as error:  # the reference lacks a template that this kind needs
                refused[name] = Estimate(None, None, str(error))
        random = self._measure("random circuits", matched_random(self.circuit, settings.n_random, settings.seed), True)
        groups = self._groups()
        ratios = self._ratio(random.mean(axis=1), whole) if len(random) else np.zeros(0)
        needs = self._minimality(whole)
        gaps = self._completeness(abs(float((inside - whole).mean())))
        return Criteria(
            n_prompts=len(self.prompts),
            n_reference=self._ablation(kind).n_reference,
            smallest_group=min(Counter(group_keys(self.reference or self.prompts)).values()),
            counterfactual=counterfactual,
            settings=settings,
            model=f_model,
            circuit=f_circuit,
            nothing=self._mean(nothing),
            faithfulness=faithfulness(inside, whole, self.weights),
            difference=self._mean(whole - inside),
            normalised=self._quotient(inside - nothing, whole - nothing, "F(M) - F(∅)"),
            foil_faithfulness=foil_faithfulness(inside, whole, self.weights),
            mean_of_ratios=self._mean_of_ratios(inside, whole),
            spread=_spread(inside),
            by_group={
                name: {
                    "model": self._mean(whole, rows),
                    "circuit": self._mean(inside, rows),
                    "faithfulness": self._on(rows, inside, whole),
                }
                for name, rows in groups.items()
            },
            by_ablation={name: share_of(each, whole, self.weights) for name, each in kinds.items()} | refused,
            circuit_by_ablation={name: self._mean(each) for name, each in kinds.items()} | refused,
            random=ratios,
            gaps=gaps,
            needs=needs,
        )

    def _ablation(self, kind: str) -> Ablation:
        if kind not in self.ablations:
            self.ablations[kind] = build_ablation(
                self.model, self.prompts, kind, reference=self.reference, seed=self.settings.seed, memory=self.memory
            )
        return self.ablations[kind]

    def _measure(
        self,
        name: str,
        sets: Sequence[Collection[Node]],
        keep: bool = False,
        kind: str | None = None,
        near: Collection[Node] = (),
    ) -> np.ndarray:
        """LD by set and prompt."""

        def make() -> dict[str, Tensor]:
            return {
                "logit_diff": run_knockouts(
                    self.model,
                    self.prompts,
                    sets,
                    self._ablation(kind or self.settings.ablation),
                    keep=keep,
                    near=near,
                    worlds=self.worlds,
                    memory=self.memory,
                    progress=about(self.progress, name),
                )
            }

        if not sets:
            return np.zeros((0, len(self.prompts)))
        found = self.parts.made(name, make)["logit_diff"]
        if tuple(found.shape) != (len(sets), len(self.prompts)):
            raise StorageError(f"the part {name!r} that was kept is of another evaluation; remove parts/ and run again")
        return found.double().numpy()

    def _completeness(self, gap: float) -> tuple[Gap, ...]:
        rng = np.random.default_rng(self.settings.seed)
        named: list[tuple[str, str, tuple[Node, ...]]] = [("none", "∅", ())]
        named += [("class", name, nodes) for name, nodes in classes_of(self.circuit).items()]
        for number in range(self.settings.n_subsets):
            kept = rng.random(len(self.nodes)) < 0.5
            chosen = tuple(node for node, taken in zip(self.nodes, kept, strict=True) if taken)
            named.append(("random", str(number + 1), chosen))
        if self.settings.greedy_steps:
            named.append(("greedy", "greedy", self._greedy(gap)))
        sets = [nodes for _, _, nodes in named]
        without = self._measure("completeness, model", sets)
        inside = self._measure("completeness, circuit", [self._rest(nodes) for nodes in sets], keep=True)
        return tuple(
            Gap(kind, name, nodes, self._mean(c), self._mean(m), self._mean(c - m))
            for (kind, name, nodes), c, m in zip(named, inside, without, strict=True)
        )

    def _greedy(self, best: float) -> tuple[Node, ...]:
        """K, from a gap that has to be passed."""
        rng = np.random.default_rng(self.settings.seed + 1)
        taken: tuple[Node, ...] = ()
        for step in range(self.settings.greedy_steps):
            left = [node for node in self.nodes if node not in taken]
            if not left:
                break
            rows = rng.choice(len(left), size=min(self.settings.greedy_draws, len(left)), replace=False)
            sets = [(*taken, left[int(row)]) for row in sorted(rows)]
            rests, rest = [self._rest(nodes) for nodes in sets], self._rest(taken)
            without = self._measure(f"greedy {step + 1}, model", sets, near=taken)
            inside = self._measure(f"greedy {step + 1}, circuit", rests, keep=True, near=rest)
            gaps = np.abs(inside.mean(axis=1) - without.mean(axis=1))
            if gaps.max() <= best:
                continue  # of these nodes none makes the gap larger; others may
            best = float(gaps.max())
            taken = sets[int(gaps.argmax())]
        return taken

    def _minimality(self, whole: np.ndarray) -> tuple[Need, ...]:
        given = {node: self._given(node) for node in self.nodes}
        sets = list(dict.fromkeys([frozenset[Node](), *(frozenset(nodes) for nodes in given.values())]))
        sets += [frozenset((*given[node], node)) for node in self.nodes]
        sets = list(dict.fromkeys([*sets, *(frozenset((node,)) for node in self.nodes)]))
        measured = self._measure("minimality", [self._rest(nodes) for nodes in sets], keep=True, near=self.nodes)
        row = {nodes: measured[number] for number, nodes in enumerate(sets)}

        def score(nodes: Collection[Node], node: Node) -> Estimate:
            change = row[frozenset((*nodes, node))] - row[frozenset(nodes)]
            return self._quotient(change, whole, "F(M)", absolute=True)

        return tuple(Need(node, given[node], score(given[node], node), score((), node)) for node in self.nodes)

    def _given(self, node: Node) -> tuple[Node, ...]:
        """K of a node: the rest of its class; of movers, those of the class with a larger effect."""
        mine = next((nodes for nodes in classes_of(self.circuit).values() if node in nodes), ())
        others = tuple(other for other in mine if other != node)
        role, known = self.circuit.roles.get(node), all(self.circuit.nodes[other] is not None for other in mine)
        if role is None or role.name not in MOVERS or not known:
            return others
        size = {other: abs(self.circuit.nodes[other] or 0.0) for other in mine}
        return tuple(other for other in others if size[other] > size[node])

    def _rest(self, nodes: Collection[Node]) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node not in nodes)

    def _groups(self) -> dict[str, np.ndarray]:
        names = [record.group for record in self.prompts.records]
        return {name: np.flatnonzero([each == name for each in names]) for name in sorted(set(names)) if name}

    def _mean(self, values: np.ndarray, rows: np.ndarray | None = None) -> Estimate:
        if rows is None:
            return estimate_mean(self.weights, values)
        return estimate_mean(self._weights_of(rows), values[rows])

    def _on(self, rows: np.ndarray, inside: np.ndarray, whole: np.ndarray) -> Estimate:
        return share_of(inside[rows], whole[rows], self._weights_of(rows))

    def _weights_of(self, rows: np.ndarray) -> Weights:
        return bootstrap_weights(len(rows), self.settings.seed, self.settings.resamples)

    def _ratio(self, values: np.ndarray, whole: np.ndarray) -> np.ndarray:
        defined = undefined(whole, self.weights) is None or undefined(-whole, self.weights) is None
        return values / whole.mean() if defined else values

    def _quotient(self, top: np.ndarray, bottom: np.ndarray, name: str, absolute: bool = False) -> Estimate:
        return quotient(top, bottom, self.weights, name, absolute)

    def _mean_of_ratios(self, inside: np.ndarray, whole: np.ndarray) -> Estimate:
        if (reason := undefined(whole, self.weights)) is not None:
            return Estimate(None, None, reason)
        large = np.abs(whole) >= 0.1 * abs(whole.mean())
        found = estimate_mean(self._weights_of(np.flatnonzero(large)), inside[large] / whole[large])
        left_out = int((~large).sum())
        return Estimate(found.value, found.ci95, f"{left_out} prompts with |LD(M)| below 10 % of its mean left out")


def _spread(values: np.ndarray) -> dict[str, float | None]:
    points = {f"p{point}": float(np.quantile(values, point / 100)) for point in (5, 25, 50, 75, 95)}
    return {"sd": float(values.std(ddof=1)) if len(values) > 1 else None, **points}
