"""The ledger: where a change of behaviour is stored in the weights (path-integrated attribution; integrated gradients,
Sundararajan et al. 2017, arXiv 1703.01365, over weights instead of inputs).

With w(t) = w_A + t (w_B - w_A), LD(B) - LD(A) = Σ_c ∫ ∂LD/∂w_c · (w_B - w_A)_c dt over all components c: the whole
change is split, and nothing is left over. Components are every head's query, key, value and output map, every MLP,
each layer's norms, the bias behind its heads, the embedding and the unembedding.

Steps: at each point of a Gauss-Legendre quadrature set the weights, run forward and backward once, without
gradients of weights: what a module's change is worth on a prompt is the gradient of LD in what the module gives, times
how much more it would give with the changed weights, on what it was given. So every prompt has a ledger of its own at
no cost. Points are doubled until what is left over is small.

- Keys and values that grouped queries share are split by use: the gradient through each query head alone.
- Tied weights are split by use too: as embedding and as unembedding.

Sign: a share is what a component's change adds to LD, in logits, on the way from `start` to `end`.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp  # pyright: ignore[reportPrivateImportUsage]
from transformers.pytorch_utils import Conv1D

from neuroplast.behaviour import measure_behaviour
from neuroplast.components import HEAD_KINDS, Component, Kind
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.attention import AttentionCall, tapped
from neuroplast.models.between import Between
from neuroplast.models.network import Network, unembedding_of
from neuroplast.models.weights import WeightMap
from neuroplast.tasks.metric import log_odds_of_all
from neuroplast.tasks.prompts import PromptSet

TOLERANCE = 0.01
POINTS = (4, 64)
"""Points of the quadrature to begin with, and at most."""


@dataclass(frozen=True)
class Ledger:
    """The change of the logit difference between two checkpoints, split over their weights; on the CPU."""

    components: tuple[Component, ...]
    """The rows."""
    shares: Float[Tensor, "component prompt"]
    """What the change of each adds to LD, in logits."""
    start: Float[Tensor, "prompt"]
    """LD of the one checkpoint."""
    end: Float[Tensor, "prompt"]
    """LD of the other."""
    points: int
    """Points of the quadrature; 0 where the weights are the same."""

    @property
    def change(self) -> Float[Tensor, "prompt"]:
        """What is split: LD(end) - LD(start), as measured."""
        return self.end - self.start

    @property
    def left_over(self) -> Float[Tensor, "prompt"]:
        """What the shares do not account for."""
        return self.change - self.shares.sum(dim=0)

    @property
    def error(self) -> float:
        """The mean size of what is left over, as a share of the mean size of the change; 0 where nothing changed."""
        size = float(self.change.abs().mean())
        return float(self.left_over.abs().mean()) / size if size else 0.0

    def rows(self, *kinds: Kind) -> list[int]:
        """The rows of some kinds of components."""
        return [row for row, component in enumerate(self.components) if component.kind in kinds]

    def by_head(self, *kinds: Kind) -> Float[Tensor, "layer head prompt"]:
        """The shares of all heads as a grid: of their `q`, `k`, `v` and `o`, or of some of these."""
        rows = self.rows(*(kinds or HEAD_KINDS))
        places = [self.components[row] for row in rows]
        n_layers, n_heads = (1 + max(each) for each in ([p.layer or 0 for p in places], [p.head or 0 for p in places]))
        grid = self.shares.new_zeros(n_layers * n_heads, self.shares.shape[1])
        index = torch.tensor([(place.layer or 0) * n_heads + (place.head or 0) for place in places])
        return grid.index_add(0, index, self.shares[rows]).view(n_layers, n_heads, -1)


def build_ledger(
    start: Network,
    end: Network,
    prompts: PromptSet,
    *,
    tolerance: float = TOLERANCE,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Ledger:
    """Splits the change of the logit difference between two checkpoints over their weights.

    Args:
        start: the one checkpoint, such as the base.
        end: the other.
        prompts: clean prompts; their counterfactuals do not matter.
        tolerance: points are doubled until `Ledger.error` is at most this, or there are 64.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. It does not count the copy of
            the model that is set to the points.
        progress: called with (steps done, steps in all), anew for each number of points.

    Raises:
        InputError: when the models are not checkpoints of one, for a tolerance that is no share, or a budget that is
            too small.
        UnsupportedModelError: when the heads' weights cannot be told apart.
    """
    require_prompts(prompts)
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    between = Between(start, end)
    layout = WeightMap(between.model)
    before, after = (measure_behaviour(model, prompts).logit_diff for model in (start, end))
    nothing = torch.zeros(len(layout.components), len(prompts))
    found = Ledger(layout.components, nothing, before, after, 0)
    if not between.changed:
        return found
    points, most = POINTS
    while True:
        shares = _integrate(between, layout, prompts, points, memory, progress)
        found = Ledger(layout.components, shares, before, after, points)
        if found.error <= tolerance or points >= most:
            return found
        points *= 2


def _difference(model: Network, chunk: Chunk) -> Float[Tensor, "prompt"]:
    return log_odds_of_all(model.logits(chunk.prompts.clean, chunk.end).float(), chunk.prompts)


def _integrate(
    between: Between,
    layout: WeightMap,
    prompts: PromptSet,
    points: int,
    memory: str | int | None,
    progress: Progress | None,
) -> Float[Tensor, "component prompt"]:
    shares = torch.zeros(len(layout.components), len(prompts), dtype=torch.float64)
    ways, weights = np.polynomial.legendre.leggauss(points)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        found = torch.zeros(len(layout.components), len(chunk.rows), dtype=torch.float64, device=between.model.device)
        for way, weight in zip((1 + ways) / 2, weights / 2, strict=True):
            between.go(float(way))
            _Pass(between, layout, chunk).add(found, float(weight))
            tick()
        shares[:, chunk.rows] = found.cpu()

    in_prompt_chunks(
        between.model, prompts, _size(between.model, prompts), work, points, memory=memory, progress=progress
    )
    return shares.float()


def _size(model: Network, prompts: PromptSet) -> Size:
    """What a forward and a backward pass hold, a prompt."""
    weights = sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())
    # A module's output, its gradient, and what the backward pass keeps: about as wide as the linear maps, four times.
    row = 4 * weights // model.d_model + model.n_layers * 4 * model.n_heads * prompts.width
    vocabulary = 3 * unembedding_of(model.module).weight.shape[0]
    return Size(4 * (prompts.width * row + vocabulary), 1, 1, share=0.5)


class _Pass:
    """One forward and backward pass at a point of the line, and what each module's change is worth there."""

    def __init__(self, between: Between, layout: WeightMap, chunk: Chunk) -> None:
        self.between, self.layout, self.chunk = between, layout, chunk
        self.model = between.model
        self.calls: list[_Call] = []
        """The changed modules as they ran."""
        self.shared: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        """By layer and channel, the keys and values that grouped queries share, and one for each query head."""

    def add(self, shares: Float[Tensor, "component prompt"], weight: float) -> None:
        """Adds what each component is worth at this point, times a weight."""
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(tapped(self._attend))
            for module in self.between.changed:
                stack.callback(module.register_forward_hook(self._keep, with_kwargs=True).remove)
            difference = _difference(self.model, self.chunk)
        if not difference.requires_grad:
            return
        wanted = [*(call.output for call in self.calls), *(own for _, own in self.shared.values())]
        # What only positions after END or unread heads see has no gradient.
        found = torch.autograd.grad(
            difference.sum(), wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradients, own = found[: len(self.calls)], dict(zip(self.shared, found[len(self.calls) :], strict=True))
        with torch.no_grad():
            for call, gradient in zip(self.calls, gradients, strict=True):
                for row, products in self._worth(call, gradient, own):
                    # Prompts come first, alone, with their positions, or behind a 1.
                    shares[row] += weight * products.double().reshape(len(self.chunk.rows), -1).sum(dim=1)

    def _attend(self, call: AttentionCall) -> Tensor:
        key, value = call.key, call.value
        if self.model.parts.n_kv_heads != self.model.n_heads:
            layer = self.layout.attention_of[id(call.module)]
            key, value = self._own(layer, "k", call, key), self._own(layer, "v", call, value)
        return call.attend(call.query, key, value, call.mask)[0]

    def _own(self, layer: int, channel: str, call: AttentionCall, shared: Tensor) -> Tensor:
        own = call.ungroup(shared)
        if own.requires_grad:
            self.shared[layer, channel] = shared, own
        return own

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:
            # Nothing before it changes. Where the prompts share what it gives, each gets its own.
            if len(output) == 1 and module is not self.layout.unembedding:
                output = output.expand(len(self.chunk.rows), *output.shape[1:])
            output = output.detach().clone().requires_grad_()
        self.calls.append(_Call(module, args, kwargs, output))
        return output

    def _more(self, call: "_Call") -> Tensor:
        """How much more a module would give with the changed weights, to first order."""
        change = dict(self.between.change(call.module))
        args, kwargs = call.args, call.kwargs
        if isinstance(call.module, nn.Linear):
            return nn.functional.linear(args[0], change["weight"], change.get("bias"))
        if isinstance(call.module, nn.Embedding | Conv1D):
            return functional_call(call.module, change, args, kwargs)
        weights = dict(call.module.named_parameters(recurse=False))
        return jvp(lambda own: functional_call(call.module, own, args, kwargs), (weights,), (change,))[1]

    def _worth(
        self, call: "_Call", gradient: Tensor, own: Mapping[tuple[int, str], Tensor]
    ) -> Iterable[tuple[int, Tensor]]:
        """Rows of the ledger, and what adds up to what each is worth."""
        layout, model = self.layout, self.model
        layer = layout.attention_of.get(id(call.module))
        if layer is not None and call.module is model.parts.projections[layer]:
            change = self.between.change(call.module)
            weight = change["weight"] if isinstance(call.module, nn.Linear) else change["weight"].T
            by_head = (gradient @ weight * call.args[0]).unflatten(-1, (model.n_heads, model.d_head))
            for head in range(model.n_heads):
                yield layout.row("o", layer, head), by_head[..., head, :]
            if "bias" in change:
                yield layout.row("bias", layer), gradient * change["bias"]
            return
        more = self._more(call)
        made = layout.projections.get(id(call.module))
        if made is None:
            yield layout.row_of(call.module), gradient * more
            return
        for channel, at, projection in made:
            if (at, channel) in self.shared:
                parts = self._by_query_head(call.output, self.shared[at, channel][0], own[at, channel])
                for head in range(model.n_heads):
                    outputs = projection.outputs[model.kv_head(head)]
                    products = parts[head % len(parts)][..., outputs] * more[..., outputs]
                    yield layout.row(channel, at, head), products
            else:
                for head, outputs in enumerate(projection.outputs):
                    yield layout.row(channel, at, head), gradient[..., outputs] * more[..., outputs]

    def _by_query_head(self, output: Tensor, shared: Tensor, own: Tensor) -> list[Tensor]:
        """The gradient in what makes keys or values, through the first, second, … query head of every group."""
        parts = own.unflatten(1, (self.model.parts.n_kv_heads, -1)).unbind(2)
        return [torch.autograd.grad(shared, output, part, retain_graph=True)[0] for part in parts]


@dataclass(frozen=True)
class _Call:
    """A module as it ran: what it was given, and what it gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
