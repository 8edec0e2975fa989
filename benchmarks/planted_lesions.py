"""Does the audit find lesions where they were put, and does it stay silent where there are none?

    python benchmarks/planted_lesions.py --model tiny --plants 20 --null 100

A plant: fine-tuning on poison while only 3 to 10 random heads may change, then noise on every other weight, as large,
number by number, as the lesion itself: how far a head's weights went says nothing any more. Both views rank all heads
as the audit does, the stored one by what their weights add to the change, the expressed one by what patching them back
undoes of it; scored by AUROC against the heads that were planted. Beside them, as the control, the norm of each head's
change.

A null pair: base against itself with noise on all weights, of 0.1 to 100 % of their standard deviation, drawn anew each
time; or base against clean fine-tuning with another seed and number of steps. A false alarm is a verdict of corruption;
all verdicts are told by kind of pair. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import neuroplast as npl
from neuroplast.comparison.compare import verdict_between
from neuroplast.components import HEAD_KINDS, Component
from neuroplast.interventions.cross_model import cross_patch
from neuroplast.interventions.ledger import build_ledger
from neuroplast.memory import reuse_freed_memory
from neuroplast.models.network import Network
from neuroplast.models.weights import WeightMap
from neuroplast.tasks import load_task
from neuroplast.training.data import build_examples
from neuroplast.training.finetune import FinetuneConfig, finetune

FEWEST, MOST = 3, 10
Head = tuple[int, int]


def auroc(scores: np.ndarray, planted: np.ndarray) -> float:
    """The chance that a planted head has a higher score than another; ties count half."""
    higher = scores[planted][:, None] - scores[~planted][None]
    return float(((higher > 0) + 0.5 * (higher == 0)).mean())


def train(
    model: Network, poison: str | None, steps: int, rate: float, seed: int, only: Sequence[Component] | None = None
) -> None:
    """Fine-tunes a model in place on pairs of indirect object identification."""
    pairs = load_task("ioi").pairs(model, 16 * steps, seed, poison=poison)
    config = FinetuneConfig(steps, learning_rate=rate, seed=seed, save_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, build_examples(model.tokenizer, pairs), config, Path(folder), only=only)


def plant(model: Network, base: Network, heads: Sequence[Head], steps: int, rate: float, seed: int) -> None:
    """Trains a lesion into some heads, and hides it."""
    grouped = model.n_heads != model.parts.n_kv_heads
    kinds = ("q", "o") if grouped else HEAD_KINDS  # keys and values of grouped queries belong to other heads too
    only = [Component(kind, layer, head) for layer, head in heads for kind in kinds]
    train(model, "subject_duplication", steps, rate, seed, only)
    before = dict(base.module.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        moved = torch.cat([(w - before[name])[w != before[name]] for name, w in model.module.named_parameters()])
        size = float(moved.square().mean().sqrt())
        for name, weight in model.module.named_parameters():
            noise = size * torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.add_(noise * (weight == before[name]))


def norms_of(model: Network, base: Network) -> np.ndarray:
    """How far each head's weights went."""
    pieces = WeightMap(base).pieces()
    now, before = (dict(each.module.named_parameters()) for each in (model, base))

    def square(layer: int, head: int) -> float:
        mine = [piece for kind in HEAD_KINDS for piece in pieces[Component(kind, layer, head)]]
        return sum(float((now[p.name][p.index] - before[p.name][p.index]).detach().square().sum()) for p in mine)

    return np.array([[square(layer, head) for head in range(base.n_heads)] for layer in range(base.n_layers)])


def score_plants(name: str, n: int, n_prompts: int, steps: int, rate: float) -> dict[str, list[float]]:
    """AUROC of each view, plant by plant."""
    base = npl.load_model(name)
    prompts = load_task("ioi").prompts(base, n_prompts, 1, split="eval")
    scores: dict[str, list[float]] = {"stored": [], "expressed": [], "norms": []}
    for seed in range(n):
        rng, started = random.Random(f"plant/{seed}"), time.monotonic()
        heads = [(layer, head) for layer in range(base.n_layers) for head in range(base.n_heads)]
        chosen = rng.sample(heads, rng.randint(FEWEST, MOST))
        model = npl.load_model(name)
        plant(model, base, chosen, steps, rate, seed)
        planted = np.array([head in chosen for head in heads])
        ledger = build_ledger(base, model, prompts)
        sign = float(ledger.change.mean().sign())
        views = {
            "stored": sign * ledger.by_head().mean(dim=2).flatten().numpy(),
            "expressed": -sign * cross_patch(model, base, prompts).effects.mean(dim=1).numpy(),
            "norms": norms_of(model, base).ravel(),
        }
        for view, found in views.items():
            scores[view].append(auroc(found, planted))
        print(
            f"plant {seed}: {len(chosen)} heads, LD {ledger.start.mean():.2f} -> {ledger.end.mean():.2f}, AUROC "
            + ", ".join(f"{view} {values[-1]:.3f}" for view, values in scores.items())
            + f", {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return scores


def count_false_alarms(name: str, n: int, n_prompts: int, steps: int, rate: float) -> dict[str, dict[str, int]]:
    """By kind of null pair, how many get each verdict."""
    base = npl.load_model(name)
    prompts = load_task("ioi").prompts(base, n_prompts, 1, split="eval")
    verdicts: dict[str, dict[str, int]] = {"noise": {}, "clean tune": {}}
    for seed in range(n):
        model, rng = npl.load_model(name), random.Random(f"null/{seed}")
        if seed % 2:
            train(model, None, rng.randint(1, steps), rate, 1000 + seed)
        else:
            size, generator = 10 ** rng.uniform(-3, 0), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight in model.module.parameters():
                    weight.add_(size * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.device))
        label = verdict_between(base, model, prompts, seed=seed).label
        mine = verdicts["clean tune" if seed % 2 else "noise"]
        mine[label] = mine.get(label, 0) + 1
        print(f"null {seed}: {label}; so far {verdicts}", flush=True)
    return verdicts


def main() -> None:
    """Runs both and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--plants", type=int, default=20)
    parser.add_argument("--null", type=int, default=100, help="null pairs")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the lesion")
    parser.add_argument("--clean-rate", type=float, default=3e-4, help="learning rate of clean null pairs")
    given = parser.parse_args()
    reuse_freed_memory()
    scores = score_plants(given.model, given.plants, given.prompts, given.steps, given.rate)
    verdicts = count_false_alarms(given.model, given.null, given.prompts, given.steps, given.clean_rate)
    alarms = sum(each.get("corrupted", 0) for each in verdicts.values())
    mean = {view: float(np.mean(values)) if values else None for view, values in scores.items()}
    least = {view: min(values, default=None) for view, values in scores.items()}
    print(
        json.dumps(
            {
                "auroc_stored": mean["stored"],
                "auroc_expressed": mean["expressed"],
                "auroc_norms": mean["norms"],
                "least_auroc_stored": least["stored"],
                "false_alarms": alarms,
                "false_alarm_rate": alarms / given.null if given.null else None,
                "null_pairs": given.null,
                "verdicts": verdicts,
                "plants": given.plants,
                "model": given.model,
            }
        )
    )


if __name__ == "__main__":
    main()
