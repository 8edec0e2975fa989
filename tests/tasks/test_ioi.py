import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroplast.errors import InputError
from neuroplast.tasks import TASKS, ioi, load_task
from neuroplast.tasks.prompts import build_prompt_set
from neuroplast.tasks.records import save_records


@dataclass(frozen=True)
class WithTokenizer:
    tokenizer: object


def named(text):
    return [word for word in re.findall(r"\w+", text) if word in ioi.NAMES]


def token_texts(tokenizer, prompts, position):
    index = prompts.positions[position]
    return [tokenizer.decode([row[at]]).strip() for row, at in zip(prompts.clean, index, strict=True)]


def test_there_are_fifteen_distinct_patterns_and_a_hundred_names():
    assert len(set(ioi.TEMPLATES.values())) == 15
    assert len(set(ioi.NAMES)) == 100
    assert (len(set(ioi.PLACES)), len(set(ioi.OBJECTS))) == (8, 8)


def test_thirty_records_hold_each_pattern_once_in_each_order(spaced):
    counts = Counter((record.template, record.group) for record in ioi.build_records(spaced, 60, 0))
    assert len(counts) == 30
    assert set(counts.values()) == {2}


@pytest.mark.parametrize(("split", "patterns"), [("train", 10), ("eval", 5)])
def test_a_split_also_takes_its_patterns_and_orders_in_turn(spaced, split, patterns):
    records = ioi.build_records(spaced, 2 * patterns, 0, split=split)
    assert len({(record.template, record.group) for record in records}) == 2 * patterns


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16, 31])
def test_orders_are_balanced_however_many_are_asked_for(spaced, n):
    counts = Counter(record.group for record in ioi.build_records(spaced, n, 0))
    assert abs(counts["ABBA"] - counts["BABA"]) == n % 2


def test_the_subject_is_said_twice_and_the_indirect_object_once(spaced):
    for record in ioi.build_records(spaced, 60, 1):
        first, second, giver = named(record.clean)
        io, s = record.answer.strip(), record.foil.strip()
        assert giver == s
        assert (first, second) == ((io, s) if record.group == "ABBA" else (s, io))


def test_a_prompt_stops_right_before_the_indirect_object(spaced):
    for record in ioi.build_records(spaced, 30, 1):
        assert record.clean.endswith(" to")
        assert "{" not in record.clean + record.counterfactual


@given(seed=st.integers(), n=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_the_three_names_of_abc_are_new_and_distinct(spaced, seed, n):
    for record in ioi.build_records(spaced, n, seed, counterfactual="abc"):
        others = named(record.counterfactual)
        assert len(set(others)) == 3
        assert not set(others) & set(named(record.clean))


def test_s2_io_flip_changes_only_the_giver_so_the_answer_flips(spaced):
    for record in ioi.build_records(spaced, 30, 2, counterfactual="s2_io_flip"):
        io, s2 = record.answer.strip(), record.marks["s2"]
        assert record.counterfactual[:s2] == record.clean[:s2]
        assert record.counterfactual.startswith(io, s2)
        assert named(record.counterfactual)[2] == io


def test_random_names_keep_the_pattern_with_two_new_names(spaced):
    for record in ioi.build_records(spaced, 30, 2, counterfactual="random_names"):
        old, new = named(record.clean), named(record.counterfactual)
        assert [old.index(name) for name in old] == [new.index(name) for name in new]
        assert not set(old) & set(new)
        expected = record.clean
        for before, after in dict(zip(old, new, strict=True)).items():
            expected = re.sub(rf"\b{before}\b", after, expected)
        assert expected == record.counterfactual


def test_clean_prompts_do_not_depend_on_the_counterfactual(spaced):
    cleans = {
        tuple(record.clean for record in ioi.build_records(spaced, 20, 3, counterfactual=kind))
        for kind in ioi.COUNTERFACTUALS
    }
    assert len(cleans) == 1


@pytest.mark.parametrize("counterfactual", ioi.COUNTERFACTUALS)
def test_positions_find_their_words_in_every_kind_of_tokenizer(tokenizer, counterfactual):
    prompts = ioi.prompts(WithTokenizer(tokenizer), n=30, seed=4, counterfactual=counterfactual)
    records = prompts.records
    assert token_texts(tokenizer, prompts, "io") == [record.answer.strip() for record in records]
    assert token_texts(tokenizer, prompts, "s1") == [record.foil.strip() for record in records]
    assert token_texts(tokenizer, prompts, "s2") == [record.foil.strip() for record in records]
    assert set(token_texts(tokenizer, prompts, "end")) == {"to"}
    assert (prompts.positions["s1+1"] == prompts.positions["s1"] + 1).all()
    assert (prompts.positions["s1"] < prompts.positions["s2"]).all()
    assert (prompts.positions["s2"] < prompts.positions["end"]).all()


def test_clean_and_counterfactual_differ_only_where_names_stand(tokenizer):
    prompts = build_prompt_set(tokenizer, "ioi", ioi.build_records(tokenizer, 30, 5))
    changed = prompts.clean != prompts.counterfactual
    assert (changed.sum(dim=1) == 3).all()
    for position in ("io", "s1", "s2"):
        assert changed.gather(1, prompts.positions[position][:, None]).all()


def test_train_and_eval_share_neither_names_nor_patterns(spaced):
    train, held_out = (ioi.build_records(spaced, 120, 6, split=split) for split in ("train", "eval"))
    assert not {r.template for r in train} & {r.template for r in held_out}
    texts = [" ".join(r.clean + " " + r.counterfactual for r in records) for records in (train, held_out)]
    assert not set(named(texts[0])) & set(named(texts[1]))
    assert set(ioi.names(spaced, "train")) | set(ioi.names(spaced, "eval")) == set(ioi.names(spaced))


def test_a_seed_repeats_and_another_differs(spaced):
    assert ioi.build_records(spaced, 20, 7) == ioi.build_records(spaced, 20, 7)
    assert ioi.build_records(spaced, 20, 7) != ioi.build_records(spaced, 20, 8)
    assert ioi.build_records(spaced, 30, 7)[:20] == ioi.build_records(spaced, 20, 7)


def test_records_do_not_depend_on_hash_randomisation(spaced, tmp_path):
    spaced.save_pretrained(tmp_path / "tokenizer")
    program = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer;"
        "from neuroplast.tasks import ioi, save_records;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "save_records(Path(sys.argv[2]), ioi.build_records(t, 10, 9))"
    )
    other, here = tmp_path / "other.jsonl", tmp_path / "here.jsonl"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "tokenizer"), str(other)],
        env={"PYTHONHASHSEED": "1234", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    save_records(here, ioi.build_records(spaced, 10, 9))
    assert other.read_text() == here.read_text()


def test_only_names_of_one_token_are_used(few_names, letters):
    with pytest.raises(InputError, match=r"5 of 100 names .* at least 12"):
        ioi.build_records(few_names, 4, 0)
    with pytest.raises(InputError, match="0 of 100 names"):
        ioi.names(letters)


def test_too_few_places_fail_instead_of_falling_back(spaced, monkeypatch):
    monkeypatch.setattr(ioi, "PLACES", ("store", "antidisestablishmentarium", "xylophonists' guild"))
    with pytest.raises(InputError, match=r"1 of 3 places .* at least 2"):
        ioi.build_records(spaced, 4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "0 prompts"),
        ({"n": -3}, "-3 prompts"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"counterfactual": "acb"}, "unknown counterfactual 'acb': did you mean 'abc'"),
    ],
)
def test_what_cannot_be_is_refused(spaced, arguments, message):
    with pytest.raises(InputError, match=message):
        ioi.build_records(spaced, **{"n": 4, "seed": 0, **arguments})


def test_the_registry_knows_ioi_with_its_positions_and_poisons(spaced):
    task = load_task("ioi")
    assert task is TASKS["ioi"]
    assert task.counterfactuals[0] == "abc"
    assert set(task.poisons) == {"subject_duplication", "name_moving", "duplication"}
    prompts = build_prompt_set(spaced, task.name, task.build_records(spaced, 2, 0))
    assert tuple(prompts.positions) == task.positions
    assert len(task.names(spaced, "eval")) == 33


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown task 'iio': did you mean 'ioi'"):
        load_task("iio")
