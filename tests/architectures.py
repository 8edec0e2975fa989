"""Tiny random models of the architectures that must agree, and where an oracle finds their parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from neuroplast.components import Node

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
    """A family's tiny model, and where a test's oracle finds its parts."""

    config: Callable[[], object]
    """Builds the configuration."""
    layers: str
    """Name of the list of layers."""
    parts: Mapping[str, str]
    """Names inside a layer: attention, projection, mlp, and the norms that heads and MLP read through."""
    final_norm: str
    """Name of the norm before the unembedding."""

    def part(self, name: str, layer: int) -> str:
        """The name of a part of a layer; `layer` is the layer itself."""
        return f"{self.layers}.{layer}" + ("" if name == "layer" else f".{self.parts[name]}")

    def norm_before(self, receiver: Node) -> str:
        """The name of the norm that a receiver reads through."""
        if receiver.kind == "logits":
            return self.final_norm
        return self.part("mlp_norm" if receiver.kind == "mlp" else "attention_norm", receiver.layer or 0)


LLAMA = {
    "attention": "self_attn",
    "projection": "self_attn.o_proj",
    "mlp": "mlp",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
ARCHITECTURES = {
    "gpt2": Architecture(
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
        ),
        "transformer.h",
        {
            "attention": "attn",
            "projection": "attn.c_proj",
            "mlp": "mlp",
            "attention_norm": "ln_1",
            "mlp_norm": "ln_2",
        },
        "transformer.ln_f",
    ),
    "gpt_neox": Architecture(
        lambda: GPTNeoXConfig(**SHAPE),
        "gpt_neox.layers",
        {**LLAMA, "attention": "attention", "projection": "attention.dense"},
        "gpt_neox.final_layer_norm",
    ),
    "llama": Architecture(lambda: LlamaConfig(**SHAPE, **GROUPED), "model.layers", LLAMA, "model.norm"),
    "qwen3": Architecture(lambda: Qwen3Config(**SHAPE, **GROUPED), "model.layers", LLAMA, "model.norm"),
    "gemma3": Architecture(
        lambda: Gemma3TextConfig(**SHAPE, **GROUPED, sliding_window=4),
        "model.layers",
        {**LLAMA, "mlp_norm": "pre_feedforward_layernorm"},
        "model.norm",
    ),
}


def random_model(family: str) -> PreTrainedModel:
    """A tiny model with random weights, large enough that every head matters."""
    return random_weights(ARCHITECTURES[family].config())


def random_weights(config: object) -> PreTrainedModel:
    """The same for any configuration."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model
