import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.tasks import build_prompt_set, load_records, load_task, save_records
from neuroplast.tasks.mib import COUNTERFACTUALS, REVISION, load_mib_ioi
from neuroplast.tasks.prompts import keep_fitting

TEMPLATE = "Then, {name_A} and {name_B} had a lot of fun at the {place}. {name_C} gave a {object} to"
SWAPPED = "Then, {name_B} and {name_A} had a long argument, and afterwards {name_C} said to"


def row(io: str = "John", s: str = "Mary", template: str = TEMPLATE, **changes) -> dict:
    """A row as the data set has it: of every counterfactual another prompt, with its own two names."""

    def fill(a: str, b: str, c: str) -> str:
        return template.format(name_A=a, name_B=b, name_C=c, place="school", object="ring")

    def broken(a: str, b: str, c: str) -> dict:
        return {"prompt": fill(a, b, c), "choices": [b, a], "answerKey": 0 if c == a else 1}

    names = {
        "abc": ("Paul", "Anna", "Luke"),
        "random_names": ("Paul", "Anna", "Paul"),
        "s1_io_flip": (io, s, s),
        "s2_io_flip": (s, io, io),
    }
    return (
        {
            "template": template,
            "metadata": {
                "indirect_object": io,
                "subject": s,
                "object": "ring",
                "place": "school",
                "random_a": "Paul",
                "random_b": "Anna",
                "random_c": "Luke",
            },
            "prompt": fill(s, io, s),
            "choices": [io, s],
            "answerKey": 0,
        }
        | {f"{kind}_counterfactual": broken(*names.get(kind, names["abc"])) for kind in COUNTERFACTUALS}
        | changes
    )


def copy_of(folder: Path, rows: list[dict], split: str = "train", kind: str = "json") -> Path:
    """A local copy of the data set, with the hub's layout."""
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    else:
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_row_becomes_a_record_whose_marks_are_found_in_its_text(tmp_path, kind):
    source = copy_of(tmp_path / "copy", [row(), row("Paul", "Anna", SWAPPED)], kind=kind)
    first, second = load_mib_ioi(source)
    assert first.clean == "Then, Mary and John had a lot of fun at the school. Mary gave a ring to"
    assert first.counterfactual == "Then, Mary and John had a lot of fun at the school. John gave a ring to"
    assert (first.answer, first.foil, first.template, first.group) == (" John", " Mary", TEMPLATE, "BABA")
    assert (second.answer, second.foil, second.group) == (" Paul", " Anna", "ABBA")
    for record, words in ((first, ("John", "Mary", "and", "Mary")), (second, ("Paul", "Anna", "had", "Anna"))):
        for word, (name, at) in zip(words, record.marks.items(), strict=True):
            assert record.clean.startswith(word, at), name
        assert record.marks["s2"] > record.marks["s1"]


def test_every_counterfactual_is_read_by_its_name_or_its_column(tmp_path):
    source = copy_of(tmp_path / "copy", [row()])
    texts = {kind: load_mib_ioi(source, counterfactual=kind)[0].counterfactual for kind in COUNTERFACTUALS}
    assert texts["abc"] == "Then, Paul and Anna had a lot of fun at the school. Luke gave a ring to"
    assert texts["s1_io_flip"] == "Then, John and Mary had a lot of fun at the school. Mary gave a ring to"
    (by_column,) = load_mib_ioi(source, counterfactual="abc_counterfactual")
    assert by_column.counterfactual == texts["abc"]


def test_a_split_is_read_by_its_name(tmp_path):
    source = copy_of(tmp_path / "copy", [row()])
    copy_of(source, [row("Paul", "Anna")], "test")
    assert [record.answer for split in ("train", "test") for record in load_mib_ioi(source, split=split)] == [
        " John",
        " Paul",
    ]
    with pytest.raises(InputError, match=r"split 'validation' of .*copy could not be read: .*validation"):
        load_mib_ioi(source, split="validation")


def test_a_folder_is_a_folder_whatever_it_is_called(tmp_path, monkeypatch):
    copy_of(tmp_path / "json", [row()])
    monkeypatch.chdir(tmp_path)
    assert len(load_mib_ioi("json")) == 1


def test_a_prompt_that_comes_twice_is_taken_once(tmp_path):
    again = row() | {"s2_io_flip_counterfactual": row()["abc_counterfactual"]}
    records = load_mib_ioi(copy_of(tmp_path / "copy", [row(), again, row("Paul", "Anna")]))
    assert [record.answer for record in records] == [" John", " Paul"]
    assert records[0].counterfactual.startswith("Then, Mary and John")


def test_records_that_a_tokenizer_lacks_are_left_out_and_the_others_are_a_task(tmp_path):
    people = ("Eric", "Fred", "Kate", "Lisa", "Luke", "Mark")
    rows = [row(), row("Zyxwvut", "Mary"), *(row(io, "Mary") for io in people)]
    model = load_model("tiny")
    records = load_mib_ioi(copy_of(tmp_path / "copy", rows))
    kept = keep_fitting(model.tokenizer, records)
    assert [record.answer for record in records if record not in kept] == [" Zyxwvut"]
    assert build_prompt_set(model.tokenizer, "mib", kept).positions["s2"].min() > 0
    save_records(tmp_path / "mib.jsonl", kept)
    assert load_records(tmp_path / "mib.jsonl") == kept
    assert len(load_task(str(tmp_path / "mib.jsonl")).prompts(model, 64, split="eval")) == 2


WRONG = {
    "no choices": ({"choices": None}, "expected the columns of mib-bench/ioi, got TypeError"),
    "no such column": ({"s2_io_flip_counterfactual": None}, "expected the columns of mib-bench/ioi, got TypeError"),
    "an answer that is none": ({"answerKey": 7}, "expected the columns of mib-bench/ioi, got IndexError"),
    "three choices": ({"choices": ["John", "Mary", "Anna"]}, "are not indirect object and subject"),
    "an answer from the end": ({"answerKey": -2}, "expected the columns of mib-bench/ioi, got IndexError"),
    "other names": ({"choices": ["Paul", "Mary"]}, "are not indirect object and subject"),
    "a prompt without them": (
        {"prompt": "Then, Mary and Johnny met. Mary said to"},
        "says the indirect object 'John' 0",
    ),
    "a subject that comes once": (
        {"prompt": "Then, Mary and John said to"},
        "the subject 'Mary' 1 times; expected 1 and",
    ),
    "an empty counterfactual": (
        {"s2_io_flip_counterfactual": {"prompt": " ", "choices": ["a", "b"], "answerKey": 0}},
        "'counterfactual' is empty",
    ),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_a_row_of_another_form_is_refused_by_its_number(tmp_path, kind):
    changes, message = WRONG[kind]
    rows = [row() | changes] if "choices" in kind or "column" in kind else [row(), row() | changes]
    with pytest.raises(InputError) as caught:
        load_mib_ioi(copy_of(tmp_path / "copy", rows))
    assert f"copy, train row {len(rows)}: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_set_with_other_columns_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(
        InputError, match=r"train row 1: expected the columns .* KeyError\('choices'\) from \['prompt'\]"
    ):
        load_mib_ioi(copy_of(tmp_path / "copy", [{"prompt": "Mary"}]))


def test_a_name_that_is_none_is_told_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="unknown split 'trian': did you mean 'train'"):
        load_mib_ioi(tmp_path, split="trian")
    with pytest.raises(InputError, match="unknown counterfactual 's2_io_flp': did you mean 's2_io_flip'"):
        load_mib_ioi(tmp_path, counterfactual="s2_io_flp")


def test_what_is_no_copy_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="is not a folder; expected a copy of the data set mib-bench/ioi"):
        load_mib_ioi(tmp_path / "none")
    with pytest.raises(InputError, match=r"split 'train' of .* could not be read: ") as caught:
        load_mib_ioi(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "train.json").write_text("[{]")
    with pytest.raises(InputError, match=r"split 'train' of .* could not be read: "):
        load_mib_ioi(tmp_path)


def test_a_script_beside_the_data_is_not_run(tmp_path):
    source = copy_of(tmp_path / "copy", [row()])
    (source / "copy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(InputError, match="could not be read: Dataset scripts are no longer supported"):
        load_mib_ioi(source)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_it_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("neuroplast.tasks.mib.hub_answers", lambda: False)
    with pytest.raises(InputError, match=f"'{REVISION}' is not at hand and could not be fetched: the hub cannot be"):
        load_mib_ioi()
    with pytest.raises(
        InputError, match=r"revision 'no such thing' is not at hand .*; give a folder with a copy of it"
    ):
        load_mib_ioi(revision="no such thing")


def test_the_hubs_copy_is_fetched_at_the_pinned_revision_and_read_like_any_folder(monkeypatch, tmp_path):
    asked = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(copy_of(tmp_path / "copy", [row()]))

    monkeypatch.setattr("neuroplast.tasks.mib.hub_answers", lambda: True)
    monkeypatch.setattr("neuroplast.tasks.mib.snapshot_download", fetch)
    assert len(load_mib_ioi()) == 1
    assert (asked["name"], asked["repo_type"], asked["revision"]) == ("mib-bench/ioi", "dataset", REVISION)
    assert not any(pattern.endswith(".py") for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]


def test_without_datasets_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"need the datasets package: pip install 'neuroplast\[mib\]'"):
        load_mib_ioi(copy_of(tmp_path / "copy", [row()]))


def test_nothing_of_a_copy_is_kept_in_the_users_cache(tmp_path):
    source = copy_of(tmp_path / "copy", [row()])
    program = "import sys; from neuroplast.tasks.mib import load_mib_ioi; print(len(load_mib_ioi(sys.argv[1])))"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program, str(source)], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert not [path for path in tmp_path.glob("home/**/*") if path.is_file()]
