"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): a fine-tuning kept as small factors beside its base's weights.

A weight W becomes W + s B A, with s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); DoRA (arXiv 2402.09353)
scales its columns as well. Whole modules, biases and single tokens' embeddings may be trained beside the factors.

Steps: the configuration is checked, the `peft` library puts the adapter beside the base's weights and adds the factors
to them, and the logits must be the same before and after on a few tokens. What comes out is a plain model.

Deviations: an adapter is a stranger's file, so it is read as narrowly as it can be. Only safetensors. Every tensor that
the configuration asks for must be there in its shape, and no other. Which modules are adapted is read from the names of
the tensors where the configuration has a regular expression, which can be made to run forever. A start that changes the
base's weights (PiSSA, OLoRA, ...) is refused, as are the kinds whose weights depend on the prompt.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from neuroplast.errors import InputError, StorageError, first_line
from neuroplast.models.network import require_finite
from neuroplast.reading import read_bytes
from neuroplast.storage import load_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What `peft` puts before the name of a base's module."""
HARMLESS = {
    *(
        "auto_mapping",
        "inference_mode",
        "lora_dropout",
        "parent_library",
        "peft_version",
        "runtime_config",
        "task_type",
    ),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
}
"""Options that say how an adapter was trained, not what it is."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin a training that leave the base's weights alone."""

LARGEST_CONFIG = 2**20
"""Bytes of the largest configuration that is read."""
SMALL_RANK = 256
"""Factors up to here take little memory, whatever they turn out to be."""

Rank = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""A module's name, or the end of one."""
Expression = Annotated[str, Field(pattern=r"^[\w.$^\\-]+$")]
"""The same as a regular expression that cannot run long: nothing in it repeats."""


class AdapterConfig(BaseModel):
    """What `adapter_config.json` says; options of `peft` by its names."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    """The kind of adapter."""
    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    """What the adapter is of."""
    revision: Literal["main"] | None = None
    """Which version of the base on the hub."""
    target_modules: tuple[Name, ...] | str | None = None
    """Names, or ends of names, of the adapted modules, or a regular expression."""
    exclude_modules: tuple[Name, ...] | str | None = None
    """The same for modules that are left out."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Indices of the adapted layers; None is all."""
    layers_pattern: tuple[Name, ...] | Name | None = None
    """The name of the list of layers."""
    r: Rank = 8
    """Rank of the factors."""
    lora_alpha: Number = 8
    """Scale of their product, times r."""
    rank_pattern: Mapping[Expression, Rank] | None = None
    """Other ranks, by module."""
    alpha_pattern: Mapping[Expression, Number] | None = None
    """Other scales, by module."""
    fan_in_fan_out: bool = False
    """Whether weights are kept as (in, out)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases were trained."""
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(r)."""
    use_dora: bool = False
    """Whether the weights' columns are scaled."""
    lora_bias: bool = False
    """Whether the second factor has a bias."""
    modules_to_save: tuple[Name, ...] | None = None
    """Modules that were trained whole."""
    trainable_token_indices: tuple[int, ...] | Mapping[Name, tuple[int, ...]] | None = None
    """Tokens whose embeddings were trained."""
    init_lora_weights: bool | str = True
    """How the training began."""

    @property
    def names_modules(self) -> bool:
        """Whether it names the adapted modules one by one, without regular expressions."""
        return isinstance(self.target_modules, tuple) and not isinstance(self.exclude_modules, str)

    def options(self) -> dict[str, Any]:
        """The options that `peft` is given: none that could make it look elsewhere or run long."""
        left_out = {"peft_type", "base_model_name_or_path", "revision", "init_lora_weights"}
        taken = self.model_dump(mode="json", include=set(type(self).model_fields) - left_out)
        return taken | {name: taken[name] or {} for name in ("rank_pattern", "alpha_pattern")}


def load_adapter_config(folder: Path) -> AdapterConfig:
    """Reads what an adapter is, and of which base.

    Args:
        folder: a folder with `adapter_config.json`.

    Raises:
        InputError: when it is damaged, or of a kind that does not become plain weights.
    """
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"adapter {folder} holds no {WEIGHTS}; other weight files are not read, convert them first")
    try:
        config = AdapterConfig.model_validate_json(read_bytes(folder / CONFIG, LARGEST_CONFIG))
    except OSError as error:
        raise InputError(f"adapter {folder} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where, got = ".".join(map(str, first["loc"]))[:60], repr(first["input"])[:60]
        if where == "peft_type":
            raise InputError(f"adapter {folder} is of the kind {got}; only LORA is read: merge it with peft") from error
        raise InputError(f"adapter {folder}: {where or CONFIG} = {got}: {first_line(first['msg'])}") from error
    if config.init_lora_weights not in STARTS:
        raise InputError(
            f"adapter {folder} begins with {str(config.init_lora_weights)[:60]!r}, which changes the base's own "
            "weights; save it with peft as a plain LoRA (path_initial_model_for_weight_conversion), or merge it first"
        )
    for name, value in (config.model_extra or {}).items():
        if value and name not in HARMLESS:
            raise InputError(
                f"adapter {folder} has the option {name[:60]!r}, which is not known to become plain weights; "
                "merge it with peft first"
            )
    return config


def merge_adapter(module: PreTrainedModel, folder: Path, config: AdapterConfig) -> PreTrainedModel:
    """Adds an adapter to its base's weights.

    Args:
        module: the base, in float32 on the CPU; it is changed.
        folder: the adapter.
        config: what it is.

    Returns:
        The base with the adapter in its weights.

    Raises:
        InputError: when `peft` is not installed, the adapter does not fit the base, or it does not become weights.
    """
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise InputError(f"adapter {folder} needs the peft package: pip install 'neuroplast[lora]'") from error
    try:
        tensors = {name: tensor.float() for name, tensor in load_tensors(folder / WEIGHTS).items()}
    except StorageError as error:
        raise InputError(f"adapter {folder} is damaged: {first_line(error)}") from error
    require_finite(tensors, f"adapter {folder}")
    what = f"adapter {folder} does not fit its base {config.base_model_name_or_path[:60]!r}"
    options = config.options()
    if not config.names_modules:
        options |= {"target_modules": _adapted(tensors), "exclude_modules": None}
    _require_ranks(config, tensors, what)
    tied = _is_tied(module)
    tokens = (torch.arange(12).view(2, 6) * 37 + 11) % int(module.config.vocab_size)
    module.eval()
    # peft says with these that a module, an index, a name or a shape is not there, and warns of what is checked here.
    expected = (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError, re.error)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            adapted: Any = get_peft_model(module, LoraConfig(**options)).eval()
            asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _require_tensors(tensors, asked, adapted.state_dict(), what)
            set_peft_model_state_dict(adapted, tensors)
            wanted = adapted(input_ids=tokens).logits
            merged: PreTrainedModel = adapted.merge_and_unload()
        except expected as error:
            raise InputError(f"{what}: {first_line(error)}") from error
        if tied and not _is_tied(merged):
            raise InputError(f"{what}: it parts the unembedding from the embedding, which are one in the base")
        error = float((merged(input_ids=tokens).logits - wanted).abs().max())
        if not error <= 2e-4 * max(float(wanted.abs().max()), 1.0):
            raise InputError(f"adapter {folder} does not become weights: merged, its logits differ by {error:.2g}")
    return merged.requires_grad_(True)


def _adapted(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that tensors of an adapter belong to."""
    names = (re.match(r"(.*?)\.lora_", name.removeprefix(PREFIX)) for name in tensors)
    return sorted({name.group(1) for name in names if name})


def _require_ranks(config: AdapterConfig, tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuses ranks that the file does not have: they would take memory before they are found to be wrong."""
    factors = (tensor for name, tensor in tensors.items() if re.search(r"\.lora_(embedding_)?A\b", name))
    widest = max((tensor.shape[0] for tensor in factors if tensor.ndim), default=0)
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if rank > max(widest, SMALL_RANK):
            raise InputError(f"{what}: its rank is {rank}, and its factors have rank {widest} at most")


def _require_tensors(
    tensors: Mapping[str, Tensor], asked: Mapping[str, Tensor], known: Mapping[str, Tensor], what: str
) -> None:
    if odd := _first(set(asked) - set(tensors)):
        raise InputError(f"{what}: the weights {odd} are missing")
    if odd := _first(set(tensors) - set(asked) - set(known)):
        raise InputError(f"{what}: the base has no place for {odd}")
    for name, tensor in tensors.items():
        there = asked.get(name, known.get(name))
        if there is not None and there.shape != tensor.shape:
            raise InputError(f"{what}: {name} is {tuple(tensor.shape)}, expected {tuple(there.shape)}")


def _first(names: set[str]) -> str:
    shown = sorted(names)
    return (shown[0] + (f" and {len(shown) - 1} more" if len(shown) > 1 else "")) if shown else ""


def _is_tied(module: PreTrainedModel) -> bool:
    inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
    return outer is not None and inner.weight is outer.weight
