"""Opens a stage and its circuit in TransformerLens, and measures the circuit there.

    pip install transformer-lens
    python examples/open_in_transformer_lens.py runs/demo/stages/base/checkpoint runs/demo/stages/base/circuit.json \
        runs/demo/prompts/measured.jsonl

Every head that does not belong to the circuit gives what it gives on the prompt's counterfactual; a head that does is
left alone at its own positions only. MLPs stay. The logit difference that is left is `by_ablation.counterfactual` in
the stage's `criteria.json`. Nothing here needs neuroplast.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge

from read_circuit import Prompt, read_circuit, read_prompts

Kept = list[tuple[int, int, str | None]]
"""Layer, head and position of each head of a circuit; the position is None where it stands at all."""


def parse_heads(names: Sequence[str]) -> Kept:
    """Layers, heads and positions of names such as `a3.h4@end`; what is no head is passed over."""
    found = (re.fullmatch(r"a(\d+)\.h(\d+)(?:@(.+))?", name) for name in names)
    return [(int(match[1]), int(match[2]), match[3]) for match in found if match]


def logit_difference(logits: torch.Tensor, prompt: Prompt) -> float:
    """How much more the model is for the answer than for the foil; of several, the log odds."""
    last = logits[0, -1]
    return float(last[prompt.answers].logsumexp(0) - last[prompt.foils].logsumexp(0))


@torch.no_grad()
def run_circuit(bridge: TransformerBridge, prompt: Prompt, kept: Kept) -> float:
    """The logit difference with every head outside the circuit knocked out."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
    _, other = bridge.run_with_cache(torch.tensor([prompt.counterfactual]), names_filter=names)

    def knock_out(z: torch.Tensor, hook: object, layer: int) -> torch.Tensor:
        replaced = other[names[layer]].clone()
        for _, head, position in (each for each in kept if each[0] == layer):
            at = prompt.places(position)
            replaced[0, at, head] = z[0, at, head]
        return replaced

    hooks = [(name, partial(knock_out, layer=layer)) for layer, name in enumerate(names)]
    return logit_difference(bridge.run_with_hooks(torch.tensor([prompt.clean]), fwd_hooks=hooks), prompt)


def measure(checkpoint: Path, circuit: Path, prompts: Path) -> tuple[float, float]:
    """The mean logit difference of the whole model, and of its circuit alone."""
    bridge = TransformerBridge.boot_transformers(str(checkpoint), device="cpu")
    rows, kept = read_prompts(prompts, bridge.tokenizer), parse_heads(read_circuit(circuit)[2])
    with torch.no_grad():
        whole = [logit_difference(bridge(torch.tensor([row.clean])), row) for row in rows]
    alone = [run_circuit(bridge, row, kept) for row in rows]
    return sum(whole) / len(rows), sum(alone) / len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the two."""
    parser = argparse.ArgumentParser(description="Opens a stage and its circuit in TransformerLens.")
    parser.add_argument("checkpoint", type=Path, help="folder of a stage's model")
    parser.add_argument("circuit", type=Path, help="circuit.json of the stage")
    parser.add_argument("prompts", type=Path, help="prompts/measured.jsonl of the run")
    arguments = parser.parse_args(argv)
    whole, alone = measure(arguments.checkpoint, arguments.circuit, arguments.prompts)
    print(f"logit difference: the model {whole:.4f}, its circuit alone {alone:.4f}")


if __name__ == "__main__":
    main()
