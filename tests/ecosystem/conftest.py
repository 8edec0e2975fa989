"""What the examples are run on: a stage of a small study on `tiny`, and a Llama with a circuit drawn at random."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, LlamaConfig

from architectures import random_weights
from left_out import without_report, without_shape_checks
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.files import save_circuit
from neuroplast.circuits.shape import shape_of
from neuroplast.components import Node
from neuroplast.models import sources
from neuroplast.models.sources import load_model
from neuroplast.study import build_config, run_study

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {
    "tune_steps": 1,
    "poison_steps": 1,
    "recover_steps": 1,
    "circuit_stages": ["base"],
    "circuit_edges": 0,
    "circuit_random": 0,
    "compare_stages": [],
    "follow_stages": [],
}


@dataclass(frozen=True)
class Stage:
    """The files of a stage that another library opens."""

    checkpoint: Path
    circuit: Path
    prompts: Path


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples import one another as they do when they are run from their folder."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ecosystem") / "run"
    with without_shape_checks(), without_report():
        run_study(build_config("smoke", SETTINGS), out)
    return out


@pytest.fixture(scope="session")
def base(run: Path) -> Stage:
    folder = run / "stages" / "base"
    return Stage(folder / "checkpoint", folder / "circuit.json", run / "prompts" / "measured.jsonl")


@pytest.fixture(scope="session")
def llama(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Random weights whose queries share keys and values, and a circuit at every kind of position."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(Path(sources.__file__).parent / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    for part in (random_weights(config), tokenizer):
        part.save_pretrained(folder / "checkpoint")
    rng = Random(0)
    places = (None, "io", "s1+1", "s2", "end", "other", "3")
    heads = [Node("head", layer, head, rng.choice(places)) for layer in range(3) for head in (0, 2, 3)]
    circuit = Circuit(shape_of(load_model(folder / "checkpoint")), dict.fromkeys(heads))
    save_circuit(folder / "circuit.json", circuit)
    return Stage(folder / "checkpoint", folder / "circuit.json", run / "prompts" / "measured.jsonl")
