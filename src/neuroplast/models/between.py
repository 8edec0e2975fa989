"""Two checkpoints of one model, and the models on the straight line between their weights."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroplast.errors import InputError, UnsupportedModelError
from neuroplast.models.network import Network, require_finite


def require_same_parts(first: Network, second: Network) -> None:
    """Checks that two models are checkpoints of one: parts, shapes, tokens and settings alike, weights all finite.

    Raises:
        InputError: naming the first thing that differs, or the weight that is no number.
    """
    names = f"{first.name!r} and {second.name!r} cannot be compared"
    if first.architecture != second.architecture:
        raise InputError(f"{names}: they are {first.architecture} and {second.architecture}")
    if (first.n_heads, first.d_head) != (second.n_heads, second.d_head):
        raise InputError(
            f"{names}: a layer has {first.n_heads} heads of width {first.d_head} and {second.n_heads} of width "
            f"{second.d_head}"
        )
    if first.device != second.device:
        raise InputError(f"{names}: they are on {first.device} and {second.device}; load both on one device")
    theirs = dict(second.module.named_parameters())
    mine = dict(first.module.named_parameters())
    if odd := sorted(set(mine) ^ set(theirs)):
        raise InputError(f"{names}: only one of them has the weight {odd[0]}")
    for name, weight in mine.items():
        if weight.shape != theirs[name].shape or weight.dtype != theirs[name].dtype:
            kinds = [f"{tuple(each.shape)} in {each.dtype}" for each in (weight, theirs[name])]
            raise InputError(f"{names}: {name} is {kinds[0]} in one and {kinds[1]} in the other")
    for model, weights in ((first, mine), (second, theirs)):
        require_finite(weights, f"model {model.name!r}")
    if first.tokenizer is not None and second.tokenizer is not None:
        vocabularies = [model.tokenizer.get_vocab() for model in (first, second)]
        if vocabularies[0] != vocabularies[1]:
            odd_words = sorted(vocabularies[0].items() ^ vocabularies[1].items(), key=lambda each: (each[1], each[0]))
            raise InputError(
                f"{names}: their tokenizers have {len(vocabularies[0])} and {len(vocabularies[1])} tokens and differ "
                f"at {odd_words[0][0]!r}; a prompt would not be the same tokens"
            )
    computed = [_how_it_computes(model) for model in (first, second)]
    for name in sorted(computed[0].keys() | computed[1].keys()):
        ours, other = (each.get(name) for each in computed)
        if ours != other:
            raise InputError(
                f"{names}: {name} is {ours!r} in the configuration of one and {other!r} in the other's, so the same "
                "weights do not compute the same"
            )


def shared_weights(first: Network, second: Network) -> list[str]:
    """The weights that are the same in two checkpoints of one model, to the bit."""
    theirs = dict(second.module.named_parameters())
    return [name for name, weight in first.module.named_parameters() if torch.equal(weight, theirs[name])]


ROUNDINGS = 5
"""Tries to go a distance where weights are short numbers."""
FREE = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range", "is_llama_config",
    "label2id", "max_position_embeddings", "n_ctx", "n_positions", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "quantization_config", "return_dict", "rope_interleaved", "task_specific_params",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a configuration that do not change what a forward pass gives; those on dropout do not either."""


def _how_it_computes(model: Network) -> dict[str, Any]:
    """What the configuration says of a forward pass."""
    entries = model.module.config.to_dict().items()
    return {name: value for name, value in entries if name not in FREE and name[0] != "_" and "drop" not in name}


class Between:
    """A model of its own that can be set to any point on the line from one checkpoint's weights to the other's."""

    def __init__(self, start: Network, end: Network) -> None:
        """Copies the model.

        Args:
            start: the checkpoint at 0.
            end: the checkpoint at 1.

        Raises:
            InputError: when they are not checkpoints of one model.
            UnsupportedModelError: when a weight belongs to a module that holds other modules.
        """
        require_same_parts(start, end)
        shared = {id(start.tokenizer): start.tokenizer}
        self.model: Network = copy.deepcopy(start, shared)
        """The model on the line."""
        self.model.module.requires_grad_(False)
        self._start = dict(start.module.named_parameters())
        self._end = dict(end.module.named_parameters())
        self.changed: dict[nn.Module, dict[str, str]] = {}
        """The modules whose own weights differ between the two, in order; by weight, its name in the model."""
        for path, module in self.model.module.named_modules(remove_duplicate=True):
            own = {name: f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
            if own and next(module.children(), None) is not None:
                raise UnsupportedModelError(
                    f"the changes of model {start.name!r} ({start.architecture}) cannot be told apart: "
                    f"{path or 'the model'} holds weights beside other modules"
                )
            own = {name: self._known(full) for name, full in own.items()}
            if any(not torch.equal(self._start[full], self._end[full]) for full in own.values()):
                self.changed[module] = own

    def _known(self, name: str) -> str:
        """The name that a weight is listed under: tied weights have several, and are listed under the first."""
        if name in self._start:
            return name
        weight = self.model.module.get_parameter(name)
        return next(other for other, each in self.model.module.named_parameters() if each is weight)

    @torch.no_grad()
    def go(self, way: float) -> None:
        """Sets the model to a point: 0 is one checkpoint, 1 the other."""
        for name, weight in self.model.module.named_parameters():
            torch.lerp(self._start[name], self._end[name], way, out=weight.data)

    @torch.no_grad()
    def drift(self, seed: int, twin: int) -> None:
        """Sets the model to a twin of `start` that went as far as `end`, in a direction drawn at random.

        Each weight (a whole tensor) moves as far as it does between the checkpoints.

        Args:
            seed: seed of all twins.
            twin: which of them.
        """
        for number, (name, weight) in enumerate(self.model.module.named_parameters()):
            start = self._start[name]
            far = (self._end[name] - start).float().norm()
            if not far:
                weight.data.copy_(start)
                continue
            drawn = int(np.random.default_rng((seed, twin, number)).integers(2**63))
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(drawn)).to(weight.device)
            scale = far / noise.norm()
            for _ in range(ROUNDINGS):
                weight.data.copy_(start + noise * scale)
                reached = (weight - start).float().norm()
                if not reached or abs(float(reached / far) - 1) < 1e-3:
                    break
                scale *= far / reached  # what short numbers round away

    def change(self, module: nn.Module) -> Mapping[str, Tensor]:
        """How much each own weight of a module differs, end minus start."""
        return {name: self._end[full] - self._start[full] for name, full in self.changed[module].items()}
