"""Shared by all tests: shape checks at run time, and tiny random models of the architectures that must agree."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import install_import_hook
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

# Tiny matrices gain nothing from a second thread, and subprocesses of the tests must round as this one does.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The hook must stand before the first import of what it checks.
SHAPE_CHECKED = ("behaviour", "interventions", "models", "plasticity", "statistics", "training.data")
install_import_hook([f"neuroplast.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

from neuroplast.models.network import Network, build_network  # noqa: E402
from neuroplast.tasks.prompts import PromptSet  # noqa: E402

VOCABULARY = 60
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Architecture:
    """A family's tiny model, and where a test's oracle finds its output projections."""

    config: Callable[[], object]
    """Builds the configuration."""
    projection: str
    """Name of a layer's output projection, with a place for the layer's index."""


ARCHITECTURES = {
    "gpt2": Architecture(
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
        ),
        "transformer.h.{}.attn.c_proj",
    ),
    "gpt_neox": Architecture(lambda: GPTNeoXConfig(**SHAPE), "gpt_neox.layers.{}.attention.dense"),
    "llama": Architecture(lambda: LlamaConfig(**SHAPE, **GROUPED), "model.layers.{}.self_attn.o_proj"),
    "qwen3": Architecture(lambda: Qwen3Config(**SHAPE, **GROUPED), "model.layers.{}.self_attn.o_proj"),
    "gemma3": Architecture(
        lambda: Gemma3TextConfig(**SHAPE, **GROUPED, sliding_window=4), "model.layers.{}.self_attn.o_proj"
    ),
}


def random_model(family: str) -> PreTrainedModel:
    """A tiny model with random weights, large enough that every head matters."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[family].config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(params=sorted(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def network(family: str) -> Network:
    """A tiny instrumented model of each architecture in turn."""
    return build_network(random_model(family), None, family)


@pytest.fixture
def token_prompts() -> PromptSet:
    """Five random prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(3)
    width, lengths = 11, torch.tensor([11, 7, 9, 11, 8])
    clean, other = torch.randint(1, VOCABULARY, (2, 5, width), generator=generator)
    choices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:2] for _ in range(5)])
    return PromptSet("random", (), clean, other, choices[:, 0], choices[:, 1], {"end": lengths - 1})


@pytest.fixture
def projection_name(family: str) -> str:
    """Where the oracle finds the output projections."""
    return ARCHITECTURES[family].projection
