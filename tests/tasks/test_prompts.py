import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neuroplast.errors import InputError, StorageError
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import (
    NO_TOKEN,
    build_prompt_set,
    encode_with_bos,
    keep_single_tokens,
    single_token,
)
from neuroplast.tasks.records import Record, load_records, save_records

GOOD = {"clean": "Mary said to", "counterfactual": "John said to", "answer": " Paul", "foil": " Anna"}


def load_one(folder, **changes):
    path = folder / "records.jsonl"
    path.write_text(json.dumps(GOOD | changes) + "\n")
    return load_records(path)


def test_records_survive_the_file(tmp_path, spaced):
    records = ioi.build_records(spaced, 12, 0)
    save_records(tmp_path / "prompts.jsonl", records)
    assert load_records(tmp_path / "prompts.jsonl") == records
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 12


def test_text_of_any_language_survives_the_file(tmp_path):
    record = Record("Zoë\u2028\nsaid “to”", "José\u2028\nsaid “to”", " 李", " 王", "päivä", "\t", {"s": 0})
    save_records(tmp_path / "a.jsonl", [record])
    assert load_records(tmp_path / "a.jsonl") == (record,)


def test_sets_of_answers_survive_the_file_and_leave_no_trace_where_there_are_none(tmp_path, spaced):
    plain = Record("Mary said to", "John said to", " Paul", " Anna")
    several = Record("Mary said to", "John said to", " Paul", " Anna", more_answers=(" Luke", " Ian"))
    save_records(tmp_path / "a.jsonl", [plain, several])
    assert load_records(tmp_path / "a.jsonl") == (plain, several)
    assert [sorted(json.loads(line)) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        ["answer", "clean", "counterfactual", "foil", "group", "marks", "template"],
        ["answer", "clean", "counterfactual", "foil", "group", "marks", "more_answers", "template"],
    ]
    prompts = build_prompt_set(spaced, "own", [plain, several])
    luke, ian = (single_token(spaced, name) for name in (" Luke", " Ian"))
    paul = int(prompts.answer[0])
    assert prompts.answers.tolist() == [[paul, NO_TOKEN, NO_TOKEN], [paul, luke, ian]]
    assert prompts.more_foils is None


def test_two_continuations_that_are_one_token_are_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "Paul": 2, "Anna": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    blind = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    record = Record("Anna", "Paul", " Paul", " Anna", more_foils=("  Anna",))
    with pytest.raises(InputError, match="two of the answers and foils of 'Anna' are one token"):
        build_prompt_set(blind, "own", [record])


def test_template_group_and_marks_may_be_left_out(tmp_path):
    (record,) = load_one(tmp_path)
    assert (record.template, record.group, record.marks) == ("", "", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": None}, "'clean' must be a text, got None"),
        ({"clean": 3}, "'clean' must be a text, got 3"),
        ({"clean": "  "}, "'clean' is empty"),
        ({"answer": ["a"]}, r"'answer' must be a text, got \['a'\]"),
        ({"answer": " Anna"}, "both ' Anna'"),
        ({"foil": "\ud800"}, "'foil' must be a text"),
        ({"template": 7}, "'template' must be a text, got 7"),
        ({"template": None}, "'template' must be a text, got None"),
        ({"group": {"a": 1}}, "'group' must be a text"),
        ({"marks": [1, 2]}, "'marks' must map names"),
        ({"marks": None}, "'marks' must map names"),
        ({"marks": {"io": "0"}}, "'marks' must map names"),
        ({"marks": {"io": True}}, "'marks' must map names"),
        ({"marks": {"io": 1.5}}, "'marks' must map names"),
        ({"marks": {"io": float("inf")}}, "'marks' must map names"),
        ({"marks": {"io": float("nan")}}, "'marks' must map names"),
        ({"marks": {"io": -1}}, "mark 'io' at -1 lies outside"),
        ({"marks": {"each": 0}}, "mark 'each' cannot be named in a selection"),
        ({"marks": {"3": 0}}, "mark '3' cannot be named"),
        ({"marks": {"": 0}}, "mark '' cannot be named"),
        ({"marks": {"a,b": 0}}, "mark 'a,b' cannot be named"),
        ({"marks": {"a+m0": 0}}, r"mark 'a\+m0' cannot be named"),
        ({"marks": {"io": 12}}, "mark 'io' at 12 lies outside"),
        ({"marks": {"io": 10**4000}}, "mark 'io' at 1000.* lies outside"),
        ({"marks": {"end": 3}}, "mark 'end' is the prompt's last token"),
        ({"more_answers": " Luke"}, "'more_answers' must be a list of texts, got ' Luke'"),
        ({"more_answers": None}, "'more_answers' must be a list of texts, got None"),
        ({"more_answers": [[" Luke"]]}, "'more_answers' must be a list of texts"),
        ({"more_foils": [" Luke", 3]}, "'more_foils' must be a list of texts"),
        ({"more_foils": ["\ud800"]}, "'more_foils' must be a list of texts"),
        ({"more_foils": {"a": " Luke"}}, "'more_foils' must be a list of texts"),
        ({"more_foils": [" "]}, "one of the more answers or foils of 'Mary said to' is empty"),
        ({"more_foils": [" Paul"]}, "both ' Paul'"),
        ({"more_foils": [" Anna"]}, "' Anna' is among the foils twice"),
        ({"more_answers": [" Luke"] * 10_000}, "' Luke' is among the answers twice"),
        ({"foul": " Anna"}, "unknown key 'foul': did you mean 'foil'\\? valid are answer, clean, "),
    ],
)
def test_a_bad_value_is_refused_with_the_record_and_the_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"records\.jsonl:1: .*{message}") as caught:
        load_one(tmp_path, **changes)
    assert len(str(caught.value)) < 500


def test_a_missing_text_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"clean": "x"}))
    with pytest.raises(InputError, match=r"a\.jsonl:2: key 'counterfactual' is missing: every record has clean, "):
        load_records(path)


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '"text"', "null", "[" * 200_000 + "]" * 200_000, '{"marks": ' + "1" * 5000 + "}"],
    ids=["half an object", "a list", "a text", "null", "nested deep", "a number of 5000 digits"],
)
def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:3: (not JSON|expected a JSON object)"):
        load_records(path)


def test_a_deeply_nested_value_is_refused_in_a_short_message(tmp_path):
    path = tmp_path / "a.jsonl"
    nested = "[" * 500 + "]" * 500
    path.write_text(json.dumps(GOOD)[:-1] + f', "marks": {{"io": {nested}}}}}')
    with pytest.raises(InputError, match="nested more than 100 levels deep") as caught:
        load_records(path)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"clean": "\xff"}')
    with pytest.raises(StorageError, match=r"could not read .*a\.jsonl"):
        load_records(path)


def test_a_mark_between_tokens_is_refused_by_name(tokenizer):
    record = Record("Then, Mary  said to", "Then, John  said to", " John", " Mary", marks={"gap": 10})
    ids = tokenizer(record.clean, return_offsets_mapping=True, add_special_tokens=False)
    if any(start <= 10 < end for start, end in ids["offset_mapping"]):
        assert build_prompt_set(tokenizer, "own", [record]).positions["gap"].item() > 0
    else:
        with pytest.raises(InputError, match="mark 'gap' in 'Then, Mary  said to' at character 10 falls between"):
            build_prompt_set(tokenizer, "own", [record])


def test_prompts_are_padded_on_the_right_and_end_is_the_last_real_token(tokenizer):
    records = [
        Record("Then, Mary and John went to", "Then, Paul and Anna went to", " John", " Mary"),
        Record("Mary said to", "Paul said to", " John", " Mary"),
    ]
    prompts = build_prompt_set(tokenizer, "own", records)
    for row, end, record in zip(prompts.clean, prompts.positions["end"], records, strict=True):
        ids = encode_with_bos(tokenizer, record.clean)
        assert row[: end + 1].tolist() == ids
    assert prompts.clean.shape == prompts.counterfactual.shape
    assert prompts.positions["end"][0] > prompts.positions["end"][1]


def test_bos_comes_first_where_there_is_one_and_shifts_the_positions(tokenizer):
    record = Record("Mary said to", "Paul said to", " John", " Mary", marks={"s": 0})
    prompts = build_prompt_set(tokenizer, "own", [record])
    bos = tokenizer.bos_token_id
    plain = tokenizer.encode(record.clean, add_special_tokens=False)
    assert prompts.clean[0].tolist() == ([] if bos is None else [bos]) + plain
    assert prompts.positions["s"].item() == (0 if bos is None else 1)


def test_a_slice_keeps_every_part_in_step(spaced):
    prompts = build_prompt_set(spaced, "ioi", ioi.build_records(spaced, 8, 0))
    part = prompts[2:5]
    assert len(part) == 3
    assert part.records == prompts.records[2:5]
    for whole, kept in ((prompts.clean, part.clean), (prompts.foil, part.foil)):
        assert torch.equal(whole[2:5], kept)
    assert all(torch.equal(prompts.positions[name][2:5], part.positions[name]) for name in prompts.positions)


def test_what_cannot_be_compared_is_refused(spaced):
    def build(*records):
        return build_prompt_set(spaced, "own", records)

    short = Record("Mary said to", "Mary said", " John", " Mary")
    marked = Record("Mary said to", "John said to", " John", " Mary", marks={"s": 0})
    plain = Record("Mary said to", "John said to", " John", " Mary")
    with pytest.raises(InputError, match="0 prompts"):
        build()
    with pytest.raises(InputError, match="as many tokens"):
        build(short)
    with pytest.raises(InputError, match="different marks"):
        build(marked, plain)


def test_a_continuation_must_be_one_known_token(spaced, tokenizer):
    assert spaced.decode([single_token(spaced, " Mary")]) == " Mary"
    with pytest.raises(InputError, match=r"is .* tokens|is unknown"):
        single_token(tokenizer, " Zyxwvut")


def test_words_the_tokenizer_splits_or_lacks_are_dropped(tokenizer):
    assert keep_single_tokens(tokenizer, ("Mary", "Zyxwvut", "store")) == ("Mary", "store")
