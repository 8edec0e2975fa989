"""How much of a model's logit difference a circuit gives that was found in another model."""

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.shares import faithfulness
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.network import Network
from neuroplast.statistics import Estimate, Weights
from neuroplast.tasks.prompts import PromptSet


def faithfulness_inside(
    model: Network, circuit: Circuit, prompts: PromptSet, reference: PromptSet, weights: Weights
) -> Estimate:
    """F(C) ÷ F(M) of a circuit in a model, every other head giving its mean over other prompts.

    Args:
        model: the model.
        circuit: has heads of a model with the same parts.
        prompts: measured.
        reference: that the means are taken over.
        weights: from `bootstrap_weights`.
    """
    ablation = build_ablation(model, prompts, reference=reference)
    inside = run_knockouts(model, prompts, [circuit.heads], ablation, keep=True)[0]
    whole = run_knockouts(model, prompts, [()], ablation)[0]
    return faithfulness(inside.double().numpy(), whole.double().numpy(), weights)
