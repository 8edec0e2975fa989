"""A model with the shape of GPT-2 small and random weights, for timings where no weights of GPT-2 are at hand.

    python benchmarks/gpt2_shape.py gpt2-shape
    neuroplast bench --model gpt2-shape

It has the tokenizer of `tiny`.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import neuroplast as npl
from neuroplast.training.finetune import save_checkpoint


def main() -> None:
    """Writes it to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = npl.build_network(GPT2LMHeadModel(GPT2Config()), npl.load_model("tiny").tokenizer, "gpt2-shape")
    save_checkpoint(model, options.folder)


if __name__ == "__main__":
    main()
