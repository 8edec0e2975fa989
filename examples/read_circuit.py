"""Reads a circuit and its prompts without neuroplast: both are plain JSON.

    python examples/read_circuit.py runs/demo/stages/base/circuit.json

`nodes` and `edges` of the file are those of EAP-IG and MIB: which parts of the model belong to the circuit. The block
`neuroplast` says more: at which positions they stand (`a3.h4@end`), and what each head does.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def read_circuit(path: Path) -> tuple[list[str], list[str], list[str], dict[str, str]]:
    """The parts and the edges in the graph, the parts at their positions, and the roles of heads, by name."""
    document = json.loads(path.read_text(encoding="utf-8"))
    parts = [name for name, entry in document["nodes"].items() if entry["in_graph"]]
    edges = [name for name, entry in document["edges"].items() if entry["in_graph"]]
    placed = list(document["neuroplast"]["nodes"])
    roles = {name: role["name"] for name, role in document["neuroplast"]["roles"].items()}
    return parts, edges, placed, roles


@dataclass(frozen=True)
class Prompt:
    """One prompt with its counterfactual, as token ids."""

    clean: list[int]
    counterfactual: list[int]
    answers: list[int]
    foils: list[int]
    positions: dict[str, int]
    """Index of each named position; `end` is the last."""

    def places(self, position: str | None) -> list[int]:
        """The indices that a position means: a name, `other` for all without one, None for all."""
        everywhere = list(range(len(self.clean)))
        if position is None:
            return everywhere
        if position == "other":
            return [index for index in everywhere if index not in self.positions.values()]
        return [self.positions[position] if position in self.positions else int(position)]


def read_prompts(path: Path, tokenizer: Any) -> list[Prompt]:
    """Reads the prompts of a run, `prompts/measured.jsonl`, for a fast Hugging Face tokenizer."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def continuations(texts: list[str]) -> list[int]:
        return [tokenizer.encode(f"to{text}", add_special_tokens=False)[-1] for text in texts]

    prompts: list[Prompt] = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        clean, other = (tokenizer(row[text], add_special_tokens=False) for text in ("clean", "counterfactual"))
        marks = {name: len(first) + clean.char_to_token(letter) for name, letter in row["marks"].items()}
        answers = continuations([row["answer"], *row.get("more_answers", [])])
        foils = continuations([row["foil"], *row.get("more_foils", [])])
        ids = first + clean["input_ids"]
        marks["end"] = len(ids) - 1
        prompts.append(Prompt(ids, first + other["input_ids"], answers, foils, marks))
    return prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what a circuit has."""
    parser = argparse.ArgumentParser(description="Reads a circuit of neuroplast without neuroplast.")
    parser.add_argument("circuit", type=Path, help="circuit.json of a stage")
    parts, edges, placed, roles = read_circuit(parser.parse_args(argv).circuit)
    print(f"{len(parts)} parts, {len(edges)} edges: {', '.join(parts)}")
    print("\n".join(f"{name:<14} {roles.get(name, '–')}" for name in placed))


if __name__ == "__main__":
    main()
