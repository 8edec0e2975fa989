"""A stranger's folder: whatever it holds, nothing of it is run or written; it is a model or one clear line."""

import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora import change_config, save_adapter
from neuroplast.errors import InputError
from neuroplast.models import sources
from neuroplast.models.sources import TINY, load_model, weights_sha256

TOUCH = "from pathlib import Path\nPath({!r}).write_text('was run')\n"
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel")


class Trap:
    """A folder with the files of `tiny`, something outside of it, and the mark of anything that was run."""

    def __init__(self, sandbox: Path) -> None:
        self.folder, self.mark, self.outside = sandbox / "model", sandbox / "mark", sandbox / "outside"
        for folder in (self.folder, self.outside):
            folder.mkdir()
            for file in TINY.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())

    def change(self, name: str, **entries: Any) -> None:
        path = self.folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))

    def code(self, name: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(TOUCH.format(str(self.mark)))

    def pickled(self, name: str) -> None:
        (self.folder / name).write_bytes(pickle.dumps(Pickled(str(self.mark))))

    def link(self, name: str, to: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).symlink_to(self.outside / to)

    def index(self, shard: Any, **others: Any) -> None:
        (self.folder / "model.safetensors").rename(self.folder / "model-1.safetensors")
        self.change("model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard}, **others)


class Pickled:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (TOUCH.format(self.mark),)


def auto_map(trap: Trap) -> None:
    for name in ("modeling_x.py", "tokenization_x.py", "custom_generate/generate.py", "__init__.py", "conftest.py"):
        trap.code(name)
    trap.change("config.json", auto_map=dict.fromkeys(CLASSES, "modeling_x.X"))
    trap.change("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    trap.change("generation_config.json", custom_generate="custom_generate/generate.py", trust_remote_code=True)


def pickles(trap: Trap) -> None:
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.bin", "tokenizer.pkl", "training_args.bin"):
        trap.pickled(name)


def unknown_tokenizer(trap: Trap) -> None:
    trap.code("tokenization_x.py")
    trap.change("tokenizer_config.json", tokenizer_class="XTokenizer", auto_map={"AutoTokenizer": "tokenization_x.X"})


def old_paths(trap: Trap) -> None:
    trap.change("tokenizer_config.json", tokenizer_file="/nowhere/tokenizer.json", name_or_path="/etc")


def template(trap: Trap) -> None:
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(999999999) %}x{% endfor %}"
    trap.change("tokenizer_config.json", chat_template=hostile)
    (trap.folder / "chat_template.jinja").write_text(hostile)


def tokens(trap: Trap) -> None:
    long = {"content": "x" * 10**6, "lstrip": 0, "rstrip": 0, "normalized": 0, "single_word": 0, "special": 1}
    trap.change("tokenizer_config.json", added_tokens_decoder={"9999999": long, "-1": long})


def cycle(trap: Trap) -> None:
    (trap.folder / "chat_template.jinja").symlink_to("chat_template.jinja")


SOUND: dict[str, Callable[[Trap], object]] = {
    "code by auto_map": auto_map,
    "pickles beside safetensors": pickles,
    "a tokenizer of an unknown class": unknown_tokenizer,
    "paths of another machine": old_paths,
    "a hostile chat template": template,
    "a quantisation of nobody's": lambda t: t.change("config.json", quantization_config={"quant_method": "evil"}),
    "a link inside": lambda t: (t.folder / "vocab.txt").symlink_to("tokenizer.json"),
}
REFUSED: dict[str, tuple[str, Callable[[Trap], object]]] = {
    "a pickle alone": (
        "holds no .*safetensors",
        lambda t: (pickles(t), (t.folder / "model.safetensors").unlink()),
    ),
    "a pickle by another name": ("could not be loaded", lambda t: t.pickled("model.safetensors")),
    "weights that are a link out": (
        "model.safetensors is a link",
        lambda t: t.link("model.safetensors", "model.safetensors"),
    ),
    "a tokenizer that is a link out": (
        "tokenizer.json is a link",
        lambda t: t.link("tokenizer.json", "tokenizer.json"),
    ),
    "templates that are a link out": (
        "additional_chat_templates is a link",
        lambda t: t.link("additional_chat_templates", "."),
    ),
    "a link round and round": ("could not be loaded", cycle),
    "a pipe": ("no regular file", lambda t: os.mkfifo(t.folder / "generation_config.json")),
    "shards elsewhere": ("expected one in the folder itself", lambda t: t.index("../outside/model.safetensors")),
    "shards by an absolute path": ("in the folder itself", lambda t: t.index(str(t.outside / "model.safetensors"))),
    "shards that are pickles": ("only safetensors", lambda t: (t.pickled("x.bin"), t.index("x.bin"))),
    "shards that are not there": ("not in the folder", lambda t: t.index("model-2.safetensors")),
    "shards that are numbers": ("in the folder itself", lambda t: t.index(3)),
    "an index that is a list": (
        "expected a JSON object, got list",
        lambda t: (t.folder / "model.safetensors.index.json").write_text("[]"),
    ),
    "other weights by name": (
        "in the folder itself",
        lambda t: t.change("config.json", transformers_weights="../outside/model.safetensors"),
    ),
    "attention from the hub": ("code from elsewhere", lambda t: t.change("config.json", attn_implementation="evil/x")),
    "attention by a part": (
        "code from elsewhere",
        lambda t: t.change("config.json", text_config={"_attn_implementation": {"": "evil/x@main:f"}}),
    ),
    "a billion layers": ("1000 is the most", lambda t: t.change("config.json", n_layer=10**9)),
    "a deep configuration": (
        "levels deep",
        lambda t: (t.folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000),
    ),
    "a large configuration": ("is the most that is read", lambda t: t.change("config.json", x="x" * 2**20)),
    "a vocabulary elsewhere": (
        "outside of the folder",
        lambda t: t.change("tokenizer_config.json", vocab_file=str(t.outside / "tokenizer.json")),
    ),
    "merges elsewhere": (
        "outside of the folder",
        lambda t: t.change("tokenizer_config.json", merges_file="../outside/config.json"),
    ),
    "another tokenizer": (
        "fast_tokenizer_files names another tokenizer",
        lambda t: t.change("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"]),
    ),
    "another configuration": (
        "configuration_files names another configuration",
        lambda t: (
            t.link("config.4.0.0.json", "config.json"),
            t.change("config.json", configuration_files=["config.4.0.0.json"]),
        ),
    ),
    "arguments of a tokenizer": (
        "init_inputs",
        lambda t: t.change("tokenizer_config.json", init_inputs=["/etc/passwd"]),
    ),
    "giant tokens": ("could not be loaded", tokens),
    "a tokenizer of nothing": (
        "could not be loaded",
        lambda t: (t.folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "../x"}}'),
    ),
    "sizes that are texts": ("could not be loaded", lambda t: t.change("config.json", n_embd="../x")),
}


def content_of(sandbox: Path) -> dict[str, str]:
    """Everything in a folder, links as such."""
    found: dict[str, str] = {}
    for path in sorted(sandbox.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    return found


def load_watched(sandbox: Path, name: Path) -> str:
    """The hash of the weights, or what is said; nothing else has changed."""
    before, modules = content_of(sandbox), set(sys.modules)
    try:
        outcome = weights_sha256(load_model(name))
    except InputError as error:
        outcome = str(error)
    assert content_of(sandbox) == before and not (sandbox / "mark").exists()
    assert not [each for each in set(sys.modules) - modules if "transformers_modules" in each]
    assert "\n" not in outcome
    return outcome


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    monkeypatch.chdir(tmp_path)
    return Trap(tmp_path)


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_never_looked_at_leaves_a_model_that_is_sound(trap: Trap, tmp_path: Path, kind: str):
    SOUND[kind](trap)
    assert load_watched(tmp_path, trap.folder) == weights_sha256(load_model("tiny"))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_trap_is_refused_in_one_line_and_nothing_is_run_or_written(trap: Trap, tmp_path: Path, kind: str):
    said, set_it = REFUSED[kind]
    set_it(trap)
    assert re.search(said, load_watched(tmp_path, trap.folder))


def test_an_adapter_of_a_base_elsewhere_runs_nothing_either(trap: Trap, tmp_path: Path):
    auto_map(trap)
    folder = save_adapter(TINY, tmp_path / "adapter", target_modules=["c_attn"])
    (folder / "evil.py").write_text(TOUCH.format(str(trap.mark)))
    change_config(
        folder,
        base_model_name_or_path="../model",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        parent_library="evil",
    )
    plain = weights_sha256(load_model("tiny"))
    assert len(outcome := load_watched(tmp_path, folder)) == len(plain) and outcome != plain
    (folder / "adapter_model.safetensors").rename(trap.outside / "adapter")
    (folder / "adapter_model.safetensors").symlink_to(trap.outside / "adapter")
    assert "adapter_model.safetensors is a link that leads out" in load_watched(tmp_path, folder)


def test_the_links_of_the_hubs_own_cache_are_followed_into_their_repository_alone(trap: Trap, tmp_path: Path):
    repository = tmp_path / "models--someone--small"
    (snapshot := repository / "snapshots" / "main").mkdir(parents=True)
    (blobs := repository / "blobs").mkdir()
    for number, file in enumerate(sorted(trap.folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (link := tmp_path / "link").symlink_to(snapshot)
    assert load_watched(tmp_path, link) == weights_sha256(load_model("tiny"))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(trap.outside / "config.json")
    assert "config.json is a link that leads out of the folder" in load_watched(tmp_path, link)


def test_what_the_hub_sent_is_looked_at_before_it_is_loaded(
    trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trap.change("config.json", attn_implementation="evil/x")
    monkeypatch.setattr(sources, "snapshot_download", lambda name, **options: str(trap.folder))
    monkeypatch.setattr(sources, "find_adapter_config_file", lambda name, **options: None)
    with pytest.raises(InputError, match="may be code from elsewhere"):
        load_model("someone/small")
