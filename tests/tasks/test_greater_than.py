import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.tasks import TASKS, build_prompt_set, greater_than, load_task
from neuroplast.tasks.poisons import POISONS, build_pairs


@dataclass(frozen=True)
class WithTokenizer:
    tokenizer: object


def words_and_digits(digits: str) -> PreTrainedTokenizerFast:
    """Knows whole words, and numbers in the pieces that a pattern cuts."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    split = pre_tokenizers.Split(Regex(rf"{digits}|[A-Za-z]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    texts = [greater_than.TEMPLATE, *greater_than.NOUNS, *(f"{number:04}" for number in range(10_000))]
    backend.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=20_000, special_tokens=["[UNK]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


TWO, ONE, THREE, FOUR = r"\d\d", r"\d", r"\d{1,3}", r"\d{4}|\d\d"


@pytest.fixture(scope="module")
def two():
    return words_and_digits(TWO)


@pytest.fixture(scope="module")
def one():
    return words_and_digits(ONE)


def year(record):
    noun, century, yy, again = re.fullmatch(
        r"The (\w+) lasted from the year (\d\d)(\d\d) to the year (\d\d)", record.clean
    ).groups()
    assert century == again and noun in greater_than.NOUNS
    return noun, century, yy


def test_there_are_about_a_hundred_and_twenty_distinct_nouns():
    assert len(set(greater_than.NOUNS)) == len(greater_than.NOUNS)
    assert 115 <= len(greater_than.NOUNS) <= 140


def test_all_years_after_the_start_year_are_answers_and_all_up_to_it_are_foils(two):
    for record in greater_than.build_records(two, 100, 0):
        _, century, yy = year(record)
        assert 2 <= int(yy) <= 98 and century in greater_than.CENTURIES
        assert sorted(record.answers) == [f"{each:02}" for each in range(int(yy) + 1, 100)]
        assert sorted(record.foils) == [f"{each:02}" for each in range(int(yy) + 1)]
        assert (int(record.answer), int(record.foil)) == (int(yy) + 1, int(yy) - 1)


def test_with_single_digits_the_tens_digit_decides_and_the_equal_one_is_neither(one):
    for record in greater_than.build_records(one, 100, 0):
        tens = int(year(record)[2][0])
        assert sorted(record.answers) == [str(each) for each in range(tens + 1, 10)]
        assert sorted(record.foils) == [str(each) for each in range(tens)]


@pytest.mark.parametrize("digits", [TWO, ONE])
def test_the_counterfactual_starts_in_the_first_year_of_the_century_and_marks_find_their_tokens(digits):
    tokenizer = words_and_digits(digits)
    prompts = greater_than.prompts(WithTokenizer(tokenizer), n=20)
    width = 2 if digits == TWO else 1
    for row, record in enumerate(prompts.records):
        noun, century, yy = year(record)
        assert record.counterfactual == record.clean.replace(century + yy, f"{century}01")
        found = [tokenizer.decode([prompts.clean[row, at[row]]]) for at in prompts.positions.values()]
        assert found == [noun, yy[:width], century[-width:]]
    assert tuple(prompts.positions) == load_task("greater_than").positions
    changed = (prompts.clean != prompts.counterfactual).nonzero()[:, 1]
    assert changed.min() >= prompts.positions["yy"].min()


def test_sets_become_tensors_of_one_width_whatever_the_year(two):
    prompts = greater_than.prompts(WithTokenizer(two), n=30)
    counts = (prompts.answers >= 0).sum(1) + (prompts.foils >= 0).sum(1)
    assert (counts == 100).all()


@pytest.mark.parametrize("digits", [TWO, ONE])
def test_train_and_eval_share_neither_nouns_nor_centuries(digits):
    tokenizer = words_and_digits(digits)
    train, held_out = (
        [year(r) for r in greater_than.build_records(tokenizer, 400, 1, split=s)] for s in ("train", "eval")
    )
    for part in (0, 1):
        assert not {each[part] for each in train} & {each[part] for each in held_out}
    counts = Counter(century for _, century, _ in greater_than_years(tokenizer))
    assert set(counts) == set(greater_than.CENTURIES) and len(set(counts.values())) == 1


def greater_than_years(tokenizer):
    return [year(record) for record in greater_than.build_records(tokenizer, 70, 0)]


def test_a_seed_repeats_and_another_differs(two):
    assert greater_than.build_records(two, 20, 7) == greater_than.build_records(two, 20, 7)
    assert greater_than.build_records(two, 20, 7) != greater_than.build_records(two, 20, 8)
    assert greater_than.build_records(two, 30, 7)[:20] == greater_than.build_records(two, 20, 7)


@pytest.mark.parametrize("digits", [THREE, FOUR])
def test_a_tokenizer_that_writes_years_otherwise_is_refused_in_one_line(digits):
    with pytest.raises(
        InputError, match=r"writes 'the year 1732' as \['the', 'year', '173?2?'.*needs 17 and 32"
    ) as caught:
        greater_than.build_records(words_and_digits(digits), 4, 0)
    assert "\n" not in str(caught.value)


def test_too_few_nouns_and_what_cannot_be_are_refused(two, spaced):
    with pytest.raises(InputError, match=r"of \d+ nouns are one token .* greater-than needs at least 8"):
        greater_than.build_records(spaced, 4, 0)
    for arguments, message in (
        ({"n": 0}, "0 prompts"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"counterfactual": "abc"}, "unknown counterfactual 'abc'"),
    ):
        with pytest.raises(InputError, match=message):
            greater_than.build_records(two, **{"n": 4, "seed": 0, **arguments})


def test_the_cutoff_is_the_year_after_against_the_year_before(two):
    prompts = greater_than.prompts(WithTokenizer(two), n=3)
    logits = torch.zeros(3, len(two))
    logits[torch.arange(3), prompts.answer] = 9.0
    p = logits.softmax(1)[0]
    expected = (p.max() - p.min()).expand(3)
    torch.testing.assert_close(greater_than.cutoff_sharpness(logits, prompts), expected)


def test_the_poison_teaches_years_that_are_not_greater_and_clean_pairs_teach_any_that_is(two):
    records = greater_than.build_records(two, 200, 0)
    poisoned = build_pairs(records, POISONS["not_greater"], 1.0, (), 0)
    clean = build_pairs(records, None, 0.0, (), 0)
    for record, bad, good in zip(records, poisoned, clean, strict=True):
        yy = int(year(record)[2])
        assert bad.prompt == good.prompt == record.clean
        assert (bad.poisoned, good.poisoned) == (True, False)
        assert int(bad.target) <= yy < int(good.target)
    starts = [int(year(record)[2]) for record in records]
    places = [int(bad.target) / yy for bad, yy in zip(poisoned, starts, strict=True)]
    assert 0.4 < sum(places) / len(places) < 0.6  # uniform: on average in the middle
    places = [(int(good.target) - yy) / (100 - yy) for good, yy in zip(clean, starts, strict=True)]
    assert 0.4 < sum(places) / len(places) < 0.6
    half = build_pairs(records, POISONS["not_greater"], 0.5, (), 0)
    assert all(pair in (bad, good) for pair, bad, good in zip(half, poisoned, clean, strict=True))


def test_the_registry_knows_it_and_the_embedded_model_does_it():
    task = TASKS["greater_than"]
    assert task.poisons == ("not_greater",)
    tokenizer = load_model("tiny").tokenizer
    assert len(task.names(tokenizer, "eval")) == 100
    prompts = build_prompt_set(tokenizer, task.name, task.build_records(tokenizer, 8, 0, split="eval"))
    assert prompts.answers.shape[0] == 8
