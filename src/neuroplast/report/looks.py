"""What single heads do at each stage: read from a run, and put together for the page.

A stage's `heads.json` has where each head attends and what it copies, over all prompts; `patterns.safetensors` has its
attention on the first few prompts, from every token to every token. A run of an earlier version has neither.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.errors import InputError
from neuroplast.report.documents import REMEDY, load_document
from neuroplast.report.results import Estimate, Stage, read_estimate
from neuroplast.storage import load_tensors

HEADS, PATTERNS = "heads.json", "patterns.safetensors"
MOST_BYTES = 1_500_000
"""Most bytes of attention patterns on the page; stages beyond that go without."""


@dataclass(frozen=True)
class HeadLook:
    """What one head does at one stage."""

    attention: dict[str, Estimate]
    """By named position, the attention to it from where the head stands."""
    copy: Estimate
    """Share of the names that it copies."""
    negative_copy: Estimate
    """Share of the names that it copies negatively."""


@dataclass(frozen=True)
class StageLook:
    """What was looked at at one stage."""

    stage: str
    """Id of the stage."""
    tokens: tuple[tuple[str, ...], ...]
    """Of each shown prompt, its tokens."""
    positions: dict[str, tuple[int, ...]]
    """By named position, its place in each shown prompt."""
    heads: dict[str, HeadLook]
    """By head with its position."""
    patterns: dict[str, np.ndarray]
    """By head, (prompt, query, key)."""


def load_looks(run: Path, stages: Sequence[Stage]) -> tuple[StageLook, ...]:
    """Reads what was looked at, in the order of the stages; none where nothing was.

    Raises:
        InputError: when a file does not hold what it should.
        StorageError: when the patterns cannot be read.
    """
    found: list[StageLook] = []
    for stage in stages:
        name = f"stages/{stage.id}/{HEADS}"
        if not (run / name).is_file():
            continue
        document = load_document(run, name)
        tokens = tuple(tuple(token.text() for token in row.elements()) for row in document["tokens"].elements())
        patterns = {
            head: each.double().numpy() for head, each in load_tensors(run / f"stages/{stage.id}/{PATTERNS}").items()
        }
        if any(each.ndim != 3 or len(each) != len(tokens) for each in patterns.values()):
            raise InputError(f"{run / 'stages' / stage.id / PATTERNS} does not go with {name}; {REMEDY}")
        found.append(
            StageLook(
                stage=stage.id,
                tokens=tokens,
                positions={
                    place: tuple(at.integer() for at in each.elements())
                    for place, each in document["positions"].items()
                },
                heads={
                    head: HeadLook(
                        {place: read_estimate(value) for place, value in each["attention"].items()},
                        read_estimate(each["copy"]),
                        read_estimate(each["negative_copy"]),
                    )
                    for head, each in document["heads"].items()
                },
                patterns=patterns,
            )
        )
    return tuple(found)


def looks_data(looks: Sequence[StageLook], stages: Sequence[Stage]) -> dict[str, Any]:
    """What the page's script shows of a head: its history over stages, and its attention on real prompts.

    Patterns are bytes: the rows of the lower triangle one after the other, 255 for all of the attention.

    Args:
        looks: from `load_looks`.
        stages: all stages of the page, in order.
    """
    by_stage = {look.stage: look for look in looks}
    places = dict.fromkeys(node for look in looks for node in look.heads)
    parts = dict.fromkeys(node.partition("@")[0] for node in places)
    effects: dict[str, list[list[float]]] = {}
    for part in parts:
        layer, head = (int(number) for number in part.removeprefix("a").split(".h"))
        effects[part] = [
            [round(each[layer][head], 4) for each in (s.effects.mean, s.effects.low, s.effects.high)] for s in stages
        ]
    first = looks[0] if looks else None
    return {
        "stages": [{"id": stage.id, "kind": stage.kind} for stage in stages],
        "tokens": first.tokens if first else [],
        "positions": first.positions if first else {},
        "effects": effects,
        "looks": {node: [_look(by_stage.get(stage.id), node) for stage in stages] for node in places},
        "patterns": _patterns(by_stage, stages),
    }


def _look(look: StageLook | None, node: str) -> dict[str, Any] | None:
    head = look.heads.get(node) if look else None
    if head is None:
        return None
    return {
        "attention": {place: _numbers(each) for place, each in head.attention.items()},
        "copy": _numbers(head.copy),
        "negative": _numbers(head.negative_copy),
    }


def _numbers(found: Estimate) -> list[float] | None:
    if found.value is None:
        return None
    return [round(number, 3) for number in (found.value, *(found.interval or ()))]


def _patterns(looks: dict[str, StageLook], stages: Sequence[Stage]) -> list[dict[str, list[str]] | None]:
    found: list[dict[str, list[str]] | None] = []
    left = MOST_BYTES
    for stage in stages:
        look = looks.get(stage.id)
        coded = None
        if look is not None:
            coded = {
                head: [_triangle(each, len(tokens)) for each, tokens in zip(pattern, look.tokens, strict=True)]
                for head, pattern in look.patterns.items()
            }
            left -= sum(len(text) for texts in coded.values() for text in texts)
        found.append(coded if left >= 0 else None)
    return found


def _triangle(pattern: np.ndarray, n: int) -> str:
    rows, columns = np.tril_indices(n)
    return base64.b64encode(np.rint(255 * pattern[rows, columns].clip(0, 1)).astype(np.uint8).tobytes()).decode()
