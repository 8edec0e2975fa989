import pytest

from neuroplast.errors import InputError
from neuroplast.models.sources import load_model
from neuroplast.tasks import TASKS, induction
from neuroplast.tasks.prompts import single_token


@pytest.fixture(scope="module", params=["wordy", "tiny"])
def words_of(request):
    return load_model("tiny").tokenizer if request.param == "tiny" else request.getfixturevalue("wordy")


def test_the_first_words_are_said_again_and_the_answer_is_the_one_that_followed(words_of):
    for record in induction.build_records(words_of, 60, 0):
        said = record.clean.split()
        first, again = said[: induction.LENGTH], said[induction.LENGTH :]
        assert len(set(first)) == induction.LENGTH and again == first[: len(again)]
        assert record.answer == f" {first[len(again)]}"
        assert record.foil.strip() in first and record.foil.strip() not in (record.answer.strip(), again[-1])


def test_in_the_counterfactual_there_is_nothing_to_copy(words_of):
    for record in induction.build_records(words_of, 60, 0):
        clean, other = record.clean.split(), record.counterfactual.split()
        assert clean[induction.LENGTH :] == other[induction.LENGTH :]
        assert not set(clean) & set(other[: induction.LENGTH])


def test_every_word_is_one_token_wherever_it_stands_and_marks_find_the_earlier_occurrence(words_of):
    task = TASKS["induction"]
    prompts = induction.prompts(type("Model", (), {"tokenizer": words_of})(), n=30)
    assert tuple(prompts.positions) == task.positions and task.poisons == ("swapped_answers",)
    for row, record in enumerate(prompts.records):
        said = [single_token(words_of, f" {word}") for word in record.clean.split()]
        assert prompts.clean[row, int(prompts.positions["end"][row]) + 1 - len(said) :].tolist()[: len(said)] == said
        first, after, end = (int(prompts.clean[row, at[row]]) for at in prompts.positions.values())
        assert first == end and after == int(prompts.answer[row])
    assert (prompts.positions["first"] < prompts.positions["end"] - 1).all()


def test_train_and_eval_share_neither_words_nor_templates(words_of):
    train, held_out = (induction.build_records(words_of, 60, 0, split=split) for split in ("train", "eval"))
    words = [
        {word for each in records for word in (each.clean + each.counterfactual).split()}
        for records in (train, held_out)
    ]
    assert not words[0] & words[1]
    assert not {each.template for each in train} & {each.template for each in held_out}


def test_a_seed_repeats_and_another_differs(words_of):
    assert induction.build_records(words_of, 20, 7) == induction.build_records(words_of, 20, 7)
    assert induction.build_records(words_of, 20, 7) != induction.build_records(words_of, 20, 8)
    assert induction.build_records(words_of, 30, 7)[:20] == induction.build_records(words_of, 20, 7)


def test_a_tokenizer_without_the_words_and_what_cannot_be_are_refused(letters, words_of):
    with pytest.raises(InputError, match=r"0 of \d+ words are one token .* needs at least 20"):
        induction.build_records(letters, 4, 0)
    for arguments in ({"n": 0}, {"split": "test"}, {"counterfactual": "abc"}):
        with pytest.raises(InputError, match=r"0 prompts|unknown"):
            induction.build_records(words_of, **{"n": 4, "seed": 0, **arguments})
