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

from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError
from neuroplast.report.documents import REMEDY, load_document
from neuroplast.report.measured import load_measured
from neuroplast.report.reading import read_estimate
from neuroplast.report.results import Estimate, Stage, numbers

HEADS, PATTERNS = "heads.json", "patterns.safetensors"
MOST_BYTES = 1_500_000
"""Most bytes of attention patterns on the page; fewer prompts are shown, and, of one, fewer stages."""


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
        positions = {
            place: tuple(at.integer() for at in each.elements()) for place, each in document["positions"].items()
        }
        lengths = [len(row) for row in tokens]
        if any(len(at) != len(lengths) or not all(map(_is_inside, at, lengths)) for at in positions.values()):
            raise InputError(f"{document['positions'].where}: expected a token of each shown prompt; {REMEDY}")
        heads = {_head(name, key, stage): each for key, each in document["heads"].items()}
        width = max(lengths, default=0)
        shapes = dict.fromkeys((str(node.at(None)) for node in heads), (len(tokens), width, width))
        patterns = load_measured(run / f"stages/{stage.id}/{PATTERNS}", shapes)
        found.append(
            StageLook(
                stage=stage.id,
                tokens=tokens,
                positions=positions,
                heads={
                    str(node): HeadLook(
                        {place: read_estimate(value) for place, value in each["attention"].items()},
                        read_estimate(each["copy"]),
                        read_estimate(each["negative_copy"]),
                    )
                    for node, each in heads.items()
                },
                patterns=dict(zip(shapes, patterns, strict=True)),
            )
        )
    return tuple(found)


def _is_inside(at: int, length: int) -> bool:
    return 0 <= at < length


def _head(where: str, name: str, stage: Stage) -> Node:
    """The head that a key names.

    Raises:
        InputError: when it is none of the model's.
    """
    try:
        node = parse_node(name)
    except InputError as error:
        raise InputError(f"{where}: {error}; {REMEDY}") from error
    layers, heads = len(stage.effects.mean), len(stage.effects.mean[0])
    if node.kind != "head" or not (_is_inside(node.layer or 0, layers) and _is_inside(node.head or 0, heads)):
        raise InputError(f"{where}: expected a head of {layers} layers x {heads} heads, got {name!r}; {REMEDY}")
    return node


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
        node = parse_node(part)
        layer, head = node.layer or 0, node.head or 0
        effects[part] = [
            [round(each[layer][head], 4) for each in (s.effects.mean, s.effects.low, s.effects.high)] for s in stages
        ]
    first = looks[0] if looks else None
    # Fewer prompts before fewer stages: what is to be seen is the difference between stages.
    n_shown = len(first.tokens) if first else 0
    while n_shown > 1 and sum(_bytes(look, n_shown) for look in looks) > MOST_BYTES:
        n_shown -= 1
    return {
        "stages": [{"id": stage.id, "kind": stage.kind} for stage in stages],
        "tokens": first.tokens[:n_shown] if first else [],
        "positions": first.positions if first else {},
        "effects": effects,
        "looks": {node: [_look(by_stage.get(stage.id), node) for stage in stages] for node in places},
        "patterns": _patterns(by_stage, stages, n_shown),
    }


def _look(look: StageLook | None, node: str) -> dict[str, Any] | None:
    head = look.heads.get(node) if look else None
    if head is None:
        return None
    return {
        "attention": {place: numbers(each) for place, each in head.attention.items()},
        "copy": numbers(head.copy),
        "negative": numbers(head.negative_copy),
    }


def _patterns(looks: dict[str, StageLook], stages: Sequence[Stage], n_shown: int) -> list[dict[str, list[str]] | None]:
    """By stage and head, the patterns on the first prompts; None of a stage that there is no room for."""
    found: list[dict[str, list[str]] | None] = []
    left = MOST_BYTES
    for stage in stages:
        look = looks.get(stage.id)
        left -= _bytes(look, n_shown) if look else 0
        if look is None or left < 0:
            found.append(None)
            continue
        lengths = [len(tokens) for tokens in look.tokens[:n_shown]]
        found.append(
            {
                head: [_triangle(pattern[row], length) for row, length in enumerate(lengths)]
                for head, pattern in look.patterns.items()
            }
        )
    return found


def _bytes(look: StageLook, n_shown: int) -> int:
    """Bytes that the patterns of a stage take, as text."""
    return len(look.patterns) * sum(len(tokens) * (len(tokens) + 1) * 2 // 3 for tokens in look.tokens[:n_shown])


def _triangle(pattern: np.ndarray, n: int) -> str:
    rows, columns = np.tril_indices(n)
    return base64.b64encode(np.rint(255 * pattern[rows, columns].clip(0, 1)).astype(np.uint8).tobytes()).decode()
