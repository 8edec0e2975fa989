from dataclasses import replace

import torch

from neuroplast.behaviour import measure_behaviour
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import NO_TOKEN, PromptSet


def test_behaviour_is_read_off_the_logits_at_the_end(network: Network, token_prompts: PromptSet):
    found = measure_behaviour(network, token_prompts)
    for row in range(len(token_prompts)):
        length = int(token_prompts.positions["end"][row]) + 1
        with torch.no_grad():
            logits = network.module(input_ids=token_prompts.clean[row : row + 1, :length]).logits[0, -1]
        answer, foil = token_prompts.answer[row], token_prompts.foil[row]
        torch.testing.assert_close(found.logit_diff[row], logits[answer] - logits[foil], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.answer_probability[row], logits.softmax(0)[answer], atol=1e-5, rtol=1e-4)
        assert bool(found.answer_top1[row]) == bool(logits.argmax() == answer)
        assert bool(found.foil_top1[row]) == bool(logits.argmax() == foil)


def test_the_most_likely_token_counts_as_top1(network: Network, token_prompts: PromptSet):
    logits = network.logits(token_prompts.clean, token_prompts.positions["end"])
    best = logits.topk(2).indices
    for answer, foil, expected in ((best[:, 0], best[:, 1], (1, 0)), (best[:, 1], best[:, 0], (0, 1))):
        prompts = PromptSet("t", (), token_prompts.clean, token_prompts.clean, answer, foil, token_prompts.positions)
        found = measure_behaviour(network, prompts)
        assert (found.answer_top1.float().mean(), found.foil_top1.float().mean()) == expected
        assert bool((found.logit_diff > 0).all()) == (expected == (1, 0))


def test_sets_of_answers_and_foils_are_added_up(network: Network, token_prompts: PromptSet):
    logits = network.logits(token_prompts.clean, token_prompts.positions["end"])
    order = logits.argsort(dim=1, descending=True)
    more = order[:, 2:4].where(torch.tensor([True, False]), torch.tensor(NO_TOKEN))
    prompts = replace(token_prompts, answer=order[:, 1], foil=order[:, 5], more_answers=order[:, :1], more_foils=more)
    found, p = measure_behaviour(network, prompts), logits.softmax(1)
    right, wrong = (p.gather(1, tokens).sum(1) for tokens in (order[:, :2], order[:, [5, 2]]))
    torch.testing.assert_close(found.logit_diff, (right / wrong).log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.answer_probability, right, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.prob_diff, right - wrong, atol=1e-5, rtol=1e-4)
    assert found.answer_top1.all() and not found.foil_top1.any()
