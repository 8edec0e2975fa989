"""What the heads of a circuit do, by the definitions of Wang et al. 2022 (arXiv 2211.00593), section 3.

Numbers come from `neuroplast.circuits.head_measures`; what a head acts on comes from the circuit's edges. A role is
given when every part of its rule holds:

| role | stands at | acts | and |
|---|---|---|---|
| name mover | END | on the logits, and helps | adds more to the answer than to the foil; attends to IO; copies |
| negative name mover | END | on the logits, and hinders | adds less to it; attends to IO; copies negatively |
| backup name mover | END | on the logits, and helps, with the movers knocked out only | |
| writes for the answer | END | on the logits, and helps | adds more to the answer than to the foil |
| writes against the answer | END | on the logits, and hinders | adds less to it |
| S-inhibition | END | through movers' queries, on what they do | attends to S2 or S1 |
| induction | S2 | | attends to S1+1, or shows induction off the task |
| duplicate token | S2 | | attends to S1, or shows duplicate-token attention off the task |
| previous token | S1+1 | | attends to S1, or shows previous-token attention off the task |

- *Adds*: direct logit attribution, the paper's projection of the head's output on the names.
- *Acts through movers' queries*: of its edges into queries of movers, the strongest one strengthens what that mover
  does: it helps where a head that helps reads it, it hinders where one that hinders does; whoever acts on the logits
  counts as a mover here. A head that acts on logits and queries is tried first for what it does more.
- *Attends to P*: more than to any other named position but its own, and more than even attention would. To S2 or S1:
  to the one that it attends to more, whatever it does with the other.
- *Copies*: its output follows its attention (a correlation above 0), or its copy score is among those of the
  model's top 5 % of heads and above its negative copy score. *Copies negatively*: the same with both signs flipped.
  Where these two disagree, neither holds.
- *Shows* a pattern *off the task*: its score is among those of the model's top 5 % of heads, and above that of even
  attention. Of several patterns, the one with the most attention counts. A pattern off the task and attention on
  the task that say different things contradict each other.
- *More* and *above 0*, of means over prompts: by more than `ERRORS` standard errors (of two means, taken as
  independent).

Everything else is `unclassified`, with the nearest rule and what it lacks. So is a head at a position that no rule
names. Where a task does not name IO, S1 and S2, a head can still show a pattern off the task, at any position, and be
a mover if it also copies (negatively); the pattern is tried first, because it says how a head finds what it copies.
A head without a position is tried for what it does at END, then for its pattern.

Sign: LD(patched) - LD(clean), so a negative edge helps.

Deviations:
- *Writes for* and *against the answer* are no roles of the paper. They were added after a look at SmolLM2-135M, where
  the largest effects on the logits are not of heads like the paper's movers: one attends to S2 and writes against S,
  others, in the last layer, attend to no name. They say what such a head writes, and nothing of how it knows. That a
  head which acts on both is tried first for what it does more was settled after that look too.
- The paper confirms off the task what it found on the task; here one of both will do.
- Copy scores and patterns are compared with the model's other heads, because thresholds are known for GPT-2 only.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from neuroplast.circuits.circuit import Circuit, Role
from neuroplast.circuits.head_measures import (
    ATTRIBUTION,
    COPY,
    DUPLICATE,
    EVEN_SHARE,
    FOLLOWS,
    INDUCTION,
    NEGATIVE_COPY,
    OFF_TASK,
    PREVIOUS,
    TO_ANSWER,
    TO_FOIL,
    HeadMeasures,
    Measured,
    measure_heads,
)
from neuroplast.components import Edge, Node
from neuroplast.interventions.chunks import Progress
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

MOVER, BACKUP, NEGATIVE = "name mover", "backup name mover", "negative name mover"
FOR, AGAINST = "writes for the answer", "writes against the answer"
INHIBITION, UNCLASSIFIED = "S-inhibition", "unclassified"
ROLES = (MOVER, BACKUP, NEGATIVE, FOR, AGAINST, INHIBITION, INDUCTION, DUPLICATE, PREVIOUS, UNCLASSIFIED)
"""All roles."""
HINDERING = (NEGATIVE, AGAINST)
MOVERS = (MOVER, BACKUP, FOR, *HINDERING)
"""Roles of heads that act on the logits."""

ERRORS = 2.0
"""Standard errors by which a difference must stand apart from 0."""
NAMES = ("io", "s1", "s2")
"""Positions that a task must name for the rules on where heads stand and attend."""
PATTERNS = {
    "s2": {"s1+1": INDUCTION, "s1": DUPLICATE},
    "s1+1": {"s1": PREVIOUS},
}
"""By where a head stands and where it attends, the pattern that this is."""


@dataclass(frozen=True)
class _Part:
    """One part of a rule, as it is with one head."""

    holds: bool
    said: str
    """In words, with the numbers."""


@dataclass(frozen=True)
class _Rule:
    """A role's rule, as it is with one head."""

    role: str
    parts: tuple[_Part, ...]
    remark: str = ""
    """What does not decide, but is to be told."""

    @property
    def holds(self) -> bool:
        return all(part.holds for part in self.parts)

    def said(self, holds: bool) -> str:
        return "; ".join(part.said for part in self.parts if part.holds is holds)


def name_roles(
    model: Network,
    prompts: PromptSet,
    circuit: Circuit,
    *,
    backups: Collection[Node] = (),
    seed: int = 0,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """Measures the heads of a circuit and says what each does.

    Args:
        model: the instrumented model.
        prompts: the prompts of the task.
        circuit: heads at positions, with edges.
        backups: its nodes that showed only with the movers knocked out.
        seed: seed of the random tokens, and of the resamples.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Returns:
        The circuit with a role for every head. A role's measures hold each value, its standard error (`copy se`) and,
        where all heads were measured, the model's 95th percentile (`copy p95`).

    Raises:
        InputError: for a node that the model or the prompts do not have, or a budget that is too small.
    """
    measured = measure_heads(model, prompts, circuit.heads, seed=seed, memory=memory, progress=progress)
    return replace(circuit, roles=judge_roles(circuit, measured, tuple(prompts.positions), backups))


def judge_roles(
    circuit: Circuit, measured: Measured, positions: Sequence[str], backups: Collection[Node] = ()
) -> dict[Node, Role]:
    """The roles of a circuit's heads from what was measured.

    Args:
        circuit: heads at positions, with edges.
        measured: the measures of all its heads.
        positions: the positions that the task names.
        backups: its nodes that showed only with the movers knocked out.
    """
    named = set(NAMES) <= set(positions)
    roles: dict[Node, Role] = {}
    # From the logits backwards: what a head does through queries depends on the roles of those that it reaches.
    for node in reversed(circuit.heads):
        head = _Head(node, circuit, measured, positions, named, node in backups)
        movers = {mover: role.name for mover, role in roles.items() if role.name in MOVERS}
        roles[node] = head.role(movers)
    return {node: roles[node] for node in circuit.heads}


class _Head:
    """One head, and the rules that may apply to it."""

    def __init__(
        self,
        node: Node,
        circuit: Circuit,
        measured: Measured,
        positions: Sequence[str],
        named: bool,
        is_backup: bool,
    ) -> None:
        self.node, self.positions, self.is_backup = node, positions, is_backup
        self.edges = {edge: score for edge, score in circuit.edges.items() if edge.source == node and score is not None}
        self.measures: HeadMeasures = measured.heads[node]
        self._seen = {name for name, value in self.measures.values.items() if value is not None}
        self.reference = measured.reference
        self.named = named and node.position is not None
        self.on_named_task = named

    def role(self, movers: Mapping[Node, str]) -> Role:
        """The first rule that holds, or the nearest."""
        rules = self.rules(movers)
        if (rule := _first(rules)) is not None:
            why = "; ".join(filter(None, (rule.said(holds=True), rule.remark)))
            return Role(rule.role, why, self._numbers())
        if not rules:
            return Role(UNCLASSIFIED, f"no role is defined for heads at {self.node.position}", self._numbers())
        near = max(rules, key=lambda rule: sum(part.holds for part in rule.parts) / len(rule.parts))
        return Role(UNCLASSIFIED, f"nearest is {near.role}, but: {near.said(holds=False)}", self._numbers())

    def rules(self, movers: Mapping[Node, str]) -> list[_Rule]:
        """The rules that may apply where the head stands, the first one first."""
        if self.node.position == "end" and self.named:
            through = self._strongest(movers)
            inhibition = [] if self.is_backup else [self._inhibition(through, movers)]
            more = through is not None and abs(self.edges[through]) > abs(self._at_logits() or 0.0)
            return [*inhibition, *self._moving()] if more else [*self._moving(), *inhibition]
        if self.named:
            return self._patterns_on_task()
        patterns, moving = self._patterns_off_task(), self._moving()
        return [*moving, *patterns] if self.on_named_task else [*patterns, *moving]

    def _moving(self) -> list[_Rule]:
        """The rules on heads that act on the logits."""
        if self.node.position not in ("end", None):
            return []
        if self.is_backup:
            return [_Rule(BACKUP, (self._acts(helping=True),), self._copies(positively=True).said)]
        return [*self._movers(helping=True), *self._movers(helping=False)]

    def _movers(self, helping: bool) -> list[_Rule]:
        """The published rule, and what is left of it where a head only writes."""
        parts = (self._acts(helping), self._adds(helping))
        copies = self._copies(positively=helping)
        published = MOVER if helping else NEGATIVE
        if not self.on_named_task:
            return [_Rule(published, (*parts, copies))]
        writes = FOR if helping else AGAINST
        if not self.named:
            return [_Rule(published, (*parts, copies)), _Rule(writes, parts, copies.said)]
        attends = self._attends(["io"])
        return [_Rule(published, (*parts, copies, attends)), _Rule(writes, parts, f"{copies.said}; {attends.said}")]

    def _at_logits(self) -> float | None:
        """The effect of the head on the logits."""
        return next((score for edge, score in self.edges.items() if edge.destination.kind == "logits"), None)

    def _acts(self, helping: bool) -> _Part:
        if (score := self._at_logits()) is None:
            return _Part(False, "no edge to the logits")
        does = "helps" if score < 0 else "hinders"
        when = " with the movers knocked out" if self.is_backup else ""
        return _Part((score < 0) is helping, f"{does} at the logits{when} ({score:+.2f})")

    def _adds(self, helping: bool) -> _Part:
        value, error = self._value(ATTRIBUTION), self.measures.errors.get(ATTRIBUTION) or 0.0
        answer, foil = self._value(TO_ANSWER), self._value(TO_FOIL)
        if value is None or answer is None or foil is None:
            return _Part(False, "direct logit attribution could not be measured")
        said = f"adds {answer:+.2f} to the answer and {foil:+.2f} to the foil (difference {value:+.2f} ± {error:.2f})"
        return _Part((value if helping else -value) > ERRORS * error, said)

    def _copies(self, positively: bool) -> _Part:
        sign = 1 if positively else -1
        follows, error = self._value(FOLLOWS), self.measures.errors.get(FOLLOWS) or 0.0
        votes: set[int] = set()
        said: list[str] = []
        if follows is not None:
            votes |= {1 if follows > 0 else -1} if abs(follows) > ERRORS * error else set()
            said.append(f"output follows attention {follows:+.2f} ± {error:.2f}")
        copy, negative = self._value(COPY), self._value(NEGATIVE_COPY)
        if copy is not None and negative is not None:
            for mine, other, name, vote in ((copy, negative, COPY, 1), (negative, copy, NEGATIVE_COPY, -1)):
                votes |= {vote} if mine >= self.reference[name].p95 and mine > other else set()
                said.append(f"{name} {mine:.2f} (95 % of heads ≤ {self.reference[name].p95:.2f})")
        if not said:
            return _Part(False, "copying could not be measured")
        holds = votes == {sign}
        verdict = "copies" if votes == {1} else "copies negatively" if votes == {-1} else "copies neither way"
        if len(votes) == 2:
            verdict = "copying is contradictory"
        return _Part(holds, f"{verdict}: {', '.join(said)}")

    def _strongest(self, movers: Mapping[Node, str]) -> Edge | None:
        """The strongest edge into a mover's query."""
        into = [edge for edge in self.edges if edge.destination.channel == "q" and _head_of(edge) in movers]
        return max(into, key=lambda edge: abs(self.edges[edge]), default=None)

    def _inhibition(self, through: Edge | None, movers: Mapping[Node, str]) -> _Rule:
        if through is None:
            acts = _Part(False, "no edge into a mover's query")
        else:
            score, role = self.edges[through], movers[_head_of(through)]
            strengthens = (score > 0) is (role in HINDERING)
            does = "strengthens" if strengthens else "weakens"
            acts = _Part(strengthens, f"{does}, through its query, {_head_of(through)}, a {role} ({score:+.2f})")
        return _Rule(INHIBITION, (acts, self._attends(["s2", "s1"])))

    def _attends(self, wanted: Collection[str]) -> _Part:
        """Whether the head attends to one of some named positions."""
        shares = {name: self._attention(name) for name in self.positions if f"attention to {name}" in self._seen}
        inside = {name: share for name, share in shares.items() if name in wanted}
        if not inside:
            return _Part(False, f"no {' or '.join(wanted)} before it")
        most = max(inside, key=lambda name: inside[name][0])
        others = {name: share for name, share in shares.items() if name not in wanted}
        even = self._value(EVEN_SHARE) or 0.0
        holds = _is_above(shares[most], (even, 0.0)) and all(_is_above(shares[most], each) for each in others.values())
        rest = [f"{name} {share[0]:.2f}" for name, share in sorted(others.items(), key=lambda item: -item[1][0])[:1]]
        compared = ", ".join([*rest, f"even share {even:.2f}"])
        does = "attends" if holds else "does not attend"
        return _Part(holds, f"{does} to {most}: {shares[most][0]:.2f} ({compared})")

    def _patterns_on_task(self) -> list[_Rule]:
        """The rules on patterns, where the head stands at a position that has some."""
        attends = {
            role: self._attends([place]) if place in self.positions else _Part(False, f"{place} is not named")
            for place, role in PATTERNS.get(self.node.position or "", {}).items()
        }
        shown = self._shown_off_task()
        against = {role: part.said for role, part in attends.items() if part.holds}
        against |= {} if shown is None else {shown: self._off_task(shown)}
        rules: list[_Rule] = []
        for role, on_task in attends.items():
            parts = (on_task, _Part(shown == role, self._off_task(role)))
            held = tuple(part for part in parts if part.holds)
            if held and len(against) > 1:
                held = (*held, _Part(False, f"contradictory: {', but '.join(against.values())}"))
            rules.append(_Rule(role, held or parts))
        return rules

    def _patterns_off_task(self) -> list[_Rule]:
        shown = self._shown_off_task()
        return [_Rule(role, (_Part(role == shown, self._off_task(role)),)) for role in OFF_TASK]

    def _shown_off_task(self) -> str | None:
        """The pattern that the head shows on repeated random tokens."""
        scores: dict[str, float] = {}
        for role in OFF_TASK:
            score, reference = self._value(role), self.reference.get(role)
            if score is not None and reference is not None and score >= reference.p95 and score > reference.chance:
                scores[role] = score
        return max(scores, key=lambda role: scores[role]) if scores else None

    def _off_task(self, role: str) -> str:
        score, reference = self._value(role), self.reference.get(role)
        if score is None or reference is None:
            return f"off the task, {role} attention could not be measured"
        return f"off the task, {role} {score:.2f} (95 % of heads ≤ {reference.p95:.2f})"

    def _value(self, name: str) -> float | None:
        return self.measures.values.get(name)

    def _attention(self, position: str) -> tuple[float, float]:
        name = f"attention to {position}"
        return self._value(name) or 0.0, self.measures.errors.get(name) or 0.0

    def _numbers(self) -> dict[str, float | None]:
        return {
            **self.measures.values,
            **{f"{name} se": error for name, error in self.measures.errors.items() if error is not None},
            **{f"{name} p95": each.p95 for name, each in self.reference.items()},
        }


def _first(rules: Iterable[_Rule]) -> _Rule | None:
    return next((rule for rule in rules if rule.holds), None)


def _head_of(edge: Edge) -> Node:
    """The head that an edge ends at; a query stands where its head does."""
    return replace(edge.destination, channel=None)


def _is_above(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether one mean is above another by more than `ERRORS` standard errors; each is (mean, standard error)."""
    error = (first[1] ** 2 + second[1] ** 2) ** 0.5
    return first[0] - second[0] > ERRORS * error
