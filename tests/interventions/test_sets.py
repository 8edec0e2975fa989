"""Every intervention measures the log odds of sets of answers and foils, as the whole vocabulary gives them."""

import copy
from dataclasses import replace

import pytest
import torch

from architectures import VOCABULARY
from neuroplast.behaviour import measure_behaviour
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.chunks import build_chunk, logit_difference
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.ledger import build_ledger
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.metric import log_odds_of_all
from neuroplast.tasks.prompts import NO_TOKEN, PromptSet


@pytest.fixture
def sets(named_prompts: PromptSet) -> PromptSet:
    rest = [
        [token for token in range(VOCABULARY) if token not in (answer, foil)]
        for answer, foil in zip(named_prompts.answer.tolist(), named_prompts.foil.tolist(), strict=True)
    ]
    answers = torch.tensor([[*row[: 3 + at], *[NO_TOKEN] * (3 - at)] for at, row in enumerate(rest)])
    return replace(named_prompts, more_answers=answers, more_foils=torch.tensor([row[10:12] for row in rest]))


def expected(model: Network, prompts: PromptSet, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return log_odds_of_all(model.logits(tokens, prompts.positions["end"]).float(), prompts)


def test_the_two_runs_of_path_patching_are_measured_by_their_sets(network: Network, sets: PromptSet):
    found = path_patch(network, sets)
    torch.testing.assert_close(found.clean, expected(network, sets, sets.clean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.counterfactual, expected(network, sets, sets.counterfactual), atol=1e-4, rtol=1e-4)


def test_one_more_answer_changes_what_a_head_is_worth(network: Network, sets: PromptSet):
    alone = replace(sets, more_answers=None, more_foils=None)
    assert not torch.allclose(path_patch(network, sets).effects, path_patch(network, alone).effects, atol=1e-4)


def test_the_gradient_of_the_metric_reaches_the_residual_stream(network: Network, sets: PromptSet):
    chunk = build_chunk(sets, torch.arange(4), network.device)
    residual = torch.randn(4, 2, network.d_model, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = torch.arange(VOCABULARY).expand(8, -1)
    logits = network.readout(residual.flatten(0, 1), whole).view(4, 2, -1)
    slow = torch.stack([log_odds_of_all(each, sets) for each in logits.unbind(1)], dim=1)
    fast = logit_difference(network, residual, chunk.prompts)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(each.sum(), residual)[0] for each in (fast, slow)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_chunks_of_other_sets_are_told_apart(network: Network, sets: PromptSet):
    other = replace(sets, more_foils=None)
    keys = [build_chunk(each, torch.arange(4), network.device).key for each in (sets, other)]
    assert keys[0] != keys[1]


def test_nothing_knocked_out_is_the_model_itself(network: Network, sets: PromptSet):
    (whole,) = run_knockouts(network, sets, [()], build_ablation(network, sets))
    torch.testing.assert_close(whole, measure_behaviour(network, sets).logit_diff, atol=1e-4, rtol=1e-4)


def test_attribution_of_all_edges_between_equal_runs_is_nothing(network: Network, sets: PromptSet):
    same = replace(sets, counterfactual=sets.clean)
    assert float(attribute_edges(network, same).scores.abs().max()) == 0.0


def test_the_ledger_splits_the_change_of_the_log_odds(network: Network, sets: PromptSet, family: str):
    model = copy.deepcopy(network.module)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    end = build_network(model, None, family)
    ledger = build_ledger(network, end, sets)
    torch.testing.assert_close(
        ledger.change, expected(end, sets, sets.clean) - expected(network, sets, sets.clean), atol=1e-4, rtol=1e-4
    )
    assert ledger.error < 0.01
