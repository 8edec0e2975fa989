import json
from dataclasses import replace
from pathlib import Path

import pytest

from neuroplast.models.sources import load_model
from neuroplast.tasks import Record, ioi, load_records, save_records

HOSTILE = ("<script>alert(1)</script>", "</script> ", "He said \"no' ", "שלום ", "$\\frac ", "&amp; {{ x }} ")
SMALL = {
    "n_prompts": 6,
    "circuit_stages": '["base"]',
    "follow_stages": "[]",
    "compare_stages": "[]",
    "circuit_random": 0,
    "circuit_edges": 0,
    "resamples": 100,
}


def hostile(n: int) -> list[Record]:
    """Records whose texts and names would break a page, a picture or a table that took them as they are."""
    tokenizer = load_model("tiny").tokenizer
    changed: list[Record] = []
    for number, record in enumerate(ioi.build_records(tokenizer, n, 0)):
        before = HOSTILE[number % len(HOSTILE)]
        changed.append(
            replace(
                record,
                clean=before + record.clean,
                counterfactual=before + record.counterfactual,
                marks={name: at + len(before) for name, at in record.marks.items()},
                template=f"</script><b>{'long' * 100}",
                group=("$\\frac", '"><img src=x onerror=alert(1)>', "עברית")[number // 2 % 3],
            )
        )
    return changed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_records(tmp_path / "my.jsonl", ioi.build_records(load_model("tiny").tokenizer, 12, 0))
    return tmp_path / "my.jsonl"


def study(run, task: Path, out: Path) -> tuple[int, str, str]:
    words = ["study", "--preset", "smoke", "--task", str(task), "--out", str(out)]
    return run(*words, *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")))


def test_a_study_of_a_hostile_file_runs_to_the_end_and_goes_on_wherever_the_file_lies(run, tmp_path: Path):
    name, out = 'my "own" <b>$\\frac.jsonl', tmp_path / "run"
    save_records(tmp_path / name, records := hostile(18))
    assert run("tasks", "--check", str(tmp_path / name), "--model", "tiny")[0] == 0
    code, text, err = study(run, tmp_path / name, out)
    assert code == 0 and "recovered/swapped_answers" in text
    assert f"{name} has 12 examples to train on, which are repeated: n_train asks for more" in err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["task"] == name
    assert str(tmp_path) not in (out / "summary.json").read_text() + (out / "plasticity.json").read_text()
    page = (out / "report.html").read_text()
    assert "<script>alert(1)" not in page and "<img src=x" not in page and "</script><b>" not in page
    measured = load_records(out / "prompts" / "measured.jsonl")
    trained = [json.loads(line)["prompt"] for line in (out / "prompts" / "tuned.jsonl").read_text().splitlines()]
    assert {record.clean for record in measured} == {record.clean for record in records[2::3]}
    assert len(trained) == 32 and not set(trained) & {record.clean for record in measured}

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).rename(moved := tmp_path / "elsewhere" / name)
    assert study(run, moved, out)[0] == 0
    assert json.loads((out / "summary.json").read_text()) == summary
    save_records(moved, [*records[:-1], replace(records[-1], group="another")])
    code, _, err = study(run, moved, out)
    assert code == 2 and err.count("error: ") == 1
    assert f"was begun with other records in {str(moved)!r}: put them back, or choose another --out" in err
    moved.rename(moved.with_name("other.jsonl"))
    code, _, err = study(run, moved.with_name("other.jsonl"), out)
    assert code == 2 and "its task is" in err and "this one's is 'other.jsonl'" in err


def test_a_file_is_trained_on_and_measured_by_the_other_commands(run, path: Path, tmp_path: Path):
    words = ["--task", str(path), "--n-train", "16", "--steps", "1", "--out", str(tmp_path / "t"), "--json"]
    assert run("train", "--poison", "swapped_answers", *words)[0] == 0
    pairs = [json.loads(line) for line in (tmp_path / "t" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 16 and len({pair["prompt"] for pair in pairs}) == 8
    code, text, err = run("patch", "--task", str(path), "--from", "heads@end", "--out", str(tmp_path / "p"))
    assert code == 0 and "over 4 prompts" in text
    assert "my.jsonl has 4 prompts for this, fewer than the 64 asked for: all of them are taken" in err
    code, _, err = run("patch", "--task", str(path), "--counterfactual", "abc", "--out", str(tmp_path / "q"))
    assert code == 2 and "unknown counterfactual 'abc': valid are own" in err


def test_a_file_that_is_fine_is_summed_up(run, path: Path):
    code, text, err = run("tasks", "--check", str(path), "--model", "tiny")
    assert code == 0 and err == ""
    assert text == (
        f"{path}: records 12, templates 12, groups 2, positions io, s1, s1+1, s2, end; 8 records to train on, 4 to "
        "measure on.\nAll fit tiny.\n"
    )
    assert "Whether they fit a model's tokenizer: --model NAME." in run("tasks", "--check", str(path))[1]
    code, text, _ = run("tasks", "--check", str(path), "--json")
    document = json.loads(text)
    assert code == 0 and document["splits"] == {"train": 8, "eval": 4}
    assert (document["model"], document["problems"], document["positions"]) == (None, [], [*ioi.TASK.positions])


def test_all_that_is_wrong_with_a_file_is_told_and_the_command_exits_2(run, path: Path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "{", "", lines[0], '{"[red]": 1}']) + "\n")
    code, text, err = run("tasks", "--check", str(path))
    told = text.splitlines()
    assert code == 2 and err == f"error: {path} has 7 problems: mend them\n"
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in told] == ["13", "15", *["16"] * 5]
    assert told[1] == f"{path}:15: the same prompt as line 1: each counts as one; leave one out"
    assert "unknown key '[red]'" in told[2]
    code, text, _ = run("tasks", "--check", str(path), "--json")
    assert code == 2 and [each["line"] for each in json.loads(text)["problems"]][:2] == [13, 15]
    code, _, err = run("tasks", "--check", str(path.with_name("none.jsonl")))
    assert code == 2 and "could not read" in err and err.count("\n") == 1
    path.write_text("\n".join([*lines, "{"]))
    assert run("tasks", "--check", str(path))[2] == f"error: {path} has 1 problem: mend it\n"


def mib_copy(folder: Path) -> Path:
    """Two rows with the columns of MIB's data set; the second has a name that no tokenizer has."""
    rows = []
    for io in ("John", "Zyxwvut"):
        clean = f"Then, Mary and {io} went to the school. Mary gave a ring to"
        rows.append(
            {
                "template": "Then, …",
                "metadata": {"indirect_object": io, "subject": "Mary"},
                "prompt": clean,
                "choices": [io, "Mary"],
                "answerKey": 0,
                "s2_io_flip_counterfactual": {"prompt": clean.replace(". Mary", f". {io}")},
                "abc_counterfactual": {"prompt": "Then, Anna and Luke went to the school. Paul gave a ring to"},
            }
        )
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def test_mibs_prompts_are_written_for_the_commands_to_take(run, tmp_path: Path):
    source = str(mib_copy(tmp_path / "copy"))
    out = tmp_path / "mib.jsonl"
    code, text, _ = run("tasks", "--mib", str(out), "--source", source, "--split", "test", "--model", "tiny")
    assert code == 0 and text == f"{out}: 1 records of MIB; 1 do not fit tiny\n"
    assert load_records(out)[0].counterfactual == "Then, Mary and John went to the school. John gave a ring to"
    assert run("patch", "--prompts", str(out), "--from", "heads@s2", "--out", str(tmp_path / "p"))[0] == 0
    code, _, err = run("tasks", "--mib", str(out), "--source", source)
    assert code == 2 and f"{out} exists: choose another name, or remove it" in err
    words = ["--source", source, "--split", "test", "--counterfactual", "abc", "--json"]
    code, text, _ = run("tasks", "--mib", str(tmp_path / "abc.jsonl"), *words)
    assert code == 0 and json.loads(text) == {"file": str(tmp_path / "abc.jsonl"), "records": 2, "left_out": 0}
    rows = json.loads((tmp_path / "copy" / "test.json").read_text())
    (tmp_path / "copy" / "test.json").write_text(json.dumps(rows[1:]))
    words = ["--source", source, "--split", "test", "--model", "tiny"]
    code, _, err = run("tasks", "--mib", str(tmp_path / "none.jsonl"), *words)
    assert code == 2 and "none of MIB's 1 prompts fits the tokenizer of tiny" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "a.jsonl", "--mib", "b.jsonl"], "--check reads a file and --mib writes one: give one of them"),
        (["--check", "a.jsonl", "--split", "test"], "--split is for --mib"),
        (["--counterfactual", "abc"], "--counterfactual is for --mib"),
        (["--model", "tiny"], "--model is for --check and --mib"),
        (["--mib", "b.jsonl", "--split", "tset"], "unknown split 'tset': did you mean 'test'?"),
        (["--mib", "b.jsonl", "--source", "none"], "none is not a folder"),
        (["--check", "a.jsonl", "--model", "tinny"], "unknown model 'tinny': did you mean 'tiny'?"),
    ],
)
def test_options_that_contradict_each_other_are_one_clear_line(run, words: list[str], message: str):
    code, out, err = run("tasks", *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_task_that_is_no_file_is_one_clear_line(run, tmp_path: Path):
    for command in (["study"], ["train"], ["patch"], ["audit", "tiny", "tiny"], ["repair", "tiny", "tiny"], ["dose"]):
        code, _, err = run(*command, "--task", "none.jsonl", "--out", str(tmp_path / "out"))
        assert code == 2 and "no task: could not read none.jsonl" in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_list_of_tasks_says_how_to_have_ones_own(run):
    assert "A JSONL file of your own records is a task as well" in run("tasks")[1]
