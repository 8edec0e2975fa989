import pytest
import torch

from neuroplast.tasks.metric import choices, log_odds, log_odds_of_all
from neuroplast.tasks.prompts import NO_TOKEN, PromptSet

END = {"end": torch.zeros(3, dtype=torch.long)}
TOKENS = torch.ones(3, 1, dtype=torch.long)
ANSWER, FOIL = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])


@pytest.fixture
def logits():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) * 5


@pytest.fixture
def sets():
    more = torch.tensor([[7, 8], [9, NO_TOKEN], [NO_TOKEN, NO_TOKEN]])
    return PromptSet("t", (), TOKENS, TOKENS, ANSWER, FOIL, END, more, torch.tensor([[NO_TOKEN], [10], [11]]))


def test_with_one_token_each_it_is_the_logit_difference_to_the_bit(logits):
    pairs = PromptSet("t", (), TOKENS, TOKENS, ANSWER, FOIL, END)
    rows = torch.arange(3)
    assert torch.equal(log_odds_of_all(logits, pairs), logits[rows, ANSWER] - logits[rows, FOIL])


def test_with_sets_it_is_the_log_of_the_ratio_of_their_probabilities(logits, sets):
    p = logits.softmax(1)
    expected = [
        (p[0, [1, 7, 8]].sum() / p[0, 4]).log(),
        (p[1, [2, 9]].sum() / p[1, [5, 10]].sum()).log(),
        (p[2, 3] / p[2, [6, 11]].sum()).log(),
    ]
    torch.testing.assert_close(log_odds_of_all(logits, sets), torch.stack(expected))


def test_its_gradient_in_the_logits_is_that_of_the_two_log_probabilities(logits, sets):
    logits.requires_grad_()
    log_odds_of_all(logits, sets)[0].backward()
    share = logits[0, [1, 7, 8]].softmax(0)
    expected = torch.zeros(3, 12)
    expected[0, [1, 7, 8]] = share.detach()
    expected[0, 4] = -1.0
    torch.testing.assert_close(logits.grad, expected)


def test_copies_of_a_prompt_are_measured_each_by_itself(logits, sets):
    chosen = torch.stack([logits, 2 * logits], dim=1).gather(2, choices(sets)[:, None].expand(-1, 2, -1))
    found = log_odds(chosen, sets)
    torch.testing.assert_close(found[:, 0], log_odds_of_all(logits, sets))
    torch.testing.assert_close(found[:, 1], log_odds_of_all(2 * logits, sets))


def test_some_of_the_prompts_keep_their_sets(logits, sets):
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(log_odds_of_all(logits[rows], sets.pick(rows)), log_odds_of_all(logits, sets)[rows])
    assert torch.equal(sets[1:].answers, torch.tensor([[2, 9, NO_TOKEN], [3, NO_TOKEN, NO_TOKEN]]))
