import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from neuroplast.models.sources import load_model
from neuroplast.training.saves import save_checkpoint

FAST = ("--n-prompts", "4", "--n-drift", "2", "--n-random", "50")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints to hold against `tiny`: a damaged one, and some that cannot be."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {name: root / name for name in ("damaged", "nan", "shape", "tokenizer", "adapter")}
    model = load_model("tiny")
    with torch.no_grad():
        model.head_weights(1)[:] *= -1
    save_checkpoint(model, found["damaged"])
    with torch.no_grad():
        model.head_weights(2)[0, 0, :3] = torch.nan
    save_checkpoint(model, found["nan"])
    config = model.module.config.to_dict() | {"n_head": 4}
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(found["shape"])
    model.tokenizer.save_pretrained(found["shape"])
    shutil.copytree(found["damaged"], found["tokenizer"])
    words = found["tokenizer"] / "tokenizer.json"
    document = json.loads(words.read_text())
    vocabulary = document["model"]["vocab"]
    first, second = (word for word in vocabulary if word.endswith(("Mary", "John")))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    words.write_text(json.dumps(document))
    found["adapter"].mkdir()
    (found["adapter"] / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": str(root / "gone"), "r": 2, "target_modules": ["c_attn"]}
        )
    )
    (found["adapter"] / "adapter_model.safetensors").write_bytes(b"")
    return found


def test_compare_says_what_changed_and_where(run, folders: dict[str, Path], tmp_path: Path):
    code, text, _ = run("compare", "tiny", str(folders["damaged"]), "--out", str(tmp_path / "out"), *FAST)
    assert code == 0
    for said in ("LD after", "circuit's heads undo", "left over by the ledger", "undecided", "audit.html"):
        assert said in text
    code, text, err = run("compare", "tiny", str(folders["damaged"]), "--out", str(tmp_path / "out"), *FAST, "--json")
    assert code == 0 and err == "" and json.loads(text)["stored"]["ledger"]["error"] <= 0.01
    assert list(json.loads(text)["spared"]) == ["text"] and json.loads(text)["spared"]["text"]["status"] == "undefined"


def test_a_gate_that_says_no_exits_3_and_leaves_everything(run, folders: dict[str, Path], tmp_path: Path):
    words = ("audit", "tiny", str(folders["damaged"]), "--out", str(tmp_path / "out"), "--n-battery", "3", *FAST)
    code, text, err = run(*words, "--fail-on", "undecided")
    assert code == 3 and "failed on undecided" in err and "spared" in text
    assert (tmp_path / "out" / "junit.xml").read_text().count("<failure") == 1
    code, _, err = run(*words, "--fail-on", "corrupted")
    assert code == 2 and "a verdict takes 19 twins" in err
    assert run(*words)[0] == 0


def test_identical_checkpoints_are_nothing_changed(run, tmp_path: Path):
    code, text, _ = run("audit", "tiny", "tiny", "--out", str(tmp_path / "out"), "--fail-on", "corrupted")
    assert code == 0 and "Nothing changed" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "that are NaN or infinite"),
        ("shape", "a layer has"),
        ("tokenizer", "a prompt would not be the same tokens"),
        ("adapter", "gone"),
        ("nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line_and_exit_2(
    run, folders: dict[str, Path], tmp_path: Path, name: str, message: str
):
    other = str(folders.get(name, tmp_path / name))
    code, text, err = run("audit", "tiny", other, "--out", str(tmp_path / "out"), "--quiet", *FAST)
    assert code == 2 and text == "" and message in err
    assert err.startswith("error:") and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()
