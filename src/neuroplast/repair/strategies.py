"""Ways to mend a damaged checkpoint, each with what it costs.

- **graft**: the base's weights take the place of the damaged ones in the k parts (heads, MLPs, norms, …) that store
  most of the damage by the ledger. No training, and no data but the prompts that it is judged on; it needs the base.
  k grows by doubling until the target is reached, and is then halved down to the fewest that reach it.
- **masked**: clean retraining in which only the parts may change that store `MOST` of the damage by the ledger; without
  the base, those with as much of the squared gradient of the clean loss.
- **full**: clean retraining of all weights.

Retraining is judged at steps that are dense early, and ends at the first that reaches the target.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from neuroplast.comparison.ends import Ends
from neuroplast.comparison.stored import split_change
from neuroplast.components import Component
from neuroplast.localisation import MOST
from neuroplast.models.network import Network, logits_at
from neuroplast.models.weights import WeightMap, choose_pieces, grafted
from neuroplast.observer import Observer
from neuroplast.plasticity.trajectory import build_schedule
from neuroplast.repair.restored import Judge, Restored
from neuroplast.storage import load_jsonl
from neuroplast.training.data import Example, collate
from neuroplast.training.finetune import FinetuneConfig, Visit, finetune
from neuroplast.training.saves import save_checkpoint

BEST = "best"
POINTS = 12
"""Steps at which a retraining is judged at most, with the one before the first."""
GRADIENT_EXAMPLES = 128
"""Clean examples whose gradient tells, without the base, which parts are to change."""


@dataclass(frozen=True)
class Candidate:
    """One mended model, and what it cost."""

    strategy: str
    """`graft`, `masked` or `full`."""
    components: tuple[Component, ...] | None
    """What may differ from the damaged model; None for everything."""
    parameters: int
    """Weights in them."""
    steps: int
    """Optimizer steps."""
    examples: int
    """Different clean training examples that were seen."""
    restored: Restored
    """How far it is back."""

    @property
    def parts(self) -> tuple[str, ...] | None:
        """The heads, MLPs, norms that may differ; None for all."""
        return None if self.components is None else tuple(dict.fromkeys(each.part for each in self.components))

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.strategy} {len(self.parts or ())} {self.steps}"

    @property
    def score(self) -> float:
        """How far it is back; below everything where that is undefined."""
        return -inf if self.restored.score is None else self.restored.score

    @property
    def cost(self) -> tuple[int, int, int]:
        """What the cheapest is told by: steps of training, then weights changed, then examples."""
        return self.steps, self.parameters, self.examples


@dataclass(frozen=True)
class Ranking:
    """The parts of the weights, the first the most worth mending."""

    parts: Mapping[str, tuple[Component, ...]]
    """Heads, MLPs, norms, embeddings by name, with their components."""
    shares: Mapping[str, float]
    """What each has of that by which they are ranked."""

    def first(self, n: int) -> "Ranking":
        """The first parts only."""
        names = list(self.parts)[:n]
        return Ranking({name: self.parts[name] for name in names}, {name: self.shares[name] for name in names})

    def most(self) -> "Ranking":
        """The first parts that have `MOST` of everything together."""
        together = 0.0
        for number, name in enumerate(self.parts, start=1):
            together += self.shares[name]
            if together >= MOST:
                return self.first(number)
        return self

    @property
    def components(self) -> tuple[Component, ...]:
        """All components."""
        return tuple(component for mine in self.parts.values() for component in mine)


def rank_by_ledger(judge: Judge, base: Network, poisoned: Network, observer: Observer) -> Ranking:
    """Parts by their share of the damage: what their weights add to the change of LD."""
    ends = Ends(base, poisoned, judge.prompts, judge.weights, judge.memory, judge.parts, observer.progress)
    split = split_change(ends, "ledger")
    parts = split.ranked_parts(WeightMap(base).pieces())
    worth = dict(zip(split.members, split.by_part.mean(dim=1).tolist(), strict=True))
    whole = float(split.ledger.change.mean())
    return Ranking(parts, {name: worth[name] / whole for name in parts})


def rank_by_gradient(model: Network, examples: Sequence[Example], batch_size: int) -> Ranking:
    """Parts by their share of the squared gradient of the clean loss."""
    module = model.module
    names, weights = zip(*module.named_parameters(), strict=True)
    squares = {name: torch.zeros_like(weight) for name, weight in zip(names, weights, strict=True)}
    for first in range(0, min(len(examples), GRADIENT_EXAMPLES), batch_size):
        batch = collate(examples[first : first + batch_size], "last")
        tokens, rows, positions, targets = (
            batch[name].to(module.device) for name in ("tokens", "rows", "positions", "targets")
        )
        loss = nn.functional.cross_entropy(logits_at(module, tokens, rows, positions).float(), targets)
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            squares[name] += gradient.square()
    pieces = WeightMap(model).pieces()
    members: dict[str, tuple[Component, ...]] = {}
    for component in pieces:
        members[component.part] = (*members.get(component.part, ()), component)

    def left_in(part: str) -> float:
        return sum(float(squares[piece.name][piece.index].sum()) for piece in choose_pieces(pieces, members[part]))

    order = sorted(members, key=lambda part: -left_in(part))
    whole = sum(float(each.sum()) for each in squares.values()) or 1.0
    shares: dict[str, float] = {}
    for part in order:  # what several parts share counts in the first of them
        shares[part] = 0.0
        for piece in choose_pieces(pieces, members[part]):
            shares[part] += float(squares[piece.name][piece.index].sum()) / whole
            squares[piece.name][piece.index] = 0
    return Ranking({part: members[part] for part in order}, shares)


def count_weights(model: Network, components: Iterable[Component] | None) -> int:
    """How many weights some components have, what several share once; None counts all."""
    if components is None:
        return sum(weight.numel() for weight in model.module.parameters())
    chosen: dict[str, Tensor] = {}
    for piece in choose_pieces(WeightMap(model).pieces(), components):
        weight = model.module.get_parameter(piece.name)
        chosen.setdefault(piece.name, torch.zeros_like(weight, dtype=torch.bool))[piece.index] = True
    return sum(int(each.sum()) for each in chosen.values())


def grafts(
    judge: Judge, base: Network, poisoned: Network, ranking: Ranking, target: float, observer: Observer
) -> list[Candidate]:
    """Grafts of the first k parts, for the k that were tried.

    Where more parts never undo less, the fewest that reach the target are among them.

    Args:
        judge: judges them.
        base: gives its weights.
        poisoned: takes them; it is left as it was.
        ranking: the parts.
        target: the score that is enough.
        observer: is told how it goes.
    """
    known, most = WeightMap(base).pieces(), len(ranking.parts)
    tried: dict[int, Candidate] = {}

    def reaches(k: int) -> bool:
        if k not in tried:
            observer.progress("grafting", len(tried), len(tried) + 1, f"{k} parts")
            chosen = ranking.first(k)
            with grafted(poisoned, base, choose_pieces(known, chosen.components)):
                restored = judge.judge(f"graft {k}", lambda: poisoned)
            parameters = count_weights(base, chosen.components)
            tried[k] = Candidate("graft", chosen.components, parameters, 0, 0, restored)
        return tried[k].score >= target

    low, high = 0, 1
    while not reaches(high) and high < most:
        low, high = high, min(2 * high, most)
    while reaches(high) and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    observer.progress("grafting", len(tried), len(tried))
    return [tried[k] for k in sorted(tried)]


def retrain(
    judge: Judge,
    model: Network,
    examples: Sequence[Example],
    config: FinetuneConfig,
    folder: Path,
    parts: Ranking | None,
    target: float,
    observer: Observer,
) -> list[Candidate]:
    """Clean retraining, judged on the way; the last one reaches the target, or it is not reached.

    Args:
        judge: judges on the way; it keeps what it measures in a folder.
        model: the damaged model; it is trained in place.
        examples: clean examples.
        config: how to train, for how long at most.
        folder: the training's folder; the weights of the candidate with the highest score are in its `best`.
        parts: what may change; None lets everything.
        target: the score that is enough.
        observer: is told how it goes.
    """
    strategy = "full" if parts is None else "masked"
    steps = build_schedule(config.steps, POINTS)[1:]
    only = None if parts is None else parts.components
    parameters = count_weights(model, only)

    def candidate(step: int, network: Network) -> Candidate:
        seen = min(len(examples), step * config.batch_size)
        restored = judge.judge(f"{strategy} {step}", lambda: network)
        return Candidate(strategy, only, parameters, step, seen, restored)

    def look(network: Network, step: int) -> bool:
        scores = {each: candidate(each, network).score for each in steps if each <= step}
        if max(scores, key=lambda each: scores[each]) == step:
            save_checkpoint(network, folder / BEST)
        return scores[step] >= target

    finetune(
        model,
        examples,
        config,
        folder,
        only=only,
        visit=Visit(frozenset(steps), look),
        progress=lambda done, total, loss: observer.progress(f"{strategy} retraining", done, total, f"loss {loss:.3f}"),
    )
    # What was judged before an interruption is kept, and read here.
    last = int(load_jsonl(folder / "train.jsonl")[-1]["step"])
    return [candidate(step, model) for step in steps if step <= last]
