"""Heads → logits path patching: measured ÷ arithmetic floor, and ÷ a TransformerLens hook loop.

    python benchmarks/path_patching.py --model smollm2-135m --prompts 64

The floor is the time that the matrix products which the result needs would take at this machine's own
matrix-product rate, measured before and after in the same run. What is counted:

- the clean and the counterfactual run: every linear map at every token, the unembedding at END only;
- replay: for each layer, (heads of this and all earlier layers) × prompts rows through the layer's linear maps
  outside attention, plus each sender's own output projection;
- the read-out of two logits a row.

The peer is the loop that people write today: for each head one forward pass with hooks that freeze every head
(TransformerLens, `pip install 'neuroplast[peers]'`); a sample of heads is timed and scaled to all.
The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import neuroplast as npl
from neuroplast.interventions.path_patching import difference
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear maps under a module: half the operations a row costs."""
    return sum(
        part.weight.numel()
        for part in module.modules()
        if isinstance(getattr(part, "weight", None), torch.Tensor)
        and part.weight.ndim == 2
        and not isinstance(part, nn.Embedding)
    )


def needed_operations(model: Network, prompts: PromptSet) -> float:
    """Multiplications and additions of the matrix products that the result needs."""
    layers, attentions = model.layers, model.attentions
    unembedding = linear_weights(model.module.get_output_embeddings())
    whole = sum(map(linear_weights, layers))
    tokens = int((prompts.positions["end"] + 1).sum())
    runs = 2 * 2 * (tokens * whole + len(prompts) * unembedding)
    replay = 0
    for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        rows = (index + 1) * model.n_heads * len(prompts)
        replay += 2 * rows * (linear_weights(layer) - linear_weights(attention))
    rows = model.n_layers * model.n_heads * len(prompts)
    return runs + replay + 2 * rows * model.d_model * (model.d_head + 2)


def matrix_rate(model: Network) -> float:
    """Operations a second of this machine's matrix products, at the widest linear map of the model's layers."""
    shapes = [
        part.weight.shape
        for part in model.layers[0].modules()
        if isinstance(getattr(part, "weight", None), torch.Tensor) and part.weight.ndim == 2
    ]
    inner, outer = max(shapes, key=lambda shape: shape.numel())
    a, b = torch.randn(4096, inner), torch.randn(inner, outer)
    _ = a @ b
    times: list[float] = []
    for _ in range(15):
        started = time.perf_counter()
        for _ in range(4):
            _ = a @ b
        times.append((time.perf_counter() - started) / 4)
    return 2 * 4096 * inner * outer / statistics.median(times)


def peer_seconds_a_head(
    model: Network, prompts: PromptSet, heads: list[tuple[int, int]]
) -> tuple[float, torch.Tensor] | None:
    """Seconds a head of the hook loop, and the mean effects it finds; None where the peer is not installed."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    peer: Any = TransformerBridge.boot_transformers(model.name, hf_model=model.module, tokenizer=model.tokenizer)
    wanted = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    end = prompts.positions["end"]
    rows = torch.arange(len(prompts))
    choices = torch.stack([prompts.answer, prompts.foil], dim=1)

    def hooks(act: Callable[[int, torch.Tensor], torch.Tensor | None]) -> list[tuple[str, Any]]:
        return [(name, lambda z, hook, layer=layer: act(layer, z)) for layer, name in enumerate(wanted)]

    def z_of(tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        kept: dict[int, torch.Tensor] = {}
        peer.run_with_hooks(tokens, fwd_hooks=hooks(lambda layer, z: kept.update({layer: z.clone()})))
        return kept

    with torch.no_grad():
        clean, other = z_of(prompts.clean), z_of(prompts.counterfactual)
        before = difference(peer(prompts.clean)[rows, end], choices)
        effects: list[torch.Tensor] = []
        started = time.perf_counter()
        for sender, head in heads:

            def freeze(layer: int, _: torch.Tensor, sender: int = sender, head: int = head) -> torch.Tensor:
                if layer != sender:
                    return clean[layer]
                frozen = clean[layer].clone()
                part = slice(head * model.d_head, (head + 1) * model.d_head)
                frozen.flatten(2)[rows, end, part] = other[layer].flatten(2)[rows, end, part]
                return frozen

            logits = peer.run_with_hooks(prompts.clean, fwd_hooks=hooks(freeze))
            effects.append((difference(logits[rows, end], choices) - before).mean())
    return (time.perf_counter() - started) / len(heads), torch.stack(effects)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-heads", type=int, default=4)
    options = parser.parse_args()

    model = npl.load_model(options.model, say=lambda line: print(line, file=sys.stderr))
    prompts = npl.tasks.ioi.prompts(model, n=options.prompts, seed=0)
    npl.path_patch(model, prompts[:4])
    rates = [matrix_rate(model)]
    times: list[float] = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        found = npl.path_patch(model, prompts)
        times.append(time.perf_counter() - started)
        rates.append(matrix_rate(model))
    rate, seconds = statistics.median(rates), statistics.median(times)
    floor = needed_operations(model, prompts) / rate
    n_heads = model.n_layers * model.n_heads
    print(f"{model.name}: {len(prompts)} prompts, {n_heads} heads, {torch.get_num_threads()} threads")
    print(f"matrix products  {rate / 1e9:8.1f} GFLOP/s   ({min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f})")
    print(f"floor            {floor:8.2f} s")
    print(f"measured         {seconds:8.2f} s   ({min(times):.2f} to {max(times):.2f})")
    print(f"measured ÷ floor {seconds / floor:8.2f}")

    strongest = found.effects.mean(dim=2).abs().flatten().topk(options.peer_heads).indices
    heads = [divmod(int(index), model.n_heads) for index in strongest]
    peer = peer_seconds_a_head(model, prompts, heads)
    speedup = error = None
    if peer is None:
        print("peer             not installed: pip install 'neuroplast[peers]'")
    else:
        each, effects = peer
        ours = torch.stack([found.effects[layer, head].mean() for layer, head in heads])
        speedup, error = each * n_heads / seconds, float((ours - effects).abs().max())
        print(f"peer, scaled     {each * n_heads:8.1f} s   ({each:.2f} s a head, {len(heads)} heads timed)")
        print(f"peer ÷ measured  {speedup:8.1f}   largest difference of mean effects {error:.1e}")
    print(json.dumps({"over_floor": seconds / floor, "speedup_over_peer": speedup, "max_abs_error": error}))


if __name__ == "__main__":
    main()
