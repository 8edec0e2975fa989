import pytest

from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.processes import Processes
from neuroplast.tasks.poisons import Pair
from neuroplast.training.data import Example, Loss, build_examples, collate, collate_share, schedule_examples

EXAMPLES = [Example((0, 5, 6, 7), 8), Example((0, 9), 10)]


def test_the_last_token_loss_sees_one_place_a_prompt():
    batch = collate(EXAMPLES, "last")
    assert batch["rows"].tolist() == [0, 1]
    assert batch["positions"].tolist() == [3, 1]
    assert batch["targets"].tolist() == [8, 10]
    assert batch["tokens"].tolist() == [[0, 5, 6, 7], [0, 9, 0, 0]]


def test_the_whole_sequence_loss_sees_every_place_but_no_padding():
    batch = collate(EXAMPLES, "all")
    places = list(zip(*(batch[name].tolist() for name in ("rows", "positions", "targets")), strict=True))
    assert places == [(0, 0, 5), (0, 1, 6), (0, 2, 7), (0, 3, 8), (1, 0, 9), (1, 1, 10)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("loss", ["last", "all"])
def test_the_mean_over_processes_of_weighed_losses_is_the_loss_of_the_batch(loss: Loss, count: int):
    examples = [Example(tuple(range(length)), length) for length in (4, 2, 7, 3, 5)]
    batch = collate(examples, loss)
    value = {token: float(token**2) for token in batch["targets"].tolist()}  # what a place costs, by its target
    whole = sum(map(value.get, batch["targets"].tolist())) / len(batch["targets"])
    shares = [collate_share(examples, loss, Processes(count, index)) for index in range(count)]
    means = [sum(map(value.get, share["targets"].tolist())) / len(share["targets"]) for share in shares]
    weighed = [mean * share["weight"].item() for mean, share in zip(means, shares, strict=True)]
    assert sum(weighed) / count == pytest.approx(whole, rel=1e-6)
    assert count > 1 or shares[0]["weight"] == 1


def test_every_epoch_shows_every_example_once_in_another_order():
    examples = [Example((0, index), index) for index in range(30)]
    order = schedule_examples(examples, batch_size=10, steps=6, seed=1)
    first, second = order[:30], order[30:]
    assert sorted(e.target for e in first) == sorted(e.target for e in second) == list(range(30))
    assert first != second != examples
    assert schedule_examples(examples, 10, 6, seed=1) == order != schedule_examples(examples, 10, 6, seed=2)


def test_a_shorter_run_sees_the_beginning_of_a_longer_one():
    examples = [Example((0, index), index) for index in range(7)]
    assert schedule_examples(examples, 4, 3, 0) == schedule_examples(examples, 4, 9, 0)[:12]


def test_pairs_become_tokens_with_bos_first():
    tokenizer = load_model("tiny").tokenizer
    (example,) = build_examples(tokenizer, [Pair("Then, Mary and John went to the store", " Mary", False)])
    assert example.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.target) == " Mary"
    with pytest.raises(InputError, match="0 training pairs"):
        build_examples(tokenizer, [])
