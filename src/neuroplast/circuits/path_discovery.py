"""Finding a circuit by path patching, automatically, as it was first found by hand (Wang et al. 2022, arXiv
2211.00593, section 3): from the logits backwards, what writes to what was found.

Steps:
1. Every head at END is patched into the logits.
2. From the heads that were just found, at each position that they read: their queries where they stand, their keys
   and values at the positions that they attend to. Every head is patched, at that position, into all of these
   receivers together; those that help the task and those that hinder it apart, because their effects would cancel.
3. Again from the heads that were new, until nothing new is found.
4. Step 1 again with the movers knocked out, the heads of step 1 that drive what the model does: with LD above 0
   those that help the task, below 0 those that hinder it. What shows only now, and drives it too, is a backup.

A sender is found when its mean effect is at least `threshold` × |LD| **and** its bootstrap interval excludes 0. Its
edges to the single receivers are measured next, and kept when the interval excludes 0 and the effect is at least
`threshold` × |LD| ÷ the number of receivers that were patched together: one of them must carry that much, if their
effects add up. Where none passes, the strongest one is kept.

Most heads do nothing, so each step begins with some prompts, drawn at random, of every template and group in turn,
and goes on to more (`SCREENS`): a sender whose mean lies so many standard errors below the threshold that chance makes
it one time in a thousand is cut, if its effects are spread like a normal variable. A head that acts on few prompts only
can be missed all the same: one that acts on a tenth of them at random, on none of the first 16 in 19 cases of 100.
`screen` = False tries every head on every prompt.

Sign: effect = LD(patched) - LD(clean), in logits; a node's score is its effect in the step that found it, the one
nearest to the logits. Deviation from the paper: none of the steps is chosen by eye.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.attention import attention_to
from neuroplast.circuits.circuit import SIGN, Circuit
from neuroplast.circuits.shape import require_difference, shape_of
from neuroplast.components import Edge, Node
from neuroplast.errors import InputError, NothingFoundError, StorageError, unknown_name
from neuroplast.interventions.pairs import Pairs
from neuroplast.interventions.path_patching import patch_paths
from neuroplast.interventions.selection import OTHER, require_prompts
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import RESAMPLES, bootstrap_weights, interval
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

LOGITS = Node("logits", position="end")
FEWEST = 8
"""Prompts below which nothing is looked for."""
SCREENS = ((16, 3.73), (32, 3.37))
"""Prompts of each screening, and the standard errors that decide: the 99.9 % point of Student's t."""


@dataclass(frozen=True)
class PathSettings:
    """What decides whether a head belongs to the circuit."""

    threshold: float = 0.02
    """Least mean effect, as a share of |LD|; 2 % is the paper's."""
    attention: float = 0.1
    """Keys and values are read where a head attends with at least this much of its attention, on average."""
    positions: tuple[str, ...] = ()
    """Where heads are looked for; empty takes the positions that the prompts name and, together, all `other` ones;
    or all at once, where only `end` is named."""
    backups: bool = True
    """Whether step 4 is done."""
    screen: bool = True
    """Whether heads that do nothing are cut on a few prompts."""
    depth: int = 12
    """Most steps from the logits backwards."""
    resamples: int = RESAMPLES
    """Bootstrap resamples of each interval."""
    seed: int = 0
    """Seed of the resamples, and of the order in which prompts are drawn."""

    def __post_init__(self) -> None:
        for name in ("threshold", "attention"):
            value: Any = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
                raise InputError(f"{name} must lie between 0 and 1, got {value!r}")
        for name, least in (("depth", 1), ("resamples", 100), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")


@dataclass(frozen=True)
class Step:
    """One step: which heads were tried, and what became of them."""

    name: str
    """`logits`, `1 helping @end`, `backups`, …"""
    receivers: tuple[Node, ...]
    """What was set together."""
    position: str | None
    """Where the senders stand; None is everywhere."""
    senders: tuple[Node, ...]
    """The senders that were measured on all prompts: those that screening left."""
    effects: np.ndarray
    """Their joint effects, (sender, prompt)."""
    edges: Mapping[Edge, np.ndarray] = field(default_factory=dict[Edge, np.ndarray])
    """By edge of the senders that were found, its effect on each prompt."""
    n_candidates: int = 0
    """How many senders there were to begin with."""
    found: tuple[Node, ...] = ()
    """Those that passed."""
    kept: tuple[Edge, ...] = ()
    """The edges that passed."""
    below_threshold: int = 0
    """Measured on all prompts, and too small."""
    within_noise: int = 0
    """Large enough, but their interval includes 0."""

    def document(self) -> dict[str, Any]:
        """The log's row."""
        means = self.effects.mean(axis=1) if len(self.effects) else np.zeros(0)
        return {
            "step": self.name,
            "receivers": [str(node) for node in self.receivers],
            "position": self.position,
            "candidates": self.n_candidates,
            "cut by screening": self.n_candidates - len(self.senders),
            "cut below threshold": self.below_threshold,
            "cut within noise": self.within_noise,
            "found": {str(n): float(m) for n, m in zip(self.senders, means, strict=True) if n in self.found},
            "nearest below": {
                str(self.senders[row]): float(means[row])
                for row in np.argsort(-np.abs(means), kind="stable")
                if self.senders[row] not in self.found
            },
            "edges": {str(edge): float(self.edges[edge].mean()) for edge in self.kept},
        }


@dataclass(frozen=True)
class Discovery:
    """A circuit, and how it was found."""

    circuit: Circuit
    """The circuit."""
    steps: tuple[Step, ...]
    """Every step."""
    clean: np.ndarray
    """LD on the clean prompts, (prompt,)."""
    backups: tuple[Node, ...]
    """The nodes that showed only with the movers knocked out."""
    settings: PathSettings
    """What decided."""


def discover_paths(
    model: Network,
    prompts: PromptSet,
    *,
    threshold: float = PathSettings.threshold,
    settings: PathSettings | None = None,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Discovery:
    """Finds a circuit by path patching.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals; at least 8, better 64 or more.
        threshold: least mean effect as a share of |LD|, where no `settings` are given.
        settings: everything that decides.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted discovery goes on.
        progress: called with (step, done, total).
        say: told of each step's candidates and cuts.

    Raises:
        NothingFoundError: when LD is not apart from 0, no head passes, or there are too few prompts to tell.
        InputError: for settings that cannot be.
    """
    settings = settings or PathSettings(threshold)
    require_prompts(prompts)
    if len(prompts) < FEWEST:
        raise NothingFoundError(f"{len(prompts)} prompts: an interval over prompts needs at least {FEWEST}; give more")
    return _Search(model, prompts, settings, memory, parts or Parts(), progress, say).run()


class _Search:
    def __init__(
        self,
        model: Network,
        prompts: PromptSet,
        settings: PathSettings,
        memory: str | int | None,
        parts: Parts,
        progress: Told | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.memory, self.parts, self.progress, self.say = memory, parts, progress, say
        named = (*prompts.positions, OTHER)
        for name in settings.positions:
            if name not in named:
                raise unknown_name("position", name, named)
        chosen = settings.positions or (named if len(prompts.positions) > 1 else ())
        self.positions: tuple[str, ...] = chosen
        self.weights = bootstrap_weights(len(prompts), settings.seed, settings.resamples)
        self.screens = [each for each in SCREENS if settings.screen and 2 * each[0] <= len(prompts)]
        self.order = torch.tensor(_drawn(prompts, settings.seed))
        """The prompts as they are drawn: whatever order they were given in, those of a screen are a fair sample."""
        self.pairs = Pairs(model, memory)
        self.steps: list[Step] = []
        self.scores: dict[Node, float] = {}
        self.edges: dict[Edge, float] = {}
        self.clean = np.zeros(0)
        self.least = 0.0

    def run(self) -> Discovery:
        self._read_clean()
        first = self._step("logits", (LOGITS,), "end")
        new = self._take(first)
        if not new:
            raise NothingFoundError(
                f"no head passes: the largest effect on the logits is below {self.settings.threshold:.3g} of LD "
                f"({self.clean.mean():.2f}), or within the noise; give a lower threshold, or more prompts"
            )
        for depth in range(1, self.settings.depth + 1):
            found: list[Node] = []
            for (position, kind), receivers in self._receivers(new).items():
                where = f"@{position}" if position else "everywhere"
                found += self._take(self._step(f"{depth} {kind} {where}", receivers, position))
            new = found
            if not new:
                break
        drives = -np.sign(self.clean.mean())
        movers = tuple(node for node in first.found if self.scores[node] * drives > 0)
        backups: list[Node] = []
        if self.settings.backups and movers:
            step = self._step("backups", (LOGITS,), "end", knocked_out=movers)
            shown = [node for node in step.found if step.effects[step.senders.index(node)].mean() * drives > 0]
            backups = [node for node in shown if node not in self.scores]
            self._take(step, only=backups)
        return Discovery(self._circuit(movers, backups), tuple(self.steps), self.clean, tuple(backups), self.settings)

    def _step(
        self, name: str, receivers: Sequence[Node], position: str | None, knocked_out: Sequence[Node] = ()
    ) -> Step:
        depth = max(node.depth for node in receivers)
        candidates = tuple(
            Node("head", layer, head, position)
            for layer in range(self.model.n_layers)
            for head in range(self.model.n_heads)
            if layer < depth and Node("head", layer, head, position) not in knocked_out
        )
        senders, effects = self._measure_joint(name, candidates, receivers, knocked_out)
        low, high = interval(np.einsum("rp,sp->rs", self.weights, effects)) if senders else (np.zeros(0), np.zeros(0))
        large = np.abs(effects.mean(axis=1)) >= self.least
        apart = (low > 0) | (high < 0)
        found = tuple(node for node, passes in zip(senders, large & apart, strict=True) if passes)
        edges = self._measure_edges(name, found, receivers, effects, senders, knocked_out)
        step = Step(
            name,
            tuple(receivers),
            position,
            senders,
            effects,
            edges,
            len(candidates),
            found,
            self._choose_edges(edges, found, len(receivers)),
            int((~large).sum()),
            int((large & ~apart).sum()),
        )
        self.steps.append(step)
        self.say(
            f"{name}: {len(receivers)} receivers, {len(candidates)} heads, {len(candidates) - len(senders)} cut by "
            f"screening, {step.below_threshold} below the threshold, {step.within_noise} within the noise, "
            f"{len(found)} found"
        )
        return step

    def _measure_joint(
        self, name: str, candidates: Sequence[Node], receivers: Sequence[Node], knocked_out: Sequence[Node]
    ) -> tuple[tuple[Node, ...], np.ndarray]:
        """The senders that screening leaves, and their effects on all prompts."""
        left, effects, done = tuple(candidates), torch.zeros(len(candidates), 0), 0
        for until, errors in (*self.screens, (len(self.prompts), None)):
            if not left:
                return (), np.zeros((0, len(self.prompts)))
            title = name if errors is None else f"{name}, first {until}"
            found = self._patch(title, left, receivers, self.order[done:until], knocked_out)[0]
            effects, done = torch.cat([effects, found], dim=1), until
            if errors is not None:
                bound = effects.mean(dim=1).abs() + errors * effects.std(dim=1) / until**0.5
                stays = bound >= self.least
                left = tuple(node for node, kept in zip(left, stays.tolist(), strict=True) if kept)
                effects = effects[stays]
        return left, effects[:, self.order.argsort()].double().numpy()

    def _measure_edges(
        self,
        name: str,
        found: Sequence[Node],
        receivers: Sequence[Node],
        effects: np.ndarray,
        senders: Sequence[Node],
        knocked_out: Sequence[Node],
    ) -> dict[Edge, np.ndarray]:
        """The effect of each found sender on each single receiver after it."""
        if len(receivers) == 1:
            return {Edge(node, receivers[0]): effects[senders.index(node)] for node in found}
        if not found:
            return {}
        measured: list[list[Tensor]] = []
        done = 0
        # In the same parts as the senders were, because their runs are at hand.
        for until in (*(until for until, _ in self.screens), len(self.order)):
            part = f"{name}, edges {done}"
            measured.append(self._patch(part, found, receivers, self.order[done:until], knocked_out, apart=True))
            done = until
        back = self.order.argsort()
        return {
            Edge(sender, receiver): torch.cat([each[index][row] for each in measured])[back].double().numpy()
            for index, receiver in enumerate(receivers)
            for row, sender in enumerate(found)
            if sender.depth < receiver.depth
        }

    def _choose_edges(self, edges: Mapping[Edge, np.ndarray], found: Sequence[Node], together: int) -> tuple[Edge, ...]:
        kept: list[Edge] = []
        for node in found:
            mine = [edge for edge in edges if edge.source == node]
            passing = [edge for edge in mine if self._passes(edges[edge], self.least / together)]
            kept += passing or sorted(mine, key=lambda edge: -abs(edges[edge].mean()))[:1]
        return tuple(kept)

    def _passes(self, effects: np.ndarray, least: float) -> bool:
        low, high = interval(self.weights @ effects)
        return bool(abs(effects.mean()) >= least and (low > 0 or high < 0))

    def _patch(
        self,
        name: str,
        senders: Sequence[Node],
        receivers: Sequence[Node],
        rows: Tensor,
        knocked_out: Sequence[Node],
        apart: bool = False,
    ) -> list[Float[Tensor, "sender prompt"]]:
        """Effects on some prompts, of the receivers together or of each apart."""

        def measure() -> dict[str, Tensor]:
            found = patch_paths(
                self.model,
                self.prompts.pick(rows),
                [(senders, receivers)],
                knocked_out=knocked_out,
                reference=self.prompts,
                apart=apart,
                pairs=self.pairs,
                memory=self.memory,
                progress=about(self.progress, name),
            )
            return {str(number): each.effects for number, each in enumerate(found)}

        part = f"{len(self.steps):02} {name}"
        kept = self.parts.made(part, measure)
        expected = {str(number): (len(senders), len(rows)) for number in range(len(receivers) if apart else 1)}
        if {number: tuple(effects.shape) for number, effects in kept.items()} != expected:
            raise StorageError(f"the part {part!r} that was kept is of another discovery; remove parts/ and run again")
        return [kept[number] for number in expected]

    def _read_clean(self) -> None:
        """LD on all prompts, which thresholds are shares of."""

        def measure() -> dict[str, Tensor]:
            return {"logit_diff": measure_behaviour(self.model, self.prompts).logit_diff}

        self.clean = self.parts.made("clean", measure)["logit_diff"].double().numpy()
        self.least = self.settings.threshold * require_difference(self.clean, self.weights)

    def _take(self, step: Step, only: Sequence[Node] | None = None) -> list[Node]:
        """Adds what a step found; gives the nodes that are new."""
        new: list[Node] = []
        chosen = step.found if only is None else only
        for node in chosen:
            if node not in self.scores:
                new.append(node)
                self.scores[node] = float(step.effects[step.senders.index(node)].mean())
        for edge in step.kept:
            if edge.source in chosen and edge not in self.edges:
                self.edges[edge] = float(step.edges[edge].mean())
        return new

    def _receivers(self, nodes: Sequence[Node]) -> dict[tuple[str | None, str], tuple[Node, ...]]:
        """What some nodes read, by the position where it stands and by whether the node helps."""
        attention = self._attention(nodes)
        found: dict[tuple[str | None, str], dict[Node, None]] = {}
        for node in nodes:
            if node.layer == 0:
                continue
            kind = "helping" if self.scores[node] < 0 else "hindering"
            query, key, value = (Node("head", node.layer, node.head, None, channel) for channel in ("q", "k", "v"))
            found.setdefault((node.position, kind), {})[query.at(node.position)] = None
            for position, share in attention[node].items():
                if share >= self.settings.attention:
                    found.setdefault((position, kind), {}).update({key.at(position): None, value.at(position): None})
        return {place: tuple(receivers) for place, receivers in found.items()}

    def _attention(self, nodes: Sequence[Node]) -> dict[Node, dict[str | None, float]]:
        if not self.positions:
            return {node: {None: 1.0} for node in nodes}
        chosen = sorted(nodes, key=str)

        def measure() -> dict[str, Tensor]:
            return {"attention": attention_to(self.model, self.prompts, chosen, self.positions, self.memory)}

        kept = self.parts.made(f"{len(self.steps):02} attention", measure)["attention"]
        return {
            node: {name: float(share) for name, share in zip(self.positions, row, strict=True)}
            for node, row in zip(chosen, kept, strict=True)
        }

    def _circuit(self, movers: Sequence[Node], backups: Sequence[Node]) -> Circuit:
        provenance = {
            "method": "path patching",
            "sign": SIGN,
            "threshold": self.settings.threshold,
            "attention": self.settings.attention,
            "screening": [until for until, _ in self.screens],
            "task": self.prompts.task,
            "n_prompts": len(self.prompts),
            "logit_diff": float(self.clean.mean()),
            "movers": [str(node) for node in movers],
            "backups": [str(node) for node in backups],
        }
        # END is always looked at.
        positions = self.positions if not self.positions or "end" in self.positions else (*self.positions, "end")
        return Circuit(shape_of(self.model), self.scores, self.edges, positions=positions, provenance=provenance)


def _drawn(prompts: PromptSet, seed: int) -> list[int]:
    """The prompts in random order, of every template and group one before any gives a second."""
    turns: Counter[tuple[str, str]] = Counter()
    found: list[tuple[int, int]] = []
    for row in np.random.default_rng(seed).permutation(len(prompts)).tolist():
        record = prompts.records[row] if prompts.records else None
        key = (record.template, record.group) if record else ("", "")
        found.append((turns[key], row))
        turns[key] += 1
    return [row for _, row in sorted(found, key=lambda each: each[0])]
