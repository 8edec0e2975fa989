import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forked import run_forked
from left_out import without_report
from neuroplast import cli
from neuroplast.training.finetune import finetune


def run_interrupted(words: list[str], at: int) -> None:
    """Runs a command line that gets the signal of Ctrl-C at the end of a training step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    follower, left = finetune.__globals__["_Follower"], [at]
    former = follower.on_step_end

    def interrupted(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return former(*args, **kwargs)

    follower.on_step_end = interrupted
    sys.argv = ["neuroplast", *words]
    cli.main()


def test_a_study_prints_its_story_and_its_paths(run, tmp_path: Path):
    out = tmp_path / "run"
    words = ["study", "--preset", "smoke", "--set", "n_prompts=6", "--out", str(out)]
    words += ["--set", "circuit_stages=[]", "--set", "compare_stages=[]"]
    code, text, progress = run(*words)
    assert code == 0
    assert "recovered/subject_duplication" in text and str(out / "report.html") in text
    assert "stage 5 of 5: recovered/subject_duplication" in progress
    code, again, err = run(*words, "--json")
    assert code == 0 and err == ""
    assert json.loads(again) == json.loads((out / "summary.json").read_text())
    code, text, _ = run("report", str(out), "--json")
    assert json.loads(text) == {"report": str(out / "report.html")}


def test_models_and_tasks_are_listed(run):
    code, text, _ = run("models", "--json")
    assert code == 0
    assert {row["name"]: row["cached"] for row in json.loads(text)}["tiny"] is True
    code, text, _ = run("tasks", "--json")
    assert json.loads(text)[0]["poisons"] == ["subject_duplication", "name_moving", "duplication"]
    assert run("models")[0] == run("tasks")[0] == 0


def test_train_writes_a_checkpoint(run, tmp_path: Path):
    code, text, _ = run("train", "--steps", "1", "--n-train", "16", "--out", str(tmp_path / "t"), "--json")
    assert code == 0
    assert (Path(json.loads(text)["checkpoint"]) / "model.safetensors").is_file()


def bad_folder(tmp_path: Path) -> str:
    (tmp_path / "empty").mkdir(exist_ok=True)
    return str(tmp_path / "empty")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tinny"], "unknown model 'tinny': did you mean 'tiny'?"),
        (["--model", "EMPTY"], "is no Hugging Face model folder: it has no config.json"),
        (["--model", "./nowhere"], "is not a folder"),
        (["--model", "x" * 300], "names no model: File name too long"),
        (["--model", "~nobody-of-this-name/model"], "names no model"),
        (["--task", "ioo"], "unknown task 'ioo': did you mean 'ioi'?"),
        (["--poison", "name_movin"], "unknown poison 'name_movin': did you mean 'name_moving'?"),
        (["--set", "bach_size=3"], "unknown key 'bach_size': did you mean 'batch_size'?"),
        (["--set", "rate=2"], "rate = 2"),
        (["--set", "n_prompts=0"], "n_prompts = 0"),
        (["--device", "cuda"], "no usable CUDA device"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--device", "meta"], "unknown device 'meta'"),
        (["--model", "gpt2"], "model 'gpt2' is not at hand and the hub cannot be reached"),
        (["--out", "x" * 300], "--out cannot be used: File name too long"),
        (["--out", "x/" * 3000], "--out cannot be used: File name too long"),
        (["--out", f"{__file__}/run"], "a file or a broken link stands in its way"),
        (["--set", "n_train=1000000000000"], "n_train = 1000000000000"),
        (["--preset", "quik"], "unknown preset 'quik': did you mean 'quick'?"),
        (["--config", "none.toml"], "could not read none.toml"),
        (["--no-such-option"], "No such option"),
        (["--seed", "one"], "Invalid value for '--seed'"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(run, tmp_path: Path, words: list[str], message: str):
    words = [bad_folder(tmp_path) if word == "EMPTY" else word for word in words]
    code, out, err = run("study", "--preset", "smoke", "--out", str(tmp_path / "run"), *words)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_too_few_names_is_one_clear_line(run, tmp_path: Path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({chr(code): code for code in range(33, 127)}, [], unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(tmp_path / "model")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code, _, err = run("study", "--preset", "smoke", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"))
    assert code == 2 and "names" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_path_that_looks_like_markup_is_printed_as_it_is(run, tmp_path: Path):
    out = tmp_path / "[red]x[/x]"
    code, text, _ = run("train", "--steps", "1", "--n-train", "16", "--out", str(out))
    assert code == 0 and str(out / "checkpoint") in text


def test_an_interrupted_study_says_how_to_go_on_and_goes_on(run, tmp_path: Path):
    words = ["study", "--preset", "smoke", "--out", str(tmp_path / "run"), "--quiet"]
    words += ["--set", "circuit_stages=[]", "--set", "compare_stages=[]"]
    code, out, err = run_forked(lambda: run_interrupted(words, 4), tmp_path)
    told = f"interrupted; what is finished is kept. Go on with: {shlex.join(['neuroplast', *words])}"
    assert (code, out, err) == (1, "", f"error: {told}\n")
    with without_report():
        assert run(*words)[0] == 0 and (tmp_path / "run" / "summary.json").is_file()


def test_the_package_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "neuroplast", "tasks", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["name"] == "ioi"


def test_without_a_command_the_help_is_shown(run):
    code, text, err = run()
    assert code == 0 and "study" in text and err == ""


def test_a_report_of_no_run_is_one_clear_line(run, tmp_path: Path):
    code, _, err = run("report", str(tmp_path))
    assert code == 2 and err.count("\n") == 1


def test_the_front_door_loads_no_torch_and_help_is_quick():
    probe = "import sys, neuroplast; assert dir(neuroplast); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
    probe = "import sys, neuroplast.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_every_name_of_the_front_door_opens():
    import neuroplast

    for name in neuroplast.__all__:
        assert getattr(neuroplast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = neuroplast.nothing


def test_a_patch_prints_its_largest_effects_and_its_paths(run, tmp_path: Path):
    words = ["patch", "--n-prompts", "4", "--from", "heads@end", "--from", "m0", "--out", str(tmp_path)]
    code, text, _ = run(*words)
    assert code == 0 and "share of LD" in text and "15 of 33 rows" in text
    assert all(str(tmp_path / f"effects.{name}") in text for name in ("safetensors", "csv", "png"))
    code, text, err = run(*words, "--json")
    summary = json.loads(text)
    assert code == 0 and err == "" and summary["method"] == "path" and len(summary["top"]) == 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "eapp"], "unknown method 'eapp': did you mean 'eap'?"),
        (["--to", "a3.h1<q>@s9"], "unknown position 's9'"),
        (["--memory", "lots"], "'lots' is no amount of memory"),
        (["--memory", "10MB"], "a memory budget of 9.5 MiB cannot be kept"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--n-prompts", "0"], "0 prompts: a measurement needs at least 1"),
        (["--out", "x" * 300], "--out cannot be used: File name too long"),
        (["--out", f"{__file__}/run"], "a file or a broken link stands in its way"),
        (["--prompts", __file__], "setting 'n_prompts' (--n-prompts) is for the task's prompts"),
        (["--device", "cuda"], "no usable CUDA device"),
    ],
)
def test_a_patch_that_cannot_be_is_one_clear_line_and_exit_2(run, tmp_path: Path, words, message: str):
    code, out, err = run("patch", "--n-prompts", "2", "--out", str(tmp_path / "out"), *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert "10MB" in words or not (tmp_path / "out").exists()
