"""Training data: pairs as token ids, and the order in which they are seen."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuroplast.errors import InputError
from neuroplast.processes import Processes
from neuroplast.tasks.poisons import Pair
from neuroplast.tasks.prompts import encode_with_bos, single_token

Loss = Literal["last", "all"]
"""Where the loss is taken: the last token only, or every token of the sequence."""


@dataclass(frozen=True)
class Example:
    """One pair as token ids."""

    tokens: tuple[int, ...]
    """The prompt, BOS first, without the target."""
    target: int
    """The token that is taught at the prompt's last position."""


def build_examples(tokenizer: Any, pairs: Sequence[Pair]) -> list[Example]:
    """Tokenises pairs.

    Raises:
        InputError: no pairs, or a target that is not one token.
    """
    if not pairs:
        raise InputError("0 training pairs: fine-tuning needs at least 1")
    return [
        Example(tuple(encode_with_bos(tokenizer, pair.prompt)), single_token(tokenizer, pair.target)) for pair in pairs
    ]


def schedule_examples(examples: Sequence[Example], batch_size: int, steps: int, seed: int) -> list[Example]:
    """The examples in the order of training, `steps * batch_size` of them: epoch after epoch, each shuffled.

    A step that crosses the end of an epoch is filled from the next one, so every step has a full batch.
    """
    order: list[Example] = []
    epoch = 0
    while len(order) < steps * batch_size:
        shuffled = list(examples)
        random.Random(f"order/{seed}/{epoch}").shuffle(shuffled)
        order += shuffled
        epoch += 1
    return order[: steps * batch_size]


def collate(examples: Sequence[Example], loss: Loss) -> dict[str, Tensor]:
    """One batch: right-padded tokens, the places (row, position) where the loss is taken, and their targets."""
    width = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    places: list[tuple[int, int, int]] = []
    for row, example in enumerate(examples):
        last = len(example.tokens) - 1
        tokens[row, : last + 1] = torch.tensor(example.tokens)
        if loss == "all":
            places += [(row, position, example.tokens[position + 1]) for position in range(last)]
        places.append((row, last, example.target))
    rows, positions, targets = torch.tensor(places).T
    return {"tokens": tokens, "rows": rows, "positions": positions, "targets": targets}


def collate_share(examples: Sequence[Example], loss: Loss, processes: Processes) -> dict[str, Tensor]:
    """What one process computes of a batch, with the `weight` of its loss.

    A process's loss is a mean over its places. Times its share of the batch's places, times the number of processes,
    the mean over the processes is the mean over all places, however unevenly they are shared out.
    """
    share = collate(processes.share(examples), loss)
    places = sum(len(example.tokens) for example in examples) if loss == "all" else len(examples)
    return share | {"weight": torch.tensor(processes.count * len(share["targets"]) / places)}
