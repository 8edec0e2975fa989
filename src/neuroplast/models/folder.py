"""A model's folder is a stranger's: its files are looked at before `transformers` reads them.

`transformers` is told to take safetensors alone and to run no code that comes with a model. What is left is checked:

- A file that is read may be no link that leads out of the folder. The hub's own cache is made of links, from
  `snapshots/REVISION` into the `blobs` of the same repository, and those are followed.
- JSON files are objects, of a size and a depth that their kind has.
- Names of other files (the shards of an index, the files that a tokenizer names) stay in the folder.
- A configuration may ask for an attention of its own, by the name of a repository whose code would be fetched and run;
  only those that `transformers` brings are let through.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from neuroplast.errors import InputError, first_line
from neuroplast.links import first_leading_out
from neuroplast.reading import parse_json, read_text, require_size

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_MIB = 2**20
LARGEST: Mapping[str, int] = {
    CONFIG: _MIB,
    "generation_config.json": _MIB,
    "adapter_config.json": _MIB,
    INDEX: 64 * _MIB,
    "tokenizer.json": 256 * _MIB,
    TOKENIZER_CONFIG: 16 * _MIB,
    "special_tokens_map.json": 16 * _MIB,
    "added_tokens.json": 16 * _MIB,
    "vocab.json": 64 * _MIB,
    "chat_template.json": _MIB,
}
"""Bytes of the largest file of each name; all of them hold JSON objects."""
LARGEST_TEXT = 64 * _MIB
"""Bytes of the largest other file that a tokenizer reads: merges, a chat template."""
TEXTS = (".jinja", ".txt", ".model", ".tiktoken")
"""How the names of those end."""
WEIGHTS = ".safetensors"
CHAT_TEMPLATES = "additional_chat_templates"

ATTENTIONS = (None, "eager", "sdpa", "flex_attention")
"""What a configuration may ask for; what is measured has an attention of our own, whatever it says."""
MOST_LAYERS, MOST_EXPERTS = 1000, 10_000
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), MOST_LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), MOST_EXPERTS),
}
"""What is built part by part before any weight is looked at."""


def check_folder(folder: Path, *, whole: bool = True) -> None:
    """Looks at the files of a folder that `transformers` will read.

    Args:
        folder: with a model, or an adapter of one.
        whole: whether its weights are there already.

    Raises:
        InputError: naming the file that is not read, and why.
    """
    _require_own(folder)
    for path in _files(folder):
        try:
            if path.suffix in TEXTS:
                require_size(path, LARGEST_TEXT)
            elif path.name in LARGEST:
                document = parse_json(read_text(path, LARGEST[path.name]), strict=False)
                if not isinstance(document, dict):
                    raise ValueError(f"expected a JSON object, got {type(document).__name__}")
                _check_document(path, cast(Any, document), whole)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} could not be loaded: its {path.name} is refused: {first_line(error)}"
            ) from error


def _files(folder: Path) -> Iterator[Path]:
    """Everything in a folder that may be read."""
    for path in sorted(folder.iterdir()):
        if path.name in LARGEST or path.suffix in (*TEXTS, WEIGHTS):
            yield path
    if (templates := folder / CHAT_TEMPLATES).is_dir():
        yield templates
        yield from sorted(templates.glob("*.jinja"))


def _require_own(folder: Path) -> None:
    """Refuses links that lead out of a folder; those of the hub's cache may lead to the files of their repository."""
    own = folder.resolve()
    within = [own]
    if own.parent.name == "snapshots" and own.parents[1].name.startswith("models--"):
        within.append(own.parents[1] / "blobs")
    if found := first_leading_out(_files(own), within):
        raise InputError(
            f"{folder} could not be loaded: its {found.name} is a link that leads out of the folder; "
            "put the file itself there, or name the folder that has it"
        )


def _check_document(path: Path, document: Mapping[str, Any], whole: bool) -> None:
    """Looks at what one of the files says.

    Raises:
        ValueError: saying what it may not say.
    """
    if path.name == INDEX:
        _check_index(document, path.parent if whole else None)
    elif path.name == CONFIG:
        _check_config(document)
    elif path.name == TOKENIZER_CONFIG:
        _check_tokenizer(document, path.parent)


def _check_index(index: Mapping[str, Any], folder: Path | None) -> None:
    """An index says which file has which weight; `folder` is where the files have to be."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not isinstance(index.get("metadata", {}), dict):
        raise ValueError("its weight_map and its metadata must be objects")
    for shard in set(map(_plain_name, shards.values())):
        if not shard.endswith(WEIGHTS):
            raise ValueError(f"it names the weights {shard[:60]!r}; only safetensors are read")
        if folder is not None and not (folder / shard).is_file():
            raise ValueError(f"it names {shard[:60]!r}, which is not in the folder")


def _check_config(config: Mapping[str, Any]) -> None:
    _require_none(config, "configuration_files", "another configuration, which is read instead")
    if (weights := config.get("transformers_weights")) is not None:
        _plain_name(weights)
    for name, value in _entries(config):
        if "attn_implementation" in name or "experts_implementation" in name:
            asked = value.values() if isinstance(value, dict) else [value]
            if odd := next((each for each in asked if each not in ATTENTIONS), None):
                raise ValueError(
                    f"{name[:40]} is {str(odd)[:60]!r}, which may be code from elsewhere; remove that entry"
                )
        most = _COUNTS.get(name)
        if most is not None and isinstance(value, int | float) and not value <= most:
            raise ValueError(f"{name} is {str(value)[:20]}; {most} is the most that is built")


def _check_tokenizer(config: Mapping[str, Any], folder: Path) -> None:
    """A tokenizer's configuration names files and arguments; such as older versions wrote there lead nowhere."""
    _require_none(config, "init_inputs", "what else is read")
    _require_none(config, "fast_tokenizer_files", "another tokenizer, which is read instead")
    for name, value in _entries(config):
        for each in value if isinstance(value, list) else [value]:
            if not name.endswith(("_file", "_files")) or not isinstance(each, str):
                continue
            end = Path(os.path.realpath(folder / each))
            if not end.is_relative_to(os.path.realpath(folder)) and end.exists():
                raise ValueError(f"{name[:40]} is {each[:60]!r}, which is outside of the folder; remove that entry")


def _require_none(config: Mapping[str, Any], name: str, what: str) -> None:
    """An entry that leads a library to what is not looked at here.

    Raises:
        ValueError: it is there.
    """
    if config.get(name):
        raise ValueError(f"its {name} names {what}; remove that entry")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its value, however deep."""
    inner: list[Any] = [value]
    while inner:
        each = inner.pop()
        if isinstance(each, dict):
            yield from cast(dict[str, Any], each).items()
            inner += each.values()
        elif isinstance(each, list):
            inner += each


def _plain_name(name: Any) -> str:
    """The name of a file in the folder itself.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(letter in "/\\\0" for letter in name):
        raise ValueError(f"it names the file {str(name)[:60]!r}; expected one in the folder itself")
    return name


class PlainErrors:
    """What libraries in Rust raise of no kind of its own, or as a panic, is a `ValueError` behind this."""

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and (kind is Exception or kind.__name__ == "PanicException"):
            raise ValueError(first_line(error)) from error
