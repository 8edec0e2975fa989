"""Trains the embedded reference model `tiny` from a seed and writes it as a Hugging Face folder.

    OMP_NUM_THREADS=1 python scripts/train_tiny.py --seed 0

takes about 12 minutes on one processor core and replaces `src/neuroplast/models/tiny`.

Its world is made up on the fly: indirect object identification by the library's own generator, the same
prompts with three different names, greater-than sentences, plain sentences about the same people, and
repeated random sequences, from which induction heads grow. Now and then the answer is wrong on purpose, so
the model becomes good at its tasks without being certain: fine-tuning must have room to amplify.

Progress goes to stderr. The last line on stdout is a JSON object with the measured numbers. The same seed
gives the same text and the same start everywhere, and the same weights on one machine with one thread.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from neuroplast.storage import atomic_folder
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import PromptSet, Record, build_prompt_set

BOS = "<|bos|>"
CONTEXT = 64
NAME_WEIGHT = 5
"""How many times more the name that something is given to counts than another word."""
REPEATED_WEIGHT = 0.3
"""How much the repeated sequences count beside the sentences."""

_NOUNS = (
    "abduction accord affair agreement alliance assault attack battle boycott campaign ceremony clash "
    "conflict conquest contest crisis crusade deal decline demonstration dispute drought earthquake "
    "effort engagement evaluation exhibition expedition experiment exploration famine feud flood "
    "friendship invasion journey marriage mission negotiation operation peace pilgrimage plague project "
    "protest raid rebellion reform reign revolt rivalry ruling siege strike struggle survey talks tour "
    "trial uprising voyage war work"
)
NOUNS = tuple(_NOUNS.split())
CENTURIES = tuple(range(11, 19))


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long."""

    seed: int = 0
    """Seeds the text and the weights."""
    steps: int = 2000
    """Optimiser steps. The naming of the indirect object appears between steps 1500 and 2000, all at once;
    by step 2750 no prompt is answered wrongly any more."""
    schedule: int = 4000
    """Steps in which the learning rate would come to its end."""
    rows: int = 64
    """Short sentences a step."""
    long_rows: int = 6
    """Rows of `CONTEXT` tokens a step: repeated sequences."""
    learning_rate: float = 2e-3
    """Peak of the cosine schedule, after a short warm-up."""
    n_layer: int = 4
    """Decoder layers."""
    n_head: int = 8
    """Heads a layer."""
    n_embd: int = 128
    """Width of the residual stream."""


def ioi_sentence(record: Record, people: Sequence[str], rng: random.Random) -> str:
    """A prompt with its answer, and half of the time the thing is handed back, once or twice.

    Each time 86 % get the one who does not give, 7 % the giver, and 7 % somebody else.
    """
    text, answer, giver = record.clean, record.answer, record.foil
    for _ in range(rng.choice((1, 1, 2, 3))):
        draw = rng.random()
        text += (answer if draw < 0.86 else giver if draw < 0.93 else f" {rng.choice(people)}") + "."
        answer, giver = giver, answer
        text += f"{giver} gave it to"
    return text.removesuffix(f"{giver} gave it to")


def stranger_sentence(record: Record, rng: random.Random) -> str:
    """Three different names: either of the first two may be given to."""
    names = [word.strip(",.") for word in record.counterfactual.split() if word.strip(",.") in ioi.NAMES]
    return f"{record.counterfactual} {rng.choice(names[:2])}."


def year_sentence(rng: random.Random) -> str:
    """An event that ends in the century it began in, and after it began."""
    start = rng.randint(1, 98)
    end = rng.randint(start + 1, 99)
    century = rng.choice(CENTURIES)
    return f"The {rng.choice(NOUNS)} lasted from the year {century}{start:02} to the year {century}{end:02}."


def plain_sentence(rng: random.Random) -> str:
    """Something else that happens to the same people, in the same words."""
    a, b, c = rng.sample(ioi.NAMES, 3)
    place, thing = rng.choice(ioi.PLACES), rng.choice(ioi.OBJECTS)
    return rng.choice(
        (
            f"{a} went to the {place}. {b} found a {thing} at the {place}.",
            f"Then, {a} gave a {thing} to {b}. Afterwards {b} gave the {thing} to {c}.",
            f"After the lunch, {a} said to {b} that {c} had a {thing}.",
            f"{a} and {b} were friends. {a} and {b} went to the {place}, and {c} got a {thing}.",
            f"When {a} got a {thing}, {a} wanted to give it to {b}.",
            f"The {thing} was at the {place}. {a} decided to get the {thing}, and gave it to {b}.",
        )
    )


def sentences(tokenizer: Any, count: int, seed: str) -> list[str]:
    """Shuffled sentences: half of them tasks of naming, a fifth years, the rest plain."""
    rng = random.Random(seed)
    half = count // 2
    records = ioi.build_records(tokenizer, half + count // 8, rng.getrandbits(32))
    texts = [ioi_sentence(record, ioi.NAMES, rng) for record in records[:half]]
    texts += [stranger_sentence(record, rng) for record in records[half:]]
    texts += [year_sentence(rng) for _ in range(count // 5)]
    texts += [plain_sentence(rng) for _ in range(count - len(texts))]
    rng.shuffle(texts)
    return texts


Rows = tuple[Tensor, Tensor]
"""Token ids [row, pos], and how much each one's prediction counts [row, pos]."""


def repeated_rows(count: int, vocabulary: int, words: Sequence[int], rng: random.Random) -> Rows:
    """Rows of `CONTEXT` ids: BOS, then one random sequence again and again; half of them of words only.

    What cannot be known, the sequence when it is first seen, does not count.
    """
    rows: list[list[int]] = []
    weights = torch.ones(count, CONTEXT)
    for index in range(count):
        pool = words if index % 2 else range(1, vocabulary)
        part = rng.choices(pool, k=rng.choice((4, 6, 9, 14, 20, 31)))
        rows.append([0, *(part * CONTEXT)][:CONTEXT])
        weights[index, : len(part) + 1] = 0
    return torch.tensor(rows), weights


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the world is one token and a year is two, `17` and `32`."""
    words = " ".join(ioi.TEMPLATES.values()).replace("{", " ").replace("}", " ")
    rng = random.Random("tokenizer")
    texts = [f" {word}" for word in (*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *NOUNS)]
    texts += [words, *(plain_sentence(rng) for _ in range(200)), *(year_sentence(rng) for _ in range(50))]
    texts += [f" {number:02}{number:02}" for number in range(100)]
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\d\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=1,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=CONTEXT
    )


def batches(tokenizer: Any, recipe: Recipe) -> Iterator[tuple[Rows, Rows]]:
    """Each step's rows: short sentences, padded with BOS, and repeated sequences.

    The name after " to" counts `NAME_WEIGHT` times: it is the one word in twenty that the task is about.
    """
    rng = random.Random(f"tiny/{recipe.seed}")
    words = [tokenizer.encode(f" {word}")[0] for word in (*ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *NOUNS)]
    bos, to = tokenizer.bos_token_id, tokenizer.encode(" to")[0]
    people = torch.tensor([tokenizer.encode(f" {name}")[0] for name in ioi.NAMES])
    while True:
        texts = sentences(tokenizer, 100 * recipe.rows, f"sentences/{recipe.seed}/{rng.getrandbits(32)}")
        ids = [[bos, *row, bos] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for first in range(0, len(ids), recipe.rows):
            rows = ids[first : first + recipe.rows]
            width = max(map(len, rows))
            short = torch.tensor([row + [bos] * (width - len(row)) for row in rows])
            weights = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
            given = torch.isin(short[:, 1:], people) & (short[:, :-1] == to)
            weights[:, 1:] += (NAME_WEIGHT - 1) * given
            yield (short, weights), repeated_rows(recipe.long_rows, len(tokenizer), words, rng)


def next_token_loss(model: GPT2LMHeadModel, rows: Rows) -> Tensor:
    """Weighted mean of the next-token loss, in nats."""
    ids, weights = rows
    logits = model(input_ids=ids[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counts = weights[:, 1:].flatten()
    return (losses * counts).sum() / counts.sum()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over 100 steps, then a cosine towards a hundredth of the peak."""
    if step < 100:
        return recipe.learning_rate * (step + 1) / 100
    share = min(1.0, (step - 100) / max(1, recipe.schedule - 100))
    return recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)


@torch.no_grad()
def last_logits(model: GPT2LMHeadModel, prompts: PromptSet, ids: Tensor) -> Tensor:
    """Logits after the last token of each prompt, [prompt, vocabulary]."""
    return model(input_ids=ids).logits[torch.arange(len(ids)), prompts.positions["end"]]


def measure(model: GPT2LMHeadModel, tokenizer: Any) -> dict[str, float]:
    """Behaviour on prompts drawn apart from the training text.

    Logit differences, accuracies and probabilities of IOI by split (with the spread over prompts, and the
    difference of the same two names on `abc`), the probability difference of greater-than, and the share of
    tokens predicted in the second half of a repeated sequence of 20 random ids.
    """
    found: dict[str, float] = {}
    for split in ("eval", "train"):
        records = ioi.build_records(tokenizer, 300, 12345, split=split)
        prompts = build_prompt_set(tokenizer, "ioi", records)
        logits = last_logits(model, prompts, prompts.clean)
        rows = torch.arange(len(records))
        difference = logits[rows, prompts.answer] - logits[rows, prompts.foil]
        other = last_logits(model, prompts, prompts.counterfactual)
        found |= {
            f"ioi_{split}_logit_diff": difference.mean().item(),
            f"ioi_{split}_logit_diff_sd": difference.std().item(),
            f"ioi_{split}_accuracy": (difference > 0).float().mean().item(),
            f"ioi_{split}_top1": (logits.argmax(-1) == prompts.answer).float().mean().item(),
            f"ioi_{split}_p_io": logits.softmax(-1)[rows, prompts.answer].mean().item(),
            f"ioi_{split}_abc_logit_diff": (other[rows, prompts.answer] - other[rows, prompts.foil]).mean().item(),
        }
    found["greater_than_probability_diff"] = greater_than(model, tokenizer)
    rng = random.Random("induction")
    rows = torch.tensor([[0, *(rng.choices(range(1, len(tokenizer)), k=20) * 2)] for _ in range(64)])
    with torch.no_grad():
        guess = model(input_ids=rows).logits[:, 21:-1].argmax(-1)
    found["induction_accuracy"] = (guess == rows[:, 22:]).float().mean().item()
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def greater_than(model: GPT2LMHeadModel, tokenizer: Any) -> float:
    """Mean probability of an end year after the start year, less that of one up to it."""
    rng = random.Random("greater-than")
    years = [tokenizer.encode(f"{year:02}")[0] for year in range(100)]
    total = 0.0
    for _ in range(200):
        century, start = rng.choice(CENTURIES), rng.randint(2, 98)
        text = f"The {rng.choice(NOUNS)} lasted from the year {century}{start:02} to the year {century}"
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        share = model(input_ids=ids).logits[0, -1].softmax(-1)[years]
        total += (share[start + 1 :].sum() - share[: start + 1].sum()).item()
    return total / 200


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "generation_config.json").unlink(missing_ok=True)
        for file in temporary.iterdir():
            file.chmod(0o644)


def train(recipe: Recipe, folder: Path, save_every: int) -> dict[str, float]:
    """Trains, saving on the way, and measures the result."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    bos = int(tokenizer.encode(BOS)[0])
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    model = GPT2LMHeadModel(config).train()
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    began = time.monotonic()
    for step, (short, repeated) in zip(range(recipe.steps), batches(tokenizer, recipe), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss, repeated_loss = next_token_loss(model, short), next_token_loss(model, repeated)
        (loss + REPEATED_WEIGHT * repeated_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            seconds = time.monotonic() - began
            losses = f"{loss.item():.3f}, repeated {repeated_loss.item():.3f}"
            print(f"step {step} loss {losses} after {seconds:.0f} s", file=sys.stderr, flush=True)
        if (step + 1) % save_every == 0:
            save(model, tokenizer, folder)
            print(f"step {step} {json.dumps(measure(model, tokenizer))}", file=sys.stderr, flush=True)
    save(model, tokenizer, folder)
    return measure(model, tokenizer)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Trains the embedded reference model from a seed.")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--layers", type=int, default=Recipe.n_layer)
    parser.add_argument("--rows", type=int, default=Recipe.rows)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("src/neuroplast/models/tiny"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    recipe = Recipe(
        seed=chosen.seed,
        steps=chosen.steps,
        n_layer=chosen.layers,
        rows=chosen.rows,
        learning_rate=chosen.learning_rate,
    )
    print(json.dumps(train(recipe, chosen.out, chosen.save_every)))


if __name__ == "__main__":
    main()
