import re
from collections import Counter

import pytest

from neuroplast.errors import InputError
from neuroplast.tasks import TASKS, build_prompt_set, pronouns

PEOPLE = dict.fromkeys(pronouns.FEMALE, "she") | dict.fromkeys(pronouns.MALE, "he")


def person(text):
    (name,) = (word for word in re.findall(r"\w+", text) if word in PEOPLE)
    return name


def test_no_name_is_on_both_lists():
    assert len(PEOPLE) == len(pronouns.FEMALE) + len(pronouns.MALE)


def test_the_answer_goes_with_the_name_and_the_counterfactual_has_one_of_the_other_gender(wordy):
    for record in pronouns.build_records(wordy, 36, 0):
        mine, other = person(record.clean), person(record.counterfactual)
        assert (record.answer, record.foil) == (f" {PEOPLE[mine]}", f" {PEOPLE[other]}")
        assert record.answer != record.foil and record.group == PEOPLE[mine]
        assert record.counterfactual == record.clean.replace(mine, other)


def test_only_the_name_changes_and_its_mark_finds_it(wordy):
    prompts = build_prompt_set(wordy, "pronouns", pronouns.build_records(wordy, 36, 0))
    changed = prompts.clean != prompts.counterfactual
    assert (changed.sum(dim=1) == 1).all()
    assert changed.gather(1, prompts.positions["name"][:, None]).all()
    task = TASKS["pronouns"]
    assert tuple(prompts.positions) == task.positions and task.poisons == ("swapped_answers",)
    assert task.names(wordy, "eval") == ("she", "he")


def test_genders_are_balanced_in_every_template(wordy):
    counts = Counter((record.template, record.group) for record in pronouns.build_records(wordy, 36, 0))
    assert len(counts) == 18 and set(counts.values()) == {2}


def test_train_and_eval_share_neither_names_nor_templates(wordy):
    train, held_out = (pronouns.build_records(wordy, 90, 0, split=split) for split in ("train", "eval"))
    seen = [
        {person(text) for each in records for text in (each.clean, each.counterfactual)}
        for records in (train, held_out)
    ]
    assert not seen[0] & seen[1]
    assert not {each.template for each in train} & {each.template for each in held_out}


def test_a_seed_repeats_and_another_differs(wordy):
    assert pronouns.build_records(wordy, 20, 7) == pronouns.build_records(wordy, 20, 7)
    assert pronouns.build_records(wordy, 20, 7) != pronouns.build_records(wordy, 20, 8)


def test_too_few_words_and_what_cannot_be_are_refused(spaced, wordy, monkeypatch):
    with pytest.raises(InputError, match=r"0 of 2 pronouns are one token .* the pronoun task needs at least 2"):
        pronouns.build_records(spaced, 4, 0)
    for arguments in ({"n": 0}, {"split": "test"}, {"counterfactual": "abc"}):
        with pytest.raises(InputError, match=r"0 prompts|unknown"):
            pronouns.build_records(wordy, **{"n": 4, "seed": 0, **arguments})
    monkeypatch.setattr(pronouns, "MALE", ("John", "Zyxwvut"))
    with pytest.raises(InputError, match="1 of 2 male names are one token"):
        pronouns.build_records(wordy, 4, 0)
