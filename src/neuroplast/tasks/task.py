"""What a task is: text prompts with right and wrong continuations, and what may be done to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from neuroplast.tasks.poisons import POISONS, Pair, build_pairs, load_poison, shuffle_targets
from neuroplast.tasks.prompts import HasTokenizer, PromptSet, Record, build_prompt_set

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
        split: Split = "all",
        counterfactual: str | None = None,
    ) -> PromptSet:
        """Prompts for one model; see the task's `build_records`.

        Args:
            model: anything with a fast tokenizer.
            n: how many, at least 1.
            seed: the same seed gives the same prompts for the same tokenizer.
            split: `all`, `train` or `eval`; the last two share no words that the answer depends on.
            counterfactual: one of the task's; None takes its first.

        Raises:
            InputError: when the task cannot be written for the model's tokenizer, or is asked for what it has not.
        """
        kind = self.counterfactuals[0] if counterfactual is None else counterfactual
        records = self.build_records(model.tokenizer, n, seed, split=split, counterfactual=kind)
        return build_prompt_set(model.tokenizer, self.name, records)

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
        """The poisons that fit this task, by name."""
        return tuple(poison.name for poison in POISONS.values() if self.name in poison.tasks)
