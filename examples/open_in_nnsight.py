"""Opens a stage in nnsight, and patches one head there.

    pip install nnsight
    python examples/open_in_nnsight.py runs/demo/stages/base/checkpoint runs/demo/prompts/measured.jsonl --head a3.h4

At END the head gives what it gives on the prompt's counterfactual, and everything after it recomputes: what
`neuroplast patch --method activation --from 'heads@end'` does, for one head. Nothing here needs neuroplast.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from nnsight import Envoy, TransformersModel

from read_circuit import Prompt, read_prompts


def output_projection(model: TransformersModel, layer: int) -> Envoy:
    """The linear map that reads the outputs of a layer's heads, side by side: of GPT-2, or of Llama and its kind."""
    if hasattr(model, "transformer"):
        return model.transformer.h[layer].attn.c_proj
    return model.model.layers[layer].self_attn.o_proj


def logit_difference(logits: torch.Tensor, prompt: Prompt) -> float:
    """How much more the model is for the answer than for the foil; of several, the log odds."""
    last = logits[0, -1]
    return float(last[prompt.answers].logsumexp(0) - last[prompt.foils].logsumexp(0))


@torch.no_grad()
def patch_head(model: TransformersModel, prompt: Prompt, layer: int, head: int) -> float:
    """What the logit difference changes by."""
    clean, counterfactual = torch.tensor([prompt.clean]), torch.tensor([prompt.counterfactual])
    projection = output_projection(model, layer)
    with model.trace(counterfactual):
        other = projection.input.save()
    width = other.shape[-1] // model.config.num_attention_heads
    mine = slice(head * width, (head + 1) * width)
    with model.trace(clean):
        before = model.output.logits.save()
    with model.trace(clean):
        projection.input[:, -1, mine] = other[:, -1, mine]
        after = model.output.logits.save()
    return logit_difference(after, prompt) - logit_difference(before, prompt)


def measure(checkpoint: Path, prompts: Path, name: str) -> list[float]:
    """What a head named such as `a3.h4` changes the logit difference by, prompt by prompt."""
    match = re.fullmatch(r"a(\d+)\.h(\d+)", name)
    if match is None:
        raise SystemExit(f"{name!r} is no head: expected a name such as a3.h4")
    model = TransformersModel(str(checkpoint), task="text-generation", dispatch=True)
    return [patch_head(model, row, int(match[1]), int(match[2])) for row in read_prompts(prompts, model.tokenizer)]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the mean."""
    parser = argparse.ArgumentParser(description="Opens a stage in nnsight and patches one head.")
    parser.add_argument("checkpoint", type=Path, help="folder of a stage's model")
    parser.add_argument("prompts", type=Path, help="prompts/measured.jsonl of the run")
    parser.add_argument("--head", required=True, help="its layer and number from 0, such as a3.h4")
    arguments = parser.parse_args(argv)
    changes = measure(arguments.checkpoint, arguments.prompts, arguments.head)
    print(f"{arguments.head} at END: {sum(changes) / len(changes):+.4f} logits when patched, {len(changes)} prompts")


if __name__ == "__main__":
    main()
