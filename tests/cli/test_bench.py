import json
from pathlib import Path

WORDS = ("bench", "--prompts", "2", "--repeats", "1", "--no-peers", "--row", "heads-to-logits")


def test_a_table_is_printed_kept_and_compared_with(run, tmp_path: Path):
    file = tmp_path / "then.json"
    code, text, told = run(*WORDS, "--row", "criteria", "--out", str(file))
    assert code == 0 and "32 heads → logits, 2 prompts" in text and str(file) in text and "GFLOP/s" in text
    assert "none for heads-to-logits (peer), criteria (peer): peers were not asked for" in text
    code, text, err = run(*WORDS, "--against", str(file), "--json")
    document = json.loads(text)
    assert code == 0 and err == ""
    assert [row["name"] for row in document["rows"]] == ["heads-to-logits"] and "stage 1 of 3: warm-up" in told
    assert document["against"]["rows"]["heads-to-logits"]["ratio"] > 0
    assert {"date", "versions", "hardware", "model", "rate"} <= set(json.loads(file.read_text()))
    code, text, _ = run(*WORDS, "--against", str(file), "--quiet")
    assert code == 0 and "now ÷ then" in text and str(file) in " ".join(text.split())


def test_what_cannot_be_is_one_clear_line_and_exit_2(run, tmp_path: Path):
    for words, said in (
        (["--row", "heads-to-logit"], "did you mean 'heads-to-logits'"),
        (["--out", str(tmp_path)], "is a folder; expected a file"),
        (["--against", str(tmp_path / "none.json")], "could not read"),
        (["--model", "no/such"], "no/such"),
    ):
        code, out, err = run(*WORDS, *words)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
