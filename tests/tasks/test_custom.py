import json
from dataclasses import dataclass, replace

import pytest
from transformers import PreTrainedTokenizerFast

from neuroplast.audit import AuditConfig, run_audit
from neuroplast.dose import DoseConfig
from neuroplast.errors import GateError, InputError, StorageError
from neuroplast.evaluation import EvaluateConfig
from neuroplast.models.sources import load_model
from neuroplast.repair import RepairConfig
from neuroplast.study.plan import build_config
from neuroplast.subject import Subject
from neuroplast.tasks import Record, ioi, load_task, save_records
from neuroplast.tasks.check import check_file
from neuroplast.tasks.poisons import load_poison
from neuroplast.tasks.prompts import group_keys
from neuroplast.tasks.task import shortfall

GOOD = {"clean": "So Mary said to", "counterfactual": "So Anna said to", "answer": " John", "foil": " Mary"}


@dataclass(frozen=True)
class WithTokenizer:
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def records(tiny) -> tuple[Record, ...]:
    return ioi.build_records(tiny.tokenizer, 30, 0)


@pytest.fixture
def path(tmp_path, records):
    save_records(tmp_path / "my.jsonl", records)
    return str(tmp_path / "my.jsonl")


def write(folder, rows):
    """A file of records that are GOOD but for what a row says."""
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(GOOD | row) + "\n" for row in rows))
    return path


def several(n, **others):
    return [
        {"clean": f"So Mary said {number} to", "counterfactual": f"So Anna said {number} to"} | others
        for number in range(n)
    ]


def test_a_file_is_a_task_by_its_path_and_is_called_as_the_file_is(path, records):
    task = load_task(path)
    assert (task.name, task.positions, task.counterfactuals) == ("my.jsonl", (*ioi.TASK.positions,), ("own",))
    assert task.poisons == ("swapped_answers",)
    assert task.build_records(None, 100, 0) == records


def test_every_third_record_is_measured_and_the_others_are_trained_on(path, records, tiny):
    task = load_task(path)
    measured = task.prompts(tiny, 100, split="eval")
    assert measured.records == records[2::3]
    trained = {pair.prompt for pair in task.pairs(tiny, 100)}
    assert trained == {record.clean for number, record in enumerate(records) if number % 3 != 2}


def test_a_file_may_say_itself_which_records_are_measured(tmp_path, records, tiny):
    said = [replace(record, split="eval" if number < 4 else "train") for number, record in enumerate(records)]
    save_records(tmp_path / "my.jsonl", said)
    task = load_task(str(tmp_path / "my.jsonl"))
    assert task.prompts(tiny, 100, split="eval").records == tuple(said[:4])
    assert {pair.prompt for pair in task.pairs(tiny, 100)} == {record.clean for record in said[4:]}


def test_examples_are_repeated_in_an_order_of_the_seed_until_there_are_as_many_as_asked_for(path, tiny):
    task = load_task(path)
    first, second = (task.pairs(tiny, 50, seed) for seed in (0, 1))
    assert len(first) == 50 and first == task.pairs(tiny, 50, 0) and first != second
    rounds = [[pair.prompt for pair in first[:20]], [pair.prompt for pair in first[20:40]]]
    assert set(rounds[0]) == set(rounds[1]) and rounds[0] != rounds[1] and len(set(rounds[0])) == 20
    assert len({pair.prompt for pair in task.pairs(tiny, 20, 5)}) == task.most_examples == 20


def test_measured_prompts_are_never_repeated_and_that_there_are_fewer_is_told(path, tiny):
    task = load_task(path)
    few, all_of_them = (task.prompts(tiny, n, split="eval") for n in (4, 64))
    assert len(few) == len({record.clean for record in few.records}) == 4 and shortfall(few, 4) is None
    assert len(all_of_them) == 10
    assert shortfall(all_of_them, 64) == (
        "my.jsonl has 10 prompts for this, fewer than the 64 asked for: all of them are taken"
    )
    assert task.prompts(tiny, 4, 1, split="eval").records != few.records


def test_a_command_that_measures_takes_the_eval_records_and_tells_when_they_are_few(path, records):
    told: list[str] = []

    class Listener:
        say = told.append

    config = Subject(task=path).resolved()
    model, prompts = config.load(Listener())  # type: ignore[arg-type]
    assert prompts.records == records[2::3] and prompts.task == "my.jsonl"
    assert told == ["my.jsonl has 10 prompts for this, fewer than the 64 asked for: all of them are taken"]
    assert config.provenance(model, prompts)["task_sha256"] == load_task(path).sha256
    assert "task_sha256" not in Subject().resolved().provenance(model, prompts)


def test_what_is_chosen_on_and_what_is_judged_on_are_two_halves(path, records):
    model = load_model("tiny")
    chosen_on, judged_on = RepairConfig(poisoned="tiny", base="tiny", task=path).prompts(model)
    halves = [{record.clean for record in each.records} for each in (chosen_on, judged_on)]
    assert len(halves[0]) == len(halves[1]) == 5 and not halves[0] & halves[1]
    assert halves[0] | halves[1] == {record.clean for record in records[2::3]}


def test_two_halves_of_too_few_are_refused(tmp_path, records, tiny):
    save_records(tmp_path / "few.jsonl", records[:9])
    with pytest.raises(InputError, match=r"few\.jsonl has 3 records for eval, and 2 sets of at least 2 .* add 1 or"):
        load_task(str(tmp_path / "few.jsonl")).apart(tiny, 64, (0, 1), split="eval")


def test_other_prompts_of_a_task_that_writes_its_own_are_those_of_other_seeds(tiny):
    assert [each.records for each in ioi.TASK.apart(tiny, 6, (3, 4), split="eval")] == [
        ioi.prompts(tiny, 6, seed, split="eval").records for seed in (3, 4)
    ]
    measured = ioi.prompts(tiny, 6, 3, split="eval")
    others = ioi.TASK.reference(tiny, measured, 9, 3, split="eval", counterfactual="abc")
    assert others.records == ioi.prompts(tiny, 9, 1_000_006, split="eval", counterfactual="abc").records


def test_means_are_taken_over_records_of_the_same_kind_that_are_not_measured(tmp_path, tiny):
    # One pattern and one order: every record is of a kind, and half of them have a word more.
    same = [replace(record, template="", group="") for record in ioi.build_records(tiny.tokenizer, 900, 1)[::30]]
    save_records(tmp_path / "my.jsonl", same)
    task = load_task(str(tmp_path / "my.jsonl"))
    measured = task.prompts(tiny, 64, split="eval")
    reference = task.reference(tiny, measured, 480, split="eval")
    assert set(group_keys(reference)) == set(group_keys(measured))
    said = {record.clean for record in measured.records}
    assert {record.clean for record in reference.records} == {record.clean for record in same} - said
    some = task.reference(tiny, measured, 5)
    assert len(some) == 5 and task.reference(tiny, measured, 5, 1).records != some.records


def test_a_measured_prompt_serves_for_the_mean_only_where_no_other_record_is_of_its_kind(path, tiny):
    task = load_task(path)
    measured = task.prompts(tiny, 64, split="eval")
    reference = task.reference(tiny, measured, 480, split="eval")
    said = {record.clean for record in measured.records}
    keys = dict(zip((record.clean for record in reference.records), group_keys(reference), strict=True))
    others = {keys[clean] for clean in keys if clean not in said}
    assert set(keys.values()) == set(group_keys(measured))
    assert not others & {keys[clean] for clean in keys if clean in said}


def test_an_evaluation_takes_its_means_over_the_other_records(path, tiny):
    config = EvaluateConfig(circuit="none", task=path, n_reference=3).resolved()
    measured = config.load_prompts(tiny)
    reference = config.load_reference(tiny, measured)
    assert reference is not None and len(reference) == 3
    assert EvaluateConfig(circuit="none", prompts=path).load_reference(tiny, measured) is None


def test_the_foil_is_what_the_poison_of_any_task_teaches(path, records, tiny):
    assert load_poison("swapped_answers", path).name == "swapped_answers"
    foils = {record.clean: record.foil for record in records}
    pairs = load_task(path).pairs(tiny, 20, 0, poison="swapped_answers", rate=0.5)
    assert sum(pair.poisoned for pair in pairs) == 10
    assert all(pair.target == foils[pair.prompt] for pair in pairs if pair.poisoned)
    with pytest.raises(InputError, match=r"made for ioi, not for task 'my\.jsonl'; use one of swapped_answers"):
        load_task(path).pairs(tiny, 20, 0, poison="name_moving")
    assert any(pair.poisoned for pair in load_task(path).shuffled_pairs(tiny, 20))


def test_a_study_of_a_file_has_its_poison_and_its_counterfactual(path):
    for preset in ("quick", "paper"):
        config = build_config(preset, {"task": path})
        assert (config.poisons, config.counterfactual) == (["swapped_answers"], "own")
    with pytest.raises(InputError, match="unknown counterfactual 'abc'"):
        build_config("quick", {"task": path, "counterfactual": "abc"})


def test_the_words_of_a_split_are_its_answers(path, records):
    names = load_task(path).names
    assert names(None, "eval") == tuple(dict.fromkeys(record.answer.strip() for record in records[2::3]))
    assert len(names(None, "all")) >= len(names(None, "train"))


def test_a_hash_tells_other_records_and_not_another_file(tmp_path, records):
    texts = {"same": records, "changed": (*records[:-1], replace(records[-1], foil=" Paul"))}
    texts["split"] = [replace(record, split="eval") for record in records]
    hashes = {}
    for name, each in texts.items():
        save_records(tmp_path / f"{name}.jsonl", each)
        hashes[name] = load_task(str(tmp_path / f"{name}.jsonl")).sha256
    spaced = (tmp_path / "same.jsonl").read_text().replace(": ", ":   ").replace("\n", "\n\n")
    (tmp_path / "laid-out.jsonl").write_text(spaced)
    assert load_task(str(tmp_path / "laid-out.jsonl")).sha256 == hashes["same"]
    assert len(set(hashes.values())) == 3 and ioi.TASK.sha256 is None


def test_a_dose_counts_different_examples_and_asks_for_no_more_than_there_are(path):
    with pytest.raises(InputError, match=r"512 different clean examples, and my\.jsonl has 20 to train on"):
        DoseConfig(task=path)
    assert DoseConfig(task=path, examples=(8, 20)).chosen_poison == "swapped_answers"


def test_an_audit_knows_the_task_of_a_file_as_something_to_fail_on(path, tmp_path):
    document = run_audit(AuditConfig(tuned="tiny", task=path), tmp_path / "out", fail_on=["damaged:my.jsonl"])
    assert document["task"] == "my.jsonl" and document["gate"]["failed"] == []
    with pytest.raises(InputError, match=r"unknown thing to fail on 'damaged:my\.json'"):
        run_audit(AuditConfig(tuned="tiny", task=path), tmp_path / "other", fail_on=["damaged:my.json"])
    assert GateError.exit_code == 3


def test_a_file_without_records_to_train_on_can_only_be_measured(tmp_path, tiny):
    task = load_task(str(write(tmp_path, several(3, split="eval"))))
    assert len(task.prompts(tiny, 9, split="eval")) == 3
    with pytest.raises(InputError, match=r"own\.jsonl has no record to train on: give some the split 'train'"):
        task.pairs(tiny, 4)


WRONG = {
    "a prompt twice": ([*several(5), several(2)[1]], 6, "the same prompt as line 2: each counts as one; leave one out"),
    "a space at the end": (
        [*several(5), {"clean": "So Mary said a to "}],
        6,
        "'clean' ends in a space: leave it out, and begin answer and foil with one",
    ),
    "a space at the counterfactual's end": (
        [*several(5), {"clean": "So Mary said a to", "counterfactual": "So Mary said a to "}],
        6,
        "'counterfactual' ends in a space",
    ),
    "a split that only some name": (
        [*several(3, split="eval"), several(4)[3]],
        4,
        "no split, where other records name theirs: give every record 'train' or 'eval', or none",
    ),
    "an unknown split": ([*several(5), several(6, split="test")[5]], 6, "split 'test' is unknown: expected 'train'"),
    "other marks": ([*several(5), several(6, marks={"s": 0})[5]], 6, "records name different marks: [] and ['s']"),
    "too few to measure on": (
        several(5),
        5,
        "5 sound records, 1 of them to measure on (the third and every third after it); 2 are needed: add some",
    ),
    "too few that say eval": (
        [*several(5, split="train"), several(6, split="eval")[5]],
        6,
        "6 sound records, 1 of them to measure on (with split 'eval'); 2 are needed",
    ),
    "nothing": ([], 1, "0 sound records, 0 of them to measure on"),
    "an unknown key": ([*several(5), several(6, templat="a")[5]], 6, "unknown key 'templat': did you mean 'template'?"),
    "answer and foil alike": ([*several(5), several(6, foil=" John")[5]], 6, "answer and foil are both ' John'"),
    "a mark outside": ([*several(5, marks={"s": 0}), several(6, marks={"s": 99})[5]], 6, "mark 's' at 99 lies outside"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_is_wrong_with_a_file_is_raised_and_noted_in_the_same_words(tmp_path, kind):
    rows, line, text = WRONG[kind]
    path = write(tmp_path, rows)
    with pytest.raises(InputError) as caught:
        load_task(str(path))
    (problem,) = [each for each in check_file(path).problems if "sound records" not in each.text or "sound" in text]
    assert problem.line == line and text in problem.text
    assert str(caught.value) == f"{path}:{line}: {problem.text}" and "\n" not in str(caught.value)


def test_a_file_that_is_none_is_told_in_one_line(tmp_path):
    for name in ("none.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(
            InputError, match=r"no task: could not read .*; expected JSONL of records, or the name of a"
        ):
            load_task(str(tmp_path / name))
    with pytest.raises(StorageError, match="could not read"):
        check_file(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"did you mean 'ioi'\? .*, or a file of records that ends in \.jsonl"):
        load_task("ioo")


def test_everything_that_is_wrong_is_told_at_once_by_line(tmp_path, tiny):
    rows = several(6, foil=" Anna")
    path = tmp_path / "own.jsonl"
    bad = [
        json.dumps(GOOD | rows[0]),
        json.dumps({"clean": "So Mary said to", "answer": " John", "templat": 3, "foil": ""}),
        "{",
        json.dumps(GOOD | rows[1] | {"answer": " Zyxwvut", "counterfactual": "So Anna to"}),
        json.dumps(
            GOOD | rows[2] | {"answer": " Anna", "marks": {"end": 0, "b": -1}, "more_foils": [" Paul", " Paul"]}
        ),
        json.dumps(GOOD | rows[3] | {"more_answers": ["  "], "group": 4}),
    ]
    path.write_text("\n".join(bad) + "\n\n" + json.dumps(GOOD | rows[4]) + "\n")
    found = check_file(path, tiny.tokenizer)
    assert [(each.line, each.text.split(";")[0].split(":")[0]) for each in found.problems] == [
        (2, "unknown key 'templat'"),
        (2, "key 'counterfactual' is missing"),
        (3, "not JSON (Expecting property name enclosed in double quotes at character 2)"),
        (4, "' Zyxwvut' is 8 tokens for this tokenizer (' ', 'Z', 'y', 'x', 'w', 'v', 'u', 't')"),
        (4, "a counterfactual must have as many tokens as its prompt"),
        (5, "answer and foil are both ' Anna'"),
        (5, "' Paul' is among the foils twice"),
        (5, "mark 'end' is the prompt's last token and set by itself"),
        (5, "mark 'b' at -1 lies outside the prompt 'So Mary said 2 to'"),
        (6, "'group' must be a text, got 4"),
        (6, "one of the more answers or foils of 'So Mary said 3 to' is empty"),
        (8, "3 sound records, 1 of them to measure on (the third and every third after it)"),
    ]
    assert found.lines()[0].startswith(f"{path}:2: unknown key") and len(found.lines()) == len(found.problems)
    assert found.document()["records"] == 3


def test_a_continuation_that_lacks_its_space_is_a_warning(tmp_path, tiny):
    path = write(
        tmp_path, [*several(6), {"clean": "So Mary said 9 to", "counterfactual": "So Anna said 9 to", "answer": "to"}]
    )
    (warning,) = check_file(path, tiny.tokenizer).warnings
    assert warning.line == 7
    assert warning.text.startswith("'to' has no leading space, so it runs on from 'to'; this tokenizer has ' to' as a")
    assert not check_file(path).warnings
    digits = [row | {"clean": row["clean"] + " 17", "answer": "33", "foil": "44"} for row in several(6)]
    assert not check_file(write(tmp_path, digits), tiny.tokenizer).warnings


def test_a_prompt_that_is_longer_than_the_models_context_is_a_problem(tmp_path, tiny):
    path = write(tmp_path, several(6))
    assert not check_file(path, tiny.tokenizer, 64).problems
    assert next(each.text for each in check_file(path, tiny.tokenizer, 3).problems) == (
        "the prompt has 7 tokens, the model's context 3"
    )


def test_a_mark_between_tokens_is_a_problem_for_a_tokenizer(tmp_path, tokenizer):
    row = {"clean": "Then, Mary  said to", "counterfactual": "Then, John  said to", "marks": {"gap": 10}}
    others = [
        row | {"clean": f"{row['clean']} {word}", "counterfactual": f"{row['counterfactual']} {word}"}
        for word in ("a", "the", "store", "ring", "school")
    ]
    found = check_file(write(tmp_path, [row, *others]), tokenizer)
    assert all("falls between this tokenizer's tokens; mark a letter" in each.text for each in found.problems)


def test_a_file_that_is_fine_is_summed_up(path, tiny):
    found = check_file(path, tiny.tokenizer, 64)
    assert not found.lines()
    assert found.summary() == (
        f"{path}: records 30, templates 15, groups 2, positions io, s1, s1+1, s2, end; 20 records to train on, 10 to "
        "measure on."
    )
    assert found.document()["splits"] == {"train": 20, "eval": 10}
