"""What single heads do at a stage: which are looked at, and that the numbers are those of the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neuroplast.circuits.circuit import Circuit, Shape
from neuroplast.circuits.copying import copy_shares
from neuroplast.components import parse_node
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.statistics import bootstrap_weights
from neuroplast.study.heads import MOST_DIRECT, choose_heads, run_look
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import PromptSet

HEADS = tuple(map(parse_node, ("a0.h5@s2", "a3.h4@end", "a3.h4@io")))


@pytest.fixture(scope="module")
def model() -> Network:
    return load_model("tiny")


@pytest.fixture(scope="module")
def prompts(model: Network) -> PromptSet:
    return ioi.prompts(model, n=6, seed=3)


@pytest.fixture(scope="module")
def folder(model: Network, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    run_look(model, prompts, HEADS, 2, bootstrap_weights(len(prompts), 0, 200), folder)
    return folder


def test_the_heads_of_the_circuits_and_the_strongest_are_looked_at_in_the_order_of_the_pass() -> None:
    effects = np.zeros((30, 9, 4))
    effects[23, 3], effects[1, 0] = -2.0, 1.0
    nodes = {parse_node("a5.h1@s2"): -0.5, parse_node("a23.h3@end"): -2.0, parse_node("m7"): 0.1}
    found = choose_heads([None, Circuit(Shape("x", 30, 9, 576), nodes, {})], effects)
    names = list(map(str, found))
    assert {"a5.h1@s2", "a23.h3@end", "a1.h0@end"} <= set(names) and "m7" not in names
    assert len(names) == MOST_DIRECT + 1, "a23.h3@end is in the circuit and among the strongest"
    layers = [node.layer for node in found]
    assert layers == sorted(layers)


def test_attention_is_the_mean_over_prompts_of_that_of_the_eager_model(prompts: PromptSet, folder: Path) -> None:
    document = json.loads((folder / "heads.json").read_text())
    plain = load_model("tiny").module
    plain.set_attn_implementation("eager")
    for node in HEADS:
        seen = []
        for row in range(len(prompts)):
            places = {name: int(at[row]) for name, at in prompts.positions.items()}
            with torch.no_grad():
                tokens = prompts.clean[row : row + 1, : places["end"] + 1]
                pattern = plain(tokens, output_attentions=True).attentions[node.layer][0, node.head]
            here, there = places[node.position], places["s1"]
            seen.append(float(pattern[here, there]) if here >= there else np.nan)
        found = document["heads"][str(node)]["attention"]["s1"]
        assert found["value"] == pytest.approx(np.nanmean(seen), abs=1e-5)
        assert found["ci95"][0] <= found["value"] <= found["ci95"][1]


def test_copying_is_that_of_the_copy_score(model: Network, prompts: PromptSet, folder: Path) -> None:
    document = json.loads((folder / "heads.json").read_text())
    shares = copy_shares(model, prompts, HEADS).nanmean(dim=2)
    for number, node in enumerate(HEADS):
        head = document["heads"][str(node)]
        assert [head["copy"]["value"], head["negative_copy"]["value"]] == pytest.approx(shares[:, number].tolist())


def test_tokens_and_patterns_are_those_of_the_first_prompts(prompts: PromptSet, folder: Path) -> None:
    document = json.loads((folder / "heads.json").read_text())
    patterns = load_file(folder / "patterns.safetensors")
    assert set(patterns) == {"a0.h5", "a3.h4"} and len(document["tokens"]) == 2
    for row, tokens in enumerate(document["tokens"]):
        assert "".join(tokens).endswith(prompts.records[row].clean)
        assert tokens[document["positions"]["io"][row]] == prompts.records[row].answer
        sums = patterns["a3.h4"][row].float().sum(dim=1)
        assert sums[: len(tokens)].tolist() == pytest.approx([1] * len(tokens), abs=2e-3)
