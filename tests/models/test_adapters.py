import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import random_model
from lora import change_config, save_adapter
from neuroplast.errors import InputError
from neuroplast.models.adapters import merge_adapter
from neuroplast.models.sources import TINY, load_model, weights_sha256

TOKENS, AT = torch.tensor([[3, 5, 6, 7, 9, 2]]), torch.tensor([5])
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"REST": 2}, "alpha_pattern": {"FIRST$": 1}},
    "biases": {"bias": "all"},
    "modules": {"modules_to_save": ["LAST"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "layer": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def save_base(family: str, folder: Path) -> Path:
    """A random model with the tokenizer of `tiny`, as a folder."""
    random_model(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def change_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in TARGETS}


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    return save_adapter(bases["llama"], tmp_path / "adapter", target_modules=TARGETS["llama"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind"), [*product(TARGETS, KINDS), ("gpt2", "bias of B")])
def test_a_merged_adapter_gives_the_logits_of_peft(bases: dict[str, Path], tmp_path: Path, family: str, kind: str):
    first = "0.attn.c_attn" if family == "gpt2" else "0.self_attn.q_proj"
    text = json.dumps(KINDS.get(kind, {"lora_bias": True})).replace("REST", TARGETS[family][1]).replace("FIRST", first)
    options = json.loads(text.replace("LAST", "h.2.mlp" if family == "gpt2" else "layers.2.mlp"))
    folder = save_adapter(bases[family], tmp_path / "adapter", target_modules=TARGETS[family], **options)
    slow = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[family]), folder).eval()
    model = load_model(folder)
    wanted, base = slow(input_ids=TOKENS).logits[:, -1], load_model(bases[family]).logits(TOKENS, AT)
    torch.testing.assert_close(model.logits(TOKENS, AT), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - base).abs().max() > 0.01
    assert model.source == "adapter" and type(model.module).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")


def test_a_bias_of_b_without_a_place_in_the_base_is_refused(bases: dict[str, Path], tmp_path: Path):
    folder = save_adapter(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(InputError, match=r"does not fit its base .* because the base layer has no bias"):
        load_model(folder)


def test_a_merged_model_is_trained_and_saved_like_any_other(adapter: Path, tmp_path: Path):
    model = load_model(adapter)
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    model.module.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert weights_sha256(again) == weights_sha256(model)


def test_bfloat16_factors_are_added_in_float32(adapter: Path):
    exact, rough = load_model(adapter), load_model(adapter, dtype="bfloat16")
    for name, weight in exact.module.named_parameters():
        assert torch.equal(rough.module.get_parameter(name), weight.bfloat16())


def test_the_base_may_be_named_or_lie_beside_the_adapter(adapter: Path, bases: dict[str, Path], monkeypatch):
    wanted = weights_sha256(load_model(adapter))
    (adapter.parent / "base").symlink_to(bases["llama"])
    for name in ("../base", "base"):
        monkeypatch.chdir(adapter.parent if name == "base" else "/")
        change_config(adapter, base_model_name_or_path=name)
        assert weights_sha256(load_model(adapter)) == wanted
    of_tiny = save_adapter(TINY, adapter.parent / "of tiny", target_modules=["c_attn"], fan_in_fan_out=True)
    change_config(of_tiny, base_model_name_or_path="tiny")
    assert weights_sha256(load_model(of_tiny)) != weights_sha256(load_model("tiny"))


def test_an_adapter_on_the_hub_and_its_base_load_from_the_cache(adapter: Path, bases: dict[str, Path], tmp_path: Path):
    wanted = weights_sha256(load_model(adapter))
    change_config(adapter, base_model_name_or_path="someone/base")
    for name, folder in (("base", bases["llama"]), ("lora", adapter)):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    code = (
        "import neuroplast as npl; from neuroplast.models.sources import weights_sha256; "
        "model = npl.load_model('someone/lora'); print(model.source, weights_sha256(model))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["adapter", wanted], done.stderr


def test_which_modules_are_adapted_is_read_from_the_weights_where_the_config_has_an_expression(adapter: Path):
    wanted = weights_sha256(load_model(adapter))
    change_config(adapter, target_modules=r"(x+x+)+y|.*\.(q_proj|v_proj|down_proj)", exclude_modules="(.*a)*b")
    assert weights_sha256(load_model(adapter)) == wanted


def test_without_peft_it_is_said_what_to_install(adapter: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs the peft package: pip install 'neuroplast\[lora\]'"):
        load_model(adapter)


def test_an_unsafe_adapter_is_refused(adapter: Path):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors; other weight files are not read"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/folder", "/no/such/folder is not a folder"),
        ("no/such-model", "unknown model 'no/such-model'"),
        (".", "it is an adapter itself"),
        ("x" * 5000, "x"),
        ("\0", "unknown model"),
        ("a\nb", "unknown model"),
    ],
)
def test_a_base_that_is_not_there_is_one_clear_line(adapter: Path, name: str, reason: str, monkeypatch):
    monkeypatch.setattr("neuroplast.models.sources.hub_answers", lambda: False)
    change_config(adapter, base_model_name_or_path=name)
    with pytest.raises(InputError, match=r"adapter .* is of base model .*, which cannot be used: ") as caught:
        load_model(adapter)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_an_adapter_of_another_model_is_refused(adapter: Path, bases: dict[str, Path]):
    change_config(adapter, base_model_name_or_path=str(bases["gpt2"]))
    with pytest.raises(InputError, match=r"adapter .* does not fit its base .*q_proj") as caught:
        load_model(adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "LOHA"}, "is of the kind 'LOHA'; only LORA is read"),
        ({"peft_type": 3}, "is of the kind 3"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path = None"),
        ({"r": 0}, "r = 0"),
        ({"r": 10**9}, "its rank is 1000000000, and its factors have rank 3 at most"),
        ({"r": 4}, "expected (4,"),
        ({"r": "3"}, "r = '3'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"\\": 2}}, "does not fit its base"),
        ({"target_modules": ["q_proj", "(a+)+$"]}, "target_modules"),
        ({"target_modules": []}, "does not fit its base"),
        ({"target_modules": ["q_proj", "o_proj"]}, "lora_A.weight and 5 more are missing"),
        ({"target_modules": ["q_proj"]}, "the base has no place for"),
        ({"modules_to_save": ["lm_head"]}, "does not fit its base"),
        ({"trainable_token_indices": [3]}, "does not fit its base"),
        ({"trainable_token_indices": [10**6]}, "does not fit its base"),
        ({"init_lora_weights": "pissa"}, "begins with 'pissa', which changes the base's own weights"),
        ({"layer_replication": [[0, 2]]}, "has the option 'layer_replication'"),
        ({"alora_invocation_tokens": [1]}, "has the option 'alora_invocation_tokens'"),
        ({"target_parameters": ["w"]}, "has the option 'target_parameters'"),
        ({"of_tomorrow": True}, "has the option 'of_tomorrow'"),
        ({"revision": "abc"}, "revision = 'abc'"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(adapter: Path, options: dict, reason: str):
    change_config(adapter, **options)
    with pytest.raises(InputError, match="adapter ") as caught:
        load_model(adapter)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"peft_type": "LORA", "a": ' + b"[" * 100_000, b"{}"]
)
def test_a_damaged_config_is_one_clear_line(adapter: Path, content: bytes):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match="adapter ") as caught:
        load_model(adapter)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_damaged_weights_are_one_clear_line(adapter: Path):
    def spoil(weights):
        next(iter(weights.values()))[0, 0] = float("nan")

    change_weights(adapter, spoil)
    with pytest.raises(InputError, match=r"adapter .* is damaged: base_model.*holds 1 of \d+ numbers"):
        load_model(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(InputError, match=r"adapter .* is damaged"):
        load_model(adapter)


def test_weights_that_are_missing_or_strange_are_named(adapter: Path):
    change_weights(adapter, lambda weights: weights.update({"base_model.model.evil": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"the base has no place for base_model\.model\.evil"):
        load_model(adapter)

    def lose(weights):
        weights.pop("base_model.model.evil")
        weights.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")

    change_weights(adapter, lose)
    with pytest.raises(InputError, match=r"the weights .*layers\.1\.self_attn\.v_proj\.lora_B\.weight are missing"):
        load_model(adapter)


def test_an_adapter_that_parts_tied_embeddings_is_refused(bases: dict[str, Path], tmp_path: Path):
    module = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    assert module.lm_head.weight is module.transformer.wte.weight
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}
    folder = save_adapter(bases["gpt2"], tmp_path / "adapter", **options)
    with pytest.raises(InputError, match="it parts the unembedding from the embedding, which are one in the base"):
        load_model(folder)


def test_a_model_beside_its_adapter_is_refused(adapter: Path, bases: dict[str, Path]):
    (adapter / "model.safetensors").write_bytes((bases["llama"] / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="holds a model and an adapter of one"):
        load_model(adapter)


def test_what_peft_would_not_merge_is_found_out(adapter: Path, bases: dict[str, Path], monkeypatch):
    from neuroplast.models.adapters import load_adapter_config

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.get_delta_weight", lambda self, _: self.weight * 0)
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with pytest.raises(InputError, match="does not become weights: merged, its logits differ by"):
        merge_adapter(base, adapter, load_adapter_config(adapter))
