"""The prompts one by one: what each stage makes of them, and what each head does on them."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.report.documents import Document
from neuroplast.report.measured import load_measured
from neuroplast.report.results import Stage
from neuroplast.storage import load_jsonl

MOST_BYTES = 2_000_000
"""Most bytes of head effects by prompt on the page; stages beyond that go without."""
PROMPTS = "prompts/measured.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One prompt, as text."""

    text: str
    """The prompt, without its continuation."""
    answer: str
    """The right continuation; of several, the first."""
    foil: str
    """The wrong one."""
    template: str
    """The name of its pattern."""
    group: str
    """The split that is reported apart."""
    n_answers: int = 1
    """How many right continuations there are."""
    n_foils: int = 1
    """How many wrong ones."""


@dataclass(frozen=True)
class OnPrompts:
    """One stage on each prompt."""

    logit_diff: np.ndarray
    """Logit difference, (prompt,)."""
    answer_probability: np.ndarray
    """Probability of the answer, (prompt,)."""
    effects: np.ndarray
    """Effect of every head, (layer, head, prompt)."""


def load_prompts(run: Path, stages: Sequence[Stage]) -> tuple[tuple[Prompt, ...], dict[str, OnPrompts]]:
    """Reads the prompts, and by stage what it makes of them; nothing where the run does not keep them.

    Raises:
        InputError: when the files do not go together.
        StorageError: when one cannot be read.
    """
    if not (run / PROMPTS).is_file():
        return (), {}
    rows = [Document(f"{PROMPTS}: line {n}", row) for n, row in enumerate(load_jsonl(run / PROMPTS), start=1)]
    prompts = tuple(
        Prompt(
            row["clean"].text(),
            row["answer"].text(),
            row["foil"].text(),
            row["template"].text_or_none() or "",
            row["group"].text_or_none() or "",
            1 + len(row["more_answers"].elements()),
            1 + len(row["more_foils"].elements()),
        )
        for row in rows
    )
    found: dict[str, OnPrompts] = {}
    for stage in stages:
        path = run / f"stages/{stage.id}/effects.safetensors"
        if not path.is_file():
            continue
        n, (layers, heads) = len(prompts), (len(stage.effects.mean), len(stage.effects.mean[0]))
        shapes = {"logit_diff": (n,), "answer_probability": (n,), "effects": (layers, heads, n)}
        found[stage.id] = OnPrompts(*load_measured(path, shapes))
    return prompts, found


def prompts_data(prompts: Sequence[Prompt], on: dict[str, OnPrompts], stages: Sequence[Stage]) -> dict[str, Any]:
    """What the page's script shows: numbers by stage and prompt, and effects as 16-bit shares of `bound`.

    Args:
        prompts: the prompts.
        on: by stage id, from `load_prompts`.
        stages: all stages of the page, in order.
    """
    shown = [stage for stage in stages if stage.id in on]
    bound = max((float(np.abs(each.effects).max()) for each in on.values()), default=0.0) or 1.0
    left = MOST_BYTES
    rows: list[dict[str, Any]] = []
    for stage in shown:
        each = on[stage.id]
        by_prompt = each.effects.reshape(-1, len(prompts)).T
        coded = base64.b64encode(np.rint(by_prompt / bound * 32767).astype("<i2").tobytes()).decode()
        left -= len(coded)
        rows.append(
            {
                "id": stage.id,
                "kind": stage.kind,
                "ld": np.round(each.logit_diff, 4).tolist(),
                "probability": np.round(each.answer_probability, 5).tolist(),
                "effects": coded if left >= 0 else None,
            }
        )
    return {
        "bound": bound,
        "prompts": [[p.text, p.answer, p.foil, p.template, p.group, p.n_answers, p.n_foils] for p in prompts],
        "stages": rows,
    }


def prompt_rows(prompts: Sequence[Prompt], on: dict[str, OnPrompts]) -> Iterable[list[str | float | int]]:
    """Rows of `prompts.csv`: stage, prompt, texts, logit difference and probability of the answer."""
    for stage, each in on.items():
        for number, prompt in enumerate(prompts):
            numbers = float(each.logit_diff[number]), float(each.answer_probability[number])
            yield [
                stage, number, prompt.text, prompt.answer, prompt.foil, prompt.template, prompt.group, *numbers
            ]  # fmt: skip
