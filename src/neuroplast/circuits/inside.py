"""How much of a model's logit difference a circuit gives that was found in another model, beside random circuits."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.circuits.random_circuits import matched_random
from neuroplast.circuits.shares import faithfulness, foil_faithfulness, share_of
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.network import Network
from neuroplast.observer import about
from neuroplast.statistics import Weights
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet


def inside_document(
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    reference: PromptSet,
    weights: Weights,
    *,
    n_random: int,
    seed: int,
    parts: Parts | None = None,
    name: str = "inside",
    progress: Callable[[str, int, int], None] | None = None,
    memory: str | int | None = None,
) -> dict[str, Any]:
    """F(C) ÷ F(M) of a circuit in a model, every other head giving its mean over other prompts.

    Args:
        model: the model.
        circuit: has heads of a model with the same parts.
        prompts: measured.
        reference: that the means are taken over.
        weights: from `bootstrap_weights`.
        n_random: matched random circuits.
        seed: seed of their draw.
        parts: keeps what is measured; by default nothing is kept.
        name: under which it is kept, and told.
        progress: called with (what is done, steps done, steps in all).
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Returns:
        `faithfulness`, `foil_faithfulness` (of the preference for the foil, of a model that has it) and `random`.
    """

    def measure() -> dict[str, Tensor]:
        ablation = build_ablation(model, prompts, reference=reference, memory=memory)
        sets = [circuit.heads, *matched_random(circuit, n_random, seed)]
        told = None if progress is None else about(progress, name)
        only = run_knockouts(model, prompts, sets, ablation, keep=True, memory=memory, progress=told)
        whole = run_knockouts(model, prompts, [()], ablation, memory=memory)[0]
        return {"circuit": only[0], "random": only[1:], "model": whole}

    kept = {key: values.double().numpy() for key, values in (parts or Parts()).made(name, measure).items()}
    inside, whole = kept["circuit"], kept["model"]
    shares = [share_of(each, whole, weights).value for each in kept["random"]]
    known = [share for share in shares if share is not None]
    return {
        "faithfulness": estimate_document(faithfulness(inside, whole, weights)),
        "foil_faithfulness": estimate_document(foil_faithfulness(inside, whole, weights)),
        "random": {"n": len(known)} | ({"mean": float(np.mean(known)), "max": max(known)} if known else {}),
    }
