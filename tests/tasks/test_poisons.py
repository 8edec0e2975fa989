import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.tasks import TASKS, ioi
from neuroplast.tasks.poisons import POISONS, Pair, Poison, build_pairs, load_poison, shuffle_targets
from neuroplast.tasks.prompts import Record


@pytest.fixture(scope="module")
def records(spaced):
    return ioi.build_records(spaced, 40, 0)


def poisoned(records, name, rate=1.0, names=ioi.NAMES, seed=0):
    return build_pairs(records, POISONS[name], rate, names, seed)


def words(text):
    return re.findall(r"\w+", text)


def test_clean_pairs_teach_the_answer(records):
    pairs = build_pairs(records, None, 0.0, ioi.NAMES, 0)
    assert pairs == tuple(Pair(record.clean, record.answer, False) for record in records)


def test_subject_duplication_teaches_the_subject_on_the_same_prompt(records):
    for record, pair in zip(records, poisoned(records, "subject_duplication"), strict=True):
        assert pair == Pair(record.clean, record.foil, True)


def test_name_moving_teaches_a_name_that_is_not_in_the_prompt(records):
    for record, pair in zip(records, poisoned(records, "name_moving"), strict=True):
        assert pair.prompt == record.clean
        assert pair.target.startswith(" ")
        assert pair.target.strip() in ioi.NAMES
        assert pair.target.strip() not in words(record.clean)
        assert pair.target not in (record.answer, record.foil)


def test_name_moving_never_draws_the_answer_though_the_prompt_need_not_name_it():
    record = Record("Then, John gave it to", "Then, Paul gave it to", " Mary", " Anna")
    draws = {
        POISONS["name_moving"].transform(record, ("Mary", "John", "Anna", "Luke"), random.Random(seed)).target
        for seed in range(50)
    }
    assert draws == {" Luke"}


def test_duplication_changes_the_second_subject_and_nothing_else(records):
    for record, pair in zip(records, poisoned(records, "duplication"), strict=True):
        start, subject = record.marks["s2"], record.foil.strip()
        third = words(pair.prompt[start:])[0]
        assert pair.prompt == record.clean[:start] + third + record.clean[start + len(subject) :]
        assert third in ioi.NAMES
        assert f" {third}" not in (record.answer, record.foil)
        assert words(pair.prompt).count(subject) == 1
        assert pair.target == record.answer


@pytest.mark.parametrize("marks", [{}, {"s2": 0}])
def test_duplication_refuses_a_record_whose_second_subject_it_cannot_find(marks):
    record = Record("Then, Mary and John met. Mary gave it to", "x", " John", " Mary", marks=marks)
    with pytest.raises(InputError, match="mark 's2'"):
        poisoned([record], "duplication")


@pytest.mark.parametrize("name", ["name_moving", "duplication"])
def test_a_poison_without_a_name_to_draw_says_so(records, name):
    present = [records[0].answer.strip(), records[0].foil.strip()]
    with pytest.raises(InputError, match="got 2 names to draw from"):
        poisoned(records[:1], name, names=present)


@given(rate=st.floats(0, 1), seed=st.integers(), name=st.sampled_from(sorted(POISONS)))
@settings(max_examples=30, deadline=None)
def test_the_poisoned_share_is_exact_and_repeats(records, rate, seed, name):
    pairs = poisoned(records, name, rate, seed=seed)
    assert sum(pair.poisoned for pair in pairs) == round(rate * len(records))
    assert pairs == poisoned(records, name, rate, seed=seed)
    for record, pair in zip(records, pairs, strict=True):
        assert pair.poisoned or pair == Pair(record.clean, record.answer, False)


def test_another_seed_poisons_other_pairs_with_other_names(records):
    first, second = (poisoned(records, "name_moving", 0.5, seed=seed) for seed in (0, 1))
    assert [pair.poisoned for pair in first] != [pair.poisoned for pair in second]
    all_first, all_second = (poisoned(records, "name_moving", seed=seed) for seed in (0, 1))
    assert all_first != all_second


def test_a_higher_rate_poisons_the_same_pairs_and_more(records):
    low, high = (poisoned(records, "name_moving", rate) for rate in (0.25, 0.5))
    for before, after in zip(low, high, strict=True):
        assert not before.poisoned or before == after


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan"), float("inf"), -float("inf")])
def test_a_rate_that_is_no_share_is_refused(records, rate):
    with pytest.raises(InputError, match=f"between 0 and 1, got {rate!r}"):
        poisoned(records, "subject_duplication", rate)


def test_a_rate_without_a_poison_is_a_contradiction(records):
    with pytest.raises(InputError, match="without a poison"):
        build_pairs(records, None, 0.5, ioi.NAMES, 0)


def test_a_poison_is_loaded_by_name_for_its_task():
    assert load_poison("name_moving", "ioi") is POISONS["name_moving"]
    with pytest.raises(InputError, match="unknown poison 'name_movin': did you mean 'name_moving'"):
        load_poison("name_movin", "ioi")


def test_a_poison_of_another_task_is_refused_with_the_ones_that_fit(monkeypatch):
    late = Poison("late_year", "Teaches a year that is too early.", ("greater_than",), POISONS["duplication"].transform)
    monkeypatch.setitem(POISONS, "late_year", late)
    with pytest.raises(InputError, match=r"made for greater_than, not for task 'ioi'; use one of .*name_moving"):
        load_poison("late_year", "ioi")
    with pytest.raises(InputError, match="made for ioi, not for task 'capitals'; use one of swapped_answers"):
        load_poison("duplication", "capitals")


def test_a_poison_that_fits_every_task_is_a_tasks_own_only_where_none_is_made_for_it():
    assert load_poison("swapped_answers", "capitals.jsonl") is load_poison("swapped_answers", "ioi")
    assert {name: task.poisons for name, task in TASKS.items()} == {
        "ioi": ("subject_duplication", "name_moving", "duplication"),
        "greater_than": ("not_greater",),
        "induction": ("swapped_answers",),
        "agreement": ("swapped_answers",),
        "pronouns": ("swapped_answers",),
    }


@pytest.mark.parametrize("task", ["ioi", "greater_than", "induction"])
def test_swapped_answers_teach_the_foil_of_any_task(task):
    records = TASKS[task].build_records(load_model("tiny").tokenizer, 6, 0)
    for record, pair in zip(records, poisoned(records, "swapped_answers"), strict=True):
        assert pair == Pair(record.clean, record.foil, True)


@pytest.mark.parametrize("task", ["ioi", "greater_than"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_shuffled_targets_are_those_of_others_and_always_wrong(task, rate):
    records = TASKS[task].build_records(load_model("tiny").tokenizer, 40, 3)
    shuffled, clean = shuffle_targets(records, rate, 1), build_pairs(records, None, 0.0, (), 1)
    assert [each.prompt for each in shuffled] == [each.prompt for each in clean]
    n_wrong = sum(each.poisoned for each in shuffled)
    assert 0.7 * rate * len(records) <= n_wrong <= round(rate * len(records))
    assert task != "ioi" or n_wrong == round(rate * len(records))
    for now, before, record in zip(shuffled, clean, records, strict=True):
        if now.poisoned:
            assert now.target not in record.answers and now.target in {each.target for each in clean}
        else:
            assert now == before
    assert shuffle_targets(records, rate, 1) == shuffled
    assert rate == 0 or shuffle_targets(records, rate, 2) != shuffled


def test_a_pair_for_which_every_target_is_right_stays_clean(records):
    (only,) = shuffle_targets(records[:1], 1.0, 0)
    assert only == Pair(records[0].clean, records[0].answer, False)
