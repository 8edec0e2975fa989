"""How a layer reads the residual stream: norms, linear maps, and which of their outputs belong to which head.

The gradient with respect to what one head reads through its query, key or value alone needs this structure, because a
model's own backward pass adds them all up. It is found by measurement, not by name: the linear maps are those
that read the attention's input; an output of theirs belongs to the head whose query, key or value has a gradient
there; norms are recognised by their values, and tried against their formula.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuroplast.components import READ_CHANNELS, ReadChannel
from neuroplast.errors import UnsupportedModelError
from neuroplast.models.network import Network, weight_of


@dataclass(frozen=True)
class Norm:
    """A norm over the residual stream, or none: `gain * (x - mean) / sqrt(mean square + eps) + bias`."""

    kind: Literal["layer", "rms", "none"]
    """LayerNorm subtracts the mean, RMSNorm does not."""
    gain: Float[Tensor, "d_model"]
    """What each dimension is multiplied by."""
    bias: Float[Tensor, "d_model"]
    """What is added to it then."""
    eps: float = 0.0
    """Added to the mean square."""

    def direction(
        self, x: Float[Tensor, "*row d_model"]
    ) -> tuple[Float[Tensor, "*row d_model"], Float[Tensor, "*row 1"]]:
        """The normalised input before the gain, and the scale that it was divided by."""
        if self.kind == "none":
            return x, torch.ones_like(x[..., :1])
        centred = x - x.mean(dim=-1, keepdim=True) if self.kind == "layer" else x
        scale = (centred.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return centred / scale, scale

    def pull_back(
        self, gradient: Float[Tensor, "*row d_model"], x: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """Takes a gradient in the norm's output back to its input `x`."""
        gradient = gradient * self.gain.to(gradient.dtype)
        if self.kind == "none":
            return gradient
        direction, scale = self.direction(x)
        if self.kind == "layer":
            gradient = gradient - gradient.mean(dim=-1, keepdim=True)
        return (gradient - direction * (gradient * direction).mean(dim=-1, keepdim=True)) / scale


@dataclass(frozen=True)
class Projection:
    """The linear map from a layer's normed residual stream to its heads' queries, keys or values."""

    linear: nn.Module
    """The module; it may hold others' outputs too."""
    outputs: Int[Tensor, "head d_head"]
    """Which of its outputs belong to which (key-value) head."""

    @property
    def weight(self) -> Float[Tensor, "head d_head d_model"]:
        """The part of the live weights that makes each head's outputs."""
        return weight_of(self.linear).T[self.outputs]

    def made_of(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row head d_head"]:
        """What each head makes of an input."""
        return self.linear(x.to(weight_of(self.linear).dtype))[..., self.outputs]


@dataclass(frozen=True)
class Reader:
    """How one layer reads the residual stream."""

    heads: Norm
    """What the residual stream passes on its way to the heads."""
    projections: Mapping[ReadChannel, Projection]
    """Where queries, keys and values are made."""
    mlp: Norm
    """What the residual stream passes on its way to the MLP."""


def find_reader(network: Network, layer: int) -> Reader:
    """Finds how a layer reads.

    Raises:
        UnsupportedModelError: when the structure is another; the message says which part.
    """

    def read_attention(x: Tensor) -> Tensor:
        return network.read_attention(layer, x)

    def read_mlp(x: Tensor) -> Tensor:
        return network.read_mlp(layer, x, torch.zeros_like(x))

    return Reader(
        _find_norm(network, layer, read_attention, "its heads read"),
        find_projections(network, layer),
        _find_norm(network, layer, read_mlp, "its MLP reads"),
    )


def find_projections(network: Network, layer: int) -> Mapping[ReadChannel, Projection]:
    """Finds where queries, keys and values are made; once, because training changes weights and not structure.

    Raises:
        UnsupportedModelError: when they are not each made by one linear map.
    """
    if layer in network.projections:
        return network.projections[layer]
    call = network.parts.calls[layer]
    generator = torch.Generator().manual_seed(layer)
    shape = (2, 6, network.d_model)
    residual = torch.randn(shape, generator=generator).to(network.device, network.module.dtype)
    leaves: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []

    def keep_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])

    def cut(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if args[0].shape != read[0].shape or not torch.equal(args[0], read[0]):
            return None
        leaves[linear] = output.detach().requires_grad_()
        return leaves[linear]

    attention = network.attentions[layer]
    with ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        for part in attention.modules():
            if isinstance(weight := getattr(part, "weight", None), Tensor) and weight.ndim == 2:
                stack.callback(part.register_forward_hook(cut).remove)
        stack.enter_context(torch.enable_grad())
        found = network.read_heads(layer, residual, call)
        projections: dict[ReadChannel, Projection] = {
            channel: _find_projection(network, layer, heads, leaves)
            for channel, heads in zip(READ_CHANNELS, (found.query, found.key, found.value), strict=True)
        }
    owned = [(id(p.linear), int(output)) for p in projections.values() for output in p.outputs.flatten()]
    if len(set(owned)) != len(owned):
        raise _unreadable(network, layer, "its heads share outputs of a linear map")
    network.projections[layer] = projections
    return projections


def _find_projection(network: Network, layer: int, heads: Tensor, leaves: Mapping[nn.Module, Tensor]) -> Projection:
    outputs: list[Tensor] = []
    linears: set[nn.Module] = set()
    for head in range(heads.shape[1]):
        mine = heads[:, head]
        # Uneven weights, so that no normalisation of the head makes their gradient vanish.
        weights = torch.arange(mine.numel(), device=mine.device, dtype=mine.dtype).cos().view(mine.shape)
        gradients = torch.autograd.grad(
            (mine * weights).sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        for linear, gradient in zip(leaves, gradients, strict=True):
            if bool(gradient.any()):
                linears.add(linear)
                outputs.append((gradient != 0).flatten(0, 1).any(dim=0).nonzero()[:, 0])
    if len(linears) != 1 or len(outputs) != heads.shape[1] or len({len(each) for each in outputs}) != 1:
        raise _unreadable(network, layer, "its queries, keys or values are not each made by one linear map")
    return Projection(linears.pop(), torch.stack(outputs))


@torch.no_grad()
def _find_norm(network: Network, layer: int, reading: Callable[[Tensor], Tensor], what: str) -> Norm:
    width, dtype, device = network.d_model, network.module.dtype, network.device
    generator = torch.Generator().manual_seed(layer)
    signs = (torch.arange(width, device=device) % 2 * 2 - 1)[torch.randperm(width, generator=generator).to(device)]
    signs = signs.to(dtype)
    probe = torch.randn(6, width, generator=generator).to(device, dtype) * torch.tensor(
        [[0.01], [0.1], [1.0], [1.0], [10.0], [100.0]], device=device, dtype=dtype
    )

    def read(x: Tensor) -> Tensor:
        return reading(x.view(-1, 1, width))[:, 0].float()

    real = read(probe)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    bias = read(torch.zeros_like(signs))[0]
    large, small = 1000.0, 0.001
    gain = (read(signs * large)[0] - bias) * signs
    shrunk = ((read(signs * small)[0] - bias) * signs / gain)[gain.abs() >= gain.abs().median()].median().clamp(max=1)
    eps = small**2 * (float(shrunk) ** -2 - 1) if float(shrunk) > 0 else 0.0
    plain = (read(signs)[0] - bias) * signs
    for norm in (Norm("layer", gain, bias, eps), Norm("rms", gain, bias, eps), Norm("none", plain, bias)):
        formula = norm.direction(probe.float())[0] * norm.gain + norm.bias
        if bool(((formula - real).abs() <= tolerance * real.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)).all()):
            return norm
    raise _unreadable(network, layer, f"what {what} of the residual stream is neither LayerNorm nor RMSNorm")


def _unreadable(network: Network, layer: int, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the edges of model {network.name!r} ({network.architecture}) cannot be told apart: in layer {layer} "
        f"{reason}; heads, MLPs and positions can be patched"
    )
