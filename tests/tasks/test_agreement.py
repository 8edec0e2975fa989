from collections import Counter

import pytest

from neuroplast.errors import InputError
from neuroplast.tasks import TASKS, agreement, build_prompt_set

NUMBER = {word: number for pair in agreement.NOUNS for number, word in enumerate(pair)}


def nouns(text):
    return [word for word in text.split() if word in NUMBER]


def test_nouns_are_distinct_in_both_numbers():
    assert len(NUMBER) == 2 * len(agreement.NOUNS)


def test_the_answer_is_the_verb_in_the_subjects_number(wordy):
    for record in agreement.build_records(wordy, 72, 0):
        subject, attractor = nouns(record.clean)
        verbs = agreement.TEMPLATES[record.template][1]
        assert record.answer.strip() == verbs[NUMBER[subject]]
        assert record.foil.strip() == verbs[1 - NUMBER[subject]]
        assert record.clean.endswith(attractor) and record.clean.startswith(subject, record.marks["subject"])
        assert ("same" in record.group) == (NUMBER[subject] == NUMBER[attractor])


def test_the_counterfactual_changes_the_number_of_the_subject_and_nothing_else(wordy):
    prompts = build_prompt_set(wordy, "agreement", agreement.build_records(wordy, 36, 0))
    changed = prompts.clean != prompts.counterfactual
    assert (changed.sum(dim=1) == 1).all()
    assert changed.gather(1, prompts.positions["subject"][:, None]).all()
    for record in prompts.records:
        (before, one), (after, other) = nouns(record.clean), nouns(record.counterfactual)
        assert (NUMBER[before], one) == (1 - NUMBER[after], other)
        assert (before, after) in agreement.NOUNS or (after, before) in agreement.NOUNS
    task = TASKS["agreement"]
    assert tuple(prompts.positions) == task.positions and task.poisons == ("swapped_answers",)


def test_numbers_of_subject_and_attractor_are_balanced_and_independent(wordy):
    pairs = [nouns(record.clean) for record in agreement.build_records(wordy, 72, 0)]
    assert set(Counter((NUMBER[one], NUMBER[other]) for one, other in pairs).values()) == {18}


def test_train_and_eval_share_neither_nouns_nor_templates(wordy):
    train, held_out = (agreement.build_records(wordy, 90, 0, split=split) for split in ("train", "eval"))
    seen = [{word for each in records for word in nouns(each.clean)} for records in (train, held_out)]
    assert not seen[0] & seen[1]
    assert not {each.template for each in train} & {each.template for each in held_out}


def test_a_seed_repeats_and_another_differs(wordy):
    assert agreement.build_records(wordy, 20, 7) == agreement.build_records(wordy, 20, 7)
    assert agreement.build_records(wordy, 20, 7) != agreement.build_records(wordy, 20, 8)


def test_too_few_words_and_what_cannot_be_are_refused(spaced, wordy, monkeypatch):
    with pytest.raises(InputError, match=r"of 63 nouns, with their plurals, are one token .* needs at least 6"):
        agreement.build_records(spaced, 4, 0)
    for arguments in ({"n": 0}, {"split": "test"}, {"counterfactual": "abc"}):
        with pytest.raises(InputError, match=r"0 prompts|unknown"):
            agreement.build_records(wordy, **{"n": 4, "seed": 0, **arguments})
    assert set(TASKS["agreement"].names(wordy, "all")) == {"is", "are", "was", "were", "has", "have"}
    monkeypatch.setattr(agreement, "TEMPLATES", {"a": ("The {subject} near the {attractor}", ("hath", "haveth"))})
    with pytest.raises(InputError, match="0 of 1 templates' verbs are one token"):
        agreement.build_records(wordy, 4, 0)
