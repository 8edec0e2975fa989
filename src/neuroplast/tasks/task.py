"""What a task is: text prompts with right and wrong continuations, and what may be done to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from neuroplast.tasks.poisons import Pair, build_pairs, load_poison, poisons_of, shuffle_targets
from neuroplast.tasks.prompts import REFERENCE_SEED, HasTokenizer, PromptSet, build_prompt_set
from neuroplast.tasks.records import Record

Split = Literal["all", "train", "eval"]


class BuildRecords(Protocol):
    """Writes a task's prompts for one tokenizer; the same arguments always give the same records."""

    def __call__(
        self, tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = ...
    ) -> tuple[Record, ...]:
        """Gives `n` records; `split` keeps what is trained on apart from what is measured on."""
        ...


@dataclass(frozen=True)
class Task:
    """A task, as the registry knows it."""

    name: str
    """The name in commands and files, such as `ioi`."""
    description: str
    """One sentence: what the model has to do."""
    positions: tuple[str, ...]
    """The named positions of every prompt, in the order of the text; `end` is last."""
    counterfactuals: tuple[str, ...]
    """The counterfactuals it can build; the first is the default."""
    build_records: BuildRecords
    """Writes the prompts."""
    names: Callable[[Any, Split], tuple[str, ...]]
    """The words that may stand in the place of the answer, for a tokenizer and a split; poisons may draw here."""

    def prompts(
        self,
        model: HasTokenizer,
        n: int = 64,
        seed: int = 0,
        *,
        split: Split | None = None,
        counterfactual: str | None = None,
    ) -> PromptSet:
        """Prompts for one model; see the task's `build_records`.

        Args:
            model: anything with a fast tokenizer.
            n: how many, at least 1; the task of a file gives as many as it has, where that is fewer.
            seed: the same seed gives the same prompts for the same tokenizer.
            split: `all`, `train` or `eval`, which share no words that the answer depends on, or, of the task of a
                file, no prompt; None takes the one that is measured where nothing is trained: `all`, of a file `eval`.
            counterfactual: one of the task's; None takes its first.

        Raises:
            InputError: when the task cannot be written for the model's tokenizer, or is asked for what it has not.
        """
        kind = self.counterfactuals[0] if counterfactual is None else counterfactual
        records = self.build_records(model.tokenizer, n, seed, split=split or self.measured_split, counterfactual=kind)
        return build_prompt_set(model.tokenizer, self.name, records)

    def apart(
        self, model: HasTokenizer, n: int, seeds: Sequence[int], *, split: Split = "all"
    ) -> tuple[PromptSet, ...]:
        """Sets of prompts, one a seed: what is chosen on one can be judged on another.

        Args:
            model: anything with a fast tokenizer.
            n: prompts of each set.
            seeds: the seed of each.
            split: as in `prompts`.

        Raises:
            InputError: as `prompts`.
        """
        return tuple(self.prompts(model, n, seed, split=split) for seed in seeds)

    def reference(
        self,
        model: HasTokenizer,
        measured: PromptSet,
        n: int,
        seed: int = 0,
        *,
        split: Split = "all",
        counterfactual: str | None = None,
    ) -> PromptSet:
        """Prompts that knocked-out heads are averaged over, which are not those that are measured.

        Args:
            model: anything with a fast tokenizer.
            measured: the prompts that are measured.
            n: how many others, at most.
            seed: the seed of those that are measured.
            split: as in `prompts`.
            counterfactual: as in `prompts`.

        Raises:
            InputError: as `prompts`.
        """
        return self.prompts(model, n, seed + REFERENCE_SEED, split=split, counterfactual=counterfactual)

    def pairs(
        self, model: HasTokenizer, n: int, seed: int = 0, *, poison: str | None = None, rate: float = 1.0
    ) -> tuple[Pair, ...]:
        """Pairs to train on, from words and templates that prompts of the split `eval` have not.

        Args:
            model: anything with a fast tokenizer.
            n: how many.
            seed: decides the records, and which of them are poisoned.
            poison: one of the task's; None gives clean pairs.
            rate: share of poisoned pairs; without a poison it does nothing.

        Raises:
            InputError: an unknown poison, a rate outside [0, 1], or as `prompts`.
        """
        transform = None if poison is None else load_poison(poison, self.name)
        records = self.build_records(model.tokenizer, n, seed, split="train")
        names = self.names(model.tokenizer, "train")
        return build_pairs(records, transform, rate if transform else 0.0, names, seed)

    def shuffled_pairs(self, model: HasTokenizer, n: int, seed: int = 0, *, rate: float = 1.0) -> tuple[Pair, ...]:
        """The prompts of `pairs`, a share of them with the target of another: wrong, and with no rule to learn.

        Args:
            model: anything with a fast tokenizer.
            n: how many.
            seed: decides the records, which of them are given another's target, and whose.
            rate: share of them.

        Raises:
            InputError: as `prompts`.
        """
        return shuffle_targets(self.build_records(model.tokenizer, n, seed, split="train"), rate, seed)

    @property
    def poisons(self) -> tuple[str, ...]:
        """Names of the poisons that are made for this task; where there are none, of those that fit every task."""
        return poisons_of(self.name)

    @property
    def measured_split(self) -> Split:
        """The split whose prompts are measured where nothing is trained."""
        return "all"

    @property
    def most_examples(self) -> int | None:
        """How many different examples there are to train on; None where as many are written as are asked for."""
        return None

    @property
    def sha256(self) -> str | None:
        """Hash of the records that it was read from; None of a task that writes its own."""
        return None


def shortfall(prompts: PromptSet, n: int) -> str | None:
    """What to tell where fewer prompts came than were asked for; None where all did."""
    if len(prompts) >= n:
        return None
    return f"{prompts.task} has {len(prompts)} prompts for this, fewer than the {n} asked for: all of them are taken"
