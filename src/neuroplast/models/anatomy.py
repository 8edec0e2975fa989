"""Finds a model's parts by watching one forward pass: nothing here knows a family's module names.

The attention modules are those that call our attention function; the layers are the list that holds one of them
each; the output projection is the linear map inside the attention whose input is z and whose output is the
attention's; the MLP is what else in the layer holds matrices.
"""

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroplast.models.attention import AttentionCall, attend_plainly, tapped
from neuroplast.models.network import Parts, refusal, take_residual, tensor_of


def find_parts(module: PreTrainedModel, name: str, tokens: Int[Tensor, "prompt pos"]) -> Parts:
    """Watches a forward pass and names the parts.

    Args:
        module: the model, our attention function already in its place.
        name: what the user called it, for messages.
        tokens: a few tokens to run.

    Raises:
        UnsupportedModelError: naming what was not found.
    """
    watched = _Watched(module, tokens)
    if not watched.attentions:
        raise refusal(name, module, "it does not compute attention through the library's AttentionInterface")
    layers = _layers_around(module, watched.attentions)
    if layers is None:
        raise refusal(name, module, "its attention modules are not one to each layer of one list of layers")
    if len({tuple(z.shape) for z in watched.z}) > 1:
        raise refusal(name, module, "its layers differ in number or width of heads")
    if any(call.mask is None for call in watched.attention_calls):
        raise refusal(name, module, "its attention gets no mask")
    projections: list[nn.Module] = []
    for attention, z in zip(watched.attentions, watched.z, strict=True):
        found = [part for part in attention.modules() if watched.carries(part, z.flatten(2), attention)]
        if len(found) != 1:
            raise refusal(name, module, "no linear map takes its heads straight to the attention's output")
        projections.append(found[0])
    mlps = [_mlp_of(layer, attention, watched) for layer, attention in zip(layers, watched.attentions, strict=True)]
    calls = tuple(take_residual(*watched.calls[id(layer)])[1] for layer in layers)
    _, _, n_heads, d_head = watched.z[0].shape
    return Parts(
        layers,
        watched.attentions,
        projections,
        [mlp for mlp in mlps if mlp is not None] if all(mlps) else [],
        any(id(mlp[1]) in watched.tuples for mlp in mlps if mlp is not None),
        calls,
        n_heads,
        watched.attention_calls[0].key.shape[1],
        d_head,
    )


class _Watched:
    """What every module of a model was given and gave, in one forward pass."""

    def __init__(self, module: PreTrainedModel, tokens: Tensor) -> None:
        self.attention_calls: list[AttentionCall] = []
        self.z: list[Tensor] = []
        self.calls: dict[int, tuple[Any, Any]] = {}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.tuples: set[int] = set()
        self.order: list[int] = []

        def keep_attention(call: AttentionCall) -> Tensor:
            self.attention_calls.append(call)
            self.z.append(attend_plainly(call))
            return self.z[-1]

        def keep_call(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.order.append(id(part))
            self.calls[id(part)] = (args, kwargs)
            if isinstance(given := take_residual(args, kwargs)[0], Tensor):
                self.inputs[id(part)] = given
            if isinstance(output, tuple):
                self.tuples.add(id(part))
            if isinstance(value := tensor_of(output), Tensor):
                self.outputs[id(part)] = value

        with ExitStack() as stack:
            stack.enter_context(tapped(keep_attention))
            for part in module.modules():
                stack.callback(part.register_forward_hook(keep_call, with_kwargs=True).remove)
            module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        self.attentions = [call.module for call in self.attention_calls]

    def carries(self, part: nn.Module, given: Tensor, onto: nn.Module) -> bool:
        """Whether a part has a weight, was given that tensor, and gave what the module `onto` gave."""
        if not hasattr(part, "weight") or id(part) not in self.outputs or self.inputs[id(part)].shape != given.shape:
            return False
        return torch.equal(self.inputs[id(part)], given) and torch.equal(self.outputs[id(part)], self.outputs[id(onto)])


def _layers_around(module: nn.Module, attentions: list[nn.Module]) -> list[nn.Module] | None:
    for candidate in module.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) == len(attentions):
            owners = [[a for a in attentions if any(a is part for part in layer.modules())] for layer in candidate]
            if all(len(owned) == 1 and owned[0] is a for owned, a in zip(owners, attentions, strict=True)):
                return list(candidate)
    return None


def _mlp_of(layer: nn.Module, attention: nn.Module, watched: _Watched) -> tuple[nn.Module, nn.Module] | None:
    """The first and the last part of a layer, in the order they ran, that hold matrices and are not its attention."""
    parts = [
        part
        for part in layer.children()
        if not any(attention is below for below in part.modules())
        and any(parameter.ndim > 1 for parameter in part.parameters())
        and id(part) in watched.inputs
        and id(part) in watched.outputs
    ]
    if not parts:
        return None
    parts.sort(key=lambda part: watched.order.index(id(part)))
    return parts[0], parts[-1]
