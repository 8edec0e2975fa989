"""LoRA adapters with random numbers, as `peft` writes them."""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter of a base with random numbers everywhere, B included."""
    module = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, some of them once a process
        model = get_peft_model(module, LoraConfig(r=3, lora_alpha=7, **options))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    change_config(folder, base_model_name_or_path=str(base))
    return folder


def change_config(folder: Path, **options) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
