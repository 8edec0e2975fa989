"""Edge attribution: a first-order estimate of exact edge patching, for all edges at once.

An edge u -> v is patched when v alone reads u's counterfactual output in place of its clean one. To first order that
changes LD by (what u writes into the residual stream then - now) · (gradient of LD in what v reads).

- **EAP** (Syed et al. 2023, arXiv 2310.10348): the gradient on the clean prompts.
- **EAP-IG** (Hanna et al. 2024, arXiv 2403.17806, inputs): the mean of the gradients at m points on the straight
  line from the clean to the counterfactual embedding, k/m of the way for k = 0 … m-1.
- **CEAP** (arXiv 2606.16920): the sum over the same points of (what u writes at k+1 - at k) · gradient at k.

Steps: run the counterfactual prompts; at each point run forward and backward once. The backward pass gives the
gradient at each MLP's input, and at the outputs of the linear maps that make queries, keys and values. Each of those
outputs belongs to one head (`neuroplast.models.readers`), so the gradient in what one head reads through q, k or
v alone follows from its share of the weights and the norm's derivative; the keys and values that grouped queries
share get a gradient a query head, with no copy of the weights. All pairs then are matrix products.

What u writes is exact, with everything else clean: behind a norm (Gemma 3) it is the change of the norm's output.

Sign: estimated LD(patched) - LD(clean), in logits; direction clean -> counterfactual; summed over positions.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuroplast.components import READ_CHANNELS, ReadChannel
from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks, logit_difference
from neuroplast.interventions.edges import EdgeScores, Workspace, build_edge_graph
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.attention import AttentionCall, tapped
from neuroplast.models.network import LayerCall, Network
from neuroplast.models.readers import Reader, find_reader
from neuroplast.tasks.prompts import PromptSet

METHODS = ("eap", "eap-ig", "ceap")
STEPS = 5
LAYERS_A_PRODUCT = 4
"""Layers whose receivers share a matrix product: one layer's are too few for its full speed."""


def attribute_edges(
    model: Network,
    prompts: PromptSet,
    *,
    method: str = "eap-ig",
    steps: int = STEPS,
    per_prompt: bool = False,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """Scores every edge of a model: input, heads and MLPs into heads' q, k and v, MLPs and logits.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        method: `eap` (one gradient), `eap-ig` or `ceap`.
        steps: points on the way from clean to counterfactual, for `eap-ig` and `ceap`.
        per_prompt: keep the scores of every prompt (edges × prompts numbers).
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for an unknown method, steps below 1, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if type(steps) is not int or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {steps!r}")
    require_prompts(prompts)
    model.require_mlps()
    points = 1 if method == "eap" else steps
    graph = build_edge_graph(model)
    sources, destinations, exists = graph.sources, graph.destinations, graph.exists
    total, squares = torch.zeros(2, *exists.shape, dtype=torch.float64)
    # Filled, not zeros that the system lends on demand: chunks are measured against what is taken.
    kept = torch.full((*exists.shape, len(prompts)), 0.0) if per_prompt else None
    clean, counterfactual = torch.zeros(len(prompts)), torch.zeros(len(prompts))
    readers = [find_reader(model, layer) for layer in range(model.n_layers)]
    workspace = Workspace()

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        scores, *differences = _Attribution(model, chunk, readers).scores(method, points, workspace, tick)
        scores.masked_fill_(~exists.to(model.device), 0)
        # All sums before the first is added: what runs out of memory here is done again.
        sums = scores.sum(dim=0, dtype=torch.float64).cpu(), scores.pow(2).sum(dim=0, dtype=torch.float64).cpu()
        total.add_(sums[0])
        squares.add_(sums[1])
        if kept is not None:
            kept[..., chunk.rows] = scores.permute(1, 2, 0).cpu()
        clean[chunk.rows], counterfactual[chunk.rows] = (each.cpu() for each in differences)

    in_prompt_chunks(model, prompts, _size(model, prompts, points), work, points + 1, memory=memory, progress=progress)
    n = len(prompts)
    mean = total / n
    error = ((squares / n - mean**2).clamp(min=0) / (n - 1)).sqrt().float() if n > 1 else None
    return EdgeScores(method, points, sources, destinations, exists, mean.float(), error, kept, clean, counterfactual)


@dataclass(frozen=True)
class _Point:
    """What the model computed at one point between the prompts.

    A row is a position of a prompt that can differ; rows of one prompt stand together.
    """

    residual: list[Float[Tensor, "row d_model"]]
    """The residual stream entering each layer, then what leaves the last."""
    z: list[Float[Tensor, "row head d_head"]]
    """Each head's value."""
    attention: list[Float[Tensor, "row d_model"]]
    """Each attention module's output."""
    mlp: list[Float[Tensor, "row d_model"]]
    """Each MLP's output."""
    gradients: list[dict[str, Float[Tensor, "row *rest"]]]
    """By layer, the gradient of LD in what each query head makes of its own `q`, `k` and `v`, (row, head, d_head),
    before position encoding, and in what the `mlp` reads, (row, d_model); empty where none was asked for."""
    read: list[dict[ReadChannel, Float[Tensor, "row head d_head"]]]
    """By layer, what each (key-value) head makes of its input as `q`, `k` and `v`; empty likewise."""
    final: Float[Tensor, "prompt d_model"] | None
    """The gradient in the residual stream that leaves the last layer at END."""
    difference: Float[Tensor, "prompt"]
    """LD."""


class _Attribution:
    """Edge attribution on one chunk of prompts."""

    def __init__(self, model: Network, chunk: Chunk, readers: Sequence[Reader]) -> None:
        self.model, self.chunk, self.readers = model, chunk, readers
        self.clean = model.start(chunk.prompts.clean)
        self.counterfactual = model.start(chunk.prompts.counterfactual)

    def scores(
        self, method: str, points: int, workspace: Workspace, tick: Callable[[], None]
    ) -> tuple[Float[Tensor, "prompt source destination"], Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
        """The scores of all edges prompt by prompt, and LD on the clean and on the counterfactual prompts."""
        other = self.run(1.0, gradients=False)
        tick()
        clean = former = self.run(0.0)
        tick()
        scores = _Scores(self.model, self.readers, self.chunk, workspace)
        for point in range(1, points + 1):
            now = other if point == points else self.run(point / points)
            if method == "ceap":
                scores.add(former, now, former, 1.0)
            else:
                scores.add(clean, other, former, 1 / points)
            former = now
            if point < points:
                tick()
        return scores.by_edge, clean.difference, other.difference

    def run(self, way: float, gradients: bool = True) -> _Point:
        """Runs the model part of the way from the clean to the counterfactual embedding, and back where asked."""
        model, rows = self.model, self.chunk.changed
        # At either end it gives that end to the bit.
        start = torch.lerp(self.clean.residual, self.counterfactual.residual, way)
        traces: list[_Trace] = []
        residuals: list[Tensor] = []
        with torch.set_grad_enabled(gradients):
            residual = start.detach().requires_grad_(gradients)
            for layer in range(model.n_layers):
                residuals.append(residual)
                trace = _Trace(model, layer, self.readers[layer] if gradients else None)
                residual = trace.run(residual, self.clean.calls[layer])
                traces.append(trace)
            final = residual[torch.arange(len(residual), device=residual.device), self.chunk.end]
            difference = logit_difference(model, final[:, None], self.chunk.prompts)[:, 0]
        found: list[dict[str, Tensor]] = []
        read: list[dict[ReadChannel, Tensor]] = []
        last: Tensor | None = None
        if gradients:
            wanted = [tensor for trace in traces for tensor in trace.wanted]
            *values, last = torch.autograd.grad(difference.sum(), [*wanted, final], retain_graph=True)
            for trace in traces:
                own, values = values[: len(trace.wanted)], values[len(trace.wanted) :]
                found.append({name: each[rows] for name, each in trace.gradients(own).items()})
                read.append({channel: each.detach()[rows] for channel, each in trace.read.items()})
        return _Point(
            [each.detach()[rows] for each in (*residuals, residual)],
            [trace.z.detach()[rows] for trace in traces],
            [trace.attention.detach()[rows] for trace in traces],
            [trace.mlp.detach()[rows] for trace in traces],
            found,
            read,
            last,
            difference.detach(),
        )


class _Trace:
    """One layer of a forward pass, with the tensors whose gradients tell the heads and the MLP apart."""

    z: Tensor
    attention: Tensor
    mlp: Tensor
    mlp_input: Tensor
    shared: tuple[Tensor, Tensor]
    """Keys and values as grouped queries share them."""
    own: tuple[Tensor, Tensor]
    """The same with one for each query head."""

    def __init__(self, model: Network, layer: int, reader: Reader | None) -> None:
        self.model, self.layer, self.reader = model, layer, reader
        self.linear: dict[int, Tensor] = {}
        self.grouped = model.parts.n_kv_heads != model.n_heads

    def run(self, residual: Float[Tensor, "prompt pos d_model"], call: LayerCall) -> Tensor:
        """Runs the layer."""

        def attend(found: AttentionCall) -> Tensor:
            key, value = found.key, found.value
            if self.reader is not None and self.grouped:
                # Each query head gets a key and a value of its own, so that their gradients stay apart.
                self.shared = (key, value)
                self.own = key, value = found.ungroup(key), found.ungroup(value)
            self.z, _ = found.attend(found.query, key, value, found.mask)
            return self.z

        def keep(name: str) -> Callable[[Tensor], Tensor]:
            def edit(output: Tensor) -> Tensor:
                setattr(self, name, output)
                return output

            return edit

        with ExitStack() as stack:
            stack.enter_context(tapped(attend))
            stack.enter_context(self.model.edited_attention(self.layer, keep("attention")))
            stack.enter_context(self.model.edited_mlp(self.layer, keep("mlp")))
            if self.reader is not None:
                stack.enter_context(self.model.edited_mlp_input(self.layer, keep("mlp_input")))
                for linear in {id(each.linear): each.linear for each in self.reader.projections.values()}.values():
                    stack.callback(linear.register_forward_hook(self._keep_linear).remove)
            out = self.model.run_layer(self.layer, residual, call)
        self.mlp = self.mlp.view(out.shape)
        return out

    def _keep_linear(self, linear: nn.Module, _: Any, output: Tensor) -> None:
        self.linear[id(linear)] = output

    @property
    def read(self) -> dict[ReadChannel, Tensor]:
        """What each (key-value) head makes of its input, at every position."""
        assert self.reader is not None
        return {
            channel: self.linear[id(projection.linear)][..., projection.outputs]
            for channel, projection in self.reader.projections.items()
        }

    @property
    def wanted(self) -> list[Tensor]:
        """What the gradient of LD is wanted in."""
        return [*self.linear.values(), self.mlp_input, *(self.own if self.grouped else ())]

    def gradients(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradients of `_Point`, at every position, from those of `wanted`."""
        assert self.reader is not None
        of_linear = dict(zip(self.linear, values, strict=False))
        found: dict[str, Tensor] = {}
        for channel, projection in self.reader.projections.items():
            if channel == "q" or not self.grouped:
                found[channel] = of_linear[id(projection.linear)][..., projection.outputs]
        if self.grouped:
            for channel, shared, own in zip(READ_CHANNELS[1:], self.shared, values[-2:], strict=True):
                found[channel] = self._by_query_head(channel, shared, own)
        found["mlp"] = values[len(self.linear)].view(self.mlp.shape)
        return found

    def _by_query_head(
        self, channel: ReadChannel, shared: Tensor, own: Float[Tensor, "prompt head pos d_head"]
    ) -> Float[Tensor, "prompt pos head d_head"]:
        """Takes the gradient in each query head's key or value back to the outputs of the linear map."""
        assert self.reader is not None
        projection = self.reader.projections[channel]
        output = self.linear[id(projection.linear)]
        parts = own.unflatten(1, (self.model.parts.n_kv_heads, -1)).unbind(2)
        back = [torch.autograd.grad(shared, output, part, retain_graph=True)[0] for part in parts]
        return torch.stack([each[..., projection.outputs] for each in back], dim=3).flatten(2, 3)


class _Scores:
    """The scores of all edges on one chunk of prompts, added up point by point."""

    def __init__(self, model: Network, readers: Sequence[Reader], chunk: Chunk, workspace: Workspace) -> None:
        self.model, self.readers, self.workspace = model, readers, workspace
        counts = chunk.changed.sum(dim=1).tolist()
        ends = list(itertools.accumulate(counts))
        self.rows = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        self.n_sources = 1 + model.n_layers * (model.n_heads + 1)
        self.by_edge = torch.zeros(
            len(counts), self.n_sources, model.n_layers * (3 * model.n_heads + 1) + 1, device=chunk.changed.device
        )
        """Scores, (prompt, source, destination)."""

    @torch.no_grad()
    def add(self, base: _Point, other: _Point, at: _Point, share: float) -> None:
        """Adds what each source writes more in `other` than in `base`, times the gradients at a point."""
        n_layers, n_heads = self.model.n_layers, self.model.n_heads
        n_rows, d_model = base.residual[0].shape
        n_read = 3 * n_heads + 1
        written = self.workspace.take("written", base.residual[0], (self.n_sources, n_rows, d_model))
        read = self.workspace.take("read", base.residual[0], (LAYERS_A_PRODUCT * n_read, n_rows, d_model))
        written[0] = other.residual[0] - base.residual[0]
        n, first = 1, 0
        for layer in range(n_layers):
            self._write_heads(written[n : n + n_heads], layer, base, other)
            n += n_heads
            slot = layer % LAYERS_A_PRODUCT
            self._read_heads(read[slot * n_read : (slot + 1) * n_read - 1], layer, at)
            read[(slot + 1) * n_read - 1] = self._read_mlp(layer, at)
            if slot == LAYERS_A_PRODUCT - 1 or layer == n_layers - 1:
                together = read[: (slot + 1) * n_read]
                for scores, rows in zip(self.by_edge, self.rows, strict=True):
                    found = written[:n, rows].flatten(1) @ together[:, rows].flatten(1).T
                    scores[:n, first : first + len(together)].add_(found, alpha=share)
                first += len(together)
            written[n] = self._write_mlp(layer, base, other)
            n += 1
        assert at.final is not None
        for scores, rows, final in zip(self.by_edge, self.rows, at.final, strict=True):
            if rows.start < rows.stop:
                scores[:, -1].add_(written[:, rows.stop - 1] @ final, alpha=share)

    def _write_heads(self, out: Float[Tensor, "head row d_model"], layer: int, base: _Point, other: _Point) -> None:
        """What each head of a layer writes into the residual stream, more in one run than in the other."""
        change = (other.z[layer] - base.z[layer]).transpose(0, 1)
        torch.bmm(change, self.model.head_weights(layer), out=out)
        if not self.model.adds_attention:
            residual, attention, mlp = (each[layer][None] for each in (base.residual, base.attention, base.mlp))
            for head in range(len(out)):
                after = self.model.run_layer(layer, residual, attention=attention + out[head], mlp=mlp)
                out[head] = after[0] - base.residual[layer + 1]

    def _write_mlp(self, layer: int, base: _Point, other: _Point) -> Float[Tensor, "row d_model"]:
        if self.model.adds_attention:
            return other.mlp[layer] - base.mlp[layer]
        residual, attention, mlp = (each[layer][None] for each in (base.residual, base.attention, other.mlp))
        after = self.model.run_layer(layer, residual, attention=attention, mlp=mlp)
        return after[0] - base.residual[layer + 1]

    def _read_heads(self, out: Float[Tensor, "receiver row d_model"], layer: int, at: _Point) -> None:
        """The gradient of LD in the residual stream, through each head's q, k and v alone."""
        reader, n_heads = self.readers[layer], self.model.n_heads
        direction, scale = reader.heads.direction(at.residual[layer])
        for index, channel in enumerate(READ_CHANNELS):
            projection = reader.projections[channel]
            weight = projection.weight * reader.heads.gain.to(out.dtype)
            if reader.heads.kind == "layer":
                weight = weight - weight.mean(dim=-1, keepdim=True)
            gradient = (at.gradients[layer][channel] / scale[..., None]).transpose(0, 1)
            part = out[index * n_heads : (index + 1) * n_heads]
            by_group = gradient.unflatten(0, (len(weight), -1)).flatten(1, 2)
            torch.bmm(by_group, weight, out=part.view(len(weight), -1, out.shape[-1]))
            if reader.heads.kind != "none":
                # The norm's own derivative: nothing along its input. What a map gives beside its bias is its product
                # with that direction.
                along = (at.read[layer][channel] - projection.made_of(reader.heads.bias)).transpose(0, 1)
                along = along.repeat_interleave(n_heads // len(weight), dim=0)
                part.addcmul_((gradient * along).sum(-1, keepdim=True) / out.shape[-1], direction, value=-1)

    def _read_mlp(self, layer: int, at: _Point) -> Float[Tensor, "row d_model"]:
        """The gradient of LD in the residual stream, through the MLP alone."""
        residual = at.residual[layer]
        if not self.model.is_parallel:
            attention = at.attention[layer]
            if self.model.adds_attention:
                residual = residual + attention
            else:
                nothing = torch.zeros_like(attention)[None]
                residual = self.model.run_layer(layer, residual[None], attention=attention[None], mlp=nothing)[0]
        return self.readers[layer].mlp.pull_back(at.gradients[layer]["mlp"], residual)


def _size(model: Network, prompts: PromptSet, points: int) -> Size:
    """What edge attribution holds, a prompt."""
    width = prompts.width
    weights = sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())
    n_sources, n_read = 1 + model.n_layers * (model.n_heads + 1), 3 * model.n_heads + 1
    # What the backward pass keeps of a layer is at most about three times as wide as its linear maps together.
    backward = 3 * weights // model.d_model + model.n_layers * 2 * model.n_heads * width
    # A point keeps about nine tensors of the residual stream's width a layer; between two others, four points live.
    kept = 9 * model.n_layers * model.d_model * (2 if points == 1 else 4)
    products = (n_sources + LAYERS_A_PRODUCT * n_read) * model.d_model
    scores = 3 * n_sources * (model.n_layers * n_read + 1)
    return Size(4 * (width * (backward + kept + products) + scores), 1, 1, share=0.5)
