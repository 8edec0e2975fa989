"""Pairs of checkpoints of tiny models, and their weights cut into components as each family's own code cuts them."""

import torch

from architectures import random_model
from neuroplast.components import Component
from neuroplast.models.build import build_network
from neuroplast.models.network import Network

D_HEAD = {"gpt2": 8, "gpt_neox": 8, "llama": 16, "qwen3": 16, "gemma3": 16}


def changed(family: str, scale: float = 0.02, only=None) -> Network:
    """The same model with noise on its weights, or on some slices of one of them."""
    model = random_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            if only is None:
                parameter.add_(noise)
            elif name == only[0]:
                parameter[only[1]] += 10 * noise[only[1]]
    return build_network(model, None, family)


def slices(family: str, name: str, weight: torch.Tensor):
    """The components that a weight belongs to, with its part of each, as the family's own code cuts it."""
    width = D_HEAD[family]
    layer = (
        int(next(part for part in name.split(".") if part.isdigit())) if ".layers." in name or ".h." in name else None
    )
    if layer is None:
        kind = "norm" if "norm" in name or "ln_f" in name else "unembedding" if "lm_head" in name else "embedding"
        yield Component(kind), ...
    elif family == "gpt2" and "c_attn" in name:
        for index, channel in enumerate("qkv"):
            for head in range(4):
                yield Component(channel, layer, head), (..., slice(32 * index + 8 * head, 32 * index + 8 * head + 8))
    elif family == "gpt_neox" and "query_key_value" in name:
        for head in range(4):
            for index, channel in enumerate("qkv"):
                yield Component(channel, layer, head), (slice(24 * head + 8 * index, 24 * head + 8 * index + 8),)
    elif channel := next((letter for letter in "qkv" if f"{letter}_proj" in name), None):
        for head in range(len(weight) // width):
            yield Component(channel, layer, head), (slice(width * head, width * head + width),)
    elif any(part in name for part in ("o_proj", "attn.c_proj", "attention.dense.")):
        if weight.ndim == 1:
            yield Component("bias", layer), ...
        for head in range(4 if weight.ndim == 2 else 0):
            part = slice(width * head, width * head + width)
            yield Component("o", layer, head), (part,) if family == "gpt2" else (..., part)
    else:
        yield Component("mlp" if ".mlp." in name else "norm", layer), ...
