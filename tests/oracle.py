"""The definitions, slow and obvious: one full forward pass of one unpadded prompt a number, plain hooks, no engine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from architectures import ARCHITECTURES
from neuroplast.components import Node
from neuroplast.tasks.prompts import PromptSet

Key = tuple[str, int, int]
"""What (q, k, v, keys, pattern, values, z, attention, mlp, mlp_input, residual), layer, head; the head is 0 where
there is none."""


@dataclass
class Pass:
    """One forward pass: what to replace, what was seen."""

    replace: Mapping[Key, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By place, the positions (a mask) and the values there."""
    add: Mapping[str, Tensor] = field(default_factory=dict)
    """By module name, what is added to its input."""
    seen: dict[Key, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def through(self, key: Key, value: Tensor) -> Tensor:
        """Replaces and keeps a value of shape (pos, …)."""
        if key in self.replace:
            where, new = self.replace[key]
            value = torch.where(where[:, None], new.to(value.dtype), value)
        self.seen[key] = value
        return value

    def by_query(self, key: Key, seen: Tensor, result: Callable[[Tensor], Tensor]) -> Tensor:
        """What comes of keys or values of shape (pos, d); of others for the queries where they are replaced."""
        self.seen[key] = seen
        if key not in self.replace:
            return result(seen)
        where, others = self.replace[key]
        return torch.where(where[:, None], result(others), result(seen))


current: list[Pass] = []


def attention(module, query, key, value, attention_mask, scaling=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    now, layer = current[-1], module.layer_idx
    heads = []
    for head in range(query.shape[1]):
        q, k, v = (
            now.through((name, layer, head), each[0, head])
            for name, each in zip("qkv", (query, key, value), strict=True)
        )
        scale = scaling or q.shape[-1] ** -0.5

        def attend(k, scale=scale, q=q):
            return (q @ k.T * scale + attention_mask[0, 0]).softmax(-1)

        pattern = now.by_query(("keys", layer, head), k, attend)
        pattern = now.through(("pattern", layer, head), pattern)
        z = now.by_query(("values", layer, head), v, lambda v, pattern=pattern: pattern @ v)
        heads.append(now.through(("z", layer, head), z))
    return torch.stack(heads, dim=1)[None], None


AttentionInterface.register("oracle", attention)
AttentionMaskInterface.register("oracle", eager_mask)


def exact_norm(norm):
    """The library's RMSNorm rounds to float32; differences need all digits."""
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    gain = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight
    return lambda x: gain * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


class Oracle:
    """A plain model of one family."""

    def __init__(self, model: PreTrainedModel, family: str) -> None:
        self.model, self.names = model, ARCHITECTURES[family]
        self.n_layers, self.n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
        model.set_attn_implementation("oracle")
        if model.dtype == torch.float64:
            for norm in (part for part in model.modules() if type(part).__name__.endswith("RMSNorm")):
                norm.forward = exact_norm(norm)

    def part(self, name: str, layer: int):
        return self.model.get_submodule(self.names.part(name, layer))

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        replace: Mapping[Key, tuple[Tensor, Tensor]] | None = None,
        add: Mapping[str, Tensor] | None = None,
    ) -> Pass:
        """Runs one prompt of shape (pos,)."""
        now = Pass(replace or {}, add or {})
        with ExitStack() as stack:

            def on_input(module, act):
                stack.callback(module.register_forward_pre_hook(act, with_kwargs=True).remove)

            def on_output(module, act):
                stack.callback(module.register_forward_hook(act).remove)

            def entering(key):
                def act(_, args, kwargs):
                    if args:
                        return (now.through(key, args[0][0])[None], *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": now.through(key, kwargs["hidden_states"][0])[None]}

                return act

            def leaving(key):
                def act(_, __, output):
                    value = output[0] if isinstance(output, tuple) else output
                    new = now.through(key, value[0])[None]
                    return (new, *output[1:]) if isinstance(output, tuple) else new

                return act

            for layer in range(self.n_layers):
                on_input(self.part("layer", layer), entering(("residual", layer, 0)))
                on_output(self.part("attention", layer), leaving(("attention", layer, 0)))
                on_input(self.part("mlp", layer), entering(("mlp_input", layer, 0)))
                on_output(self.part("mlp", layer), leaving(("mlp", layer, 0)))
            for name, change in now.add.items():

                def plus(_, args, kwargs, name=name, change=change):
                    now.seen[("read", name, 0)] = args[0][0]
                    return (args[0] + change[None], *args[1:]), kwargs

                on_input(self.model.get_submodule(name), plus)
            current.append(now)
            stack.callback(current.pop)
            now.logits = self.model(input_ids=tokens[None], use_cache=False).logits[0, -1]
        return now


def key_of(node: Node) -> Key:
    """Where a node's value is."""
    kind = {"input": "residual", "head": "z"}.get(node.kind, node.kind)
    return (node.channel or kind, node.layer or 0, node.head or 0)


def read_key(node: Node) -> Key:
    """Where what a receiver reads is."""
    return ("mlp_input", node.layer or 0, 0) if node.kind == "mlp" else key_of(node)


@dataclass
class Prompt:
    """One prompt without its padding."""

    clean: Tensor
    counterfactual: Tensor
    answer: int
    foil: int
    positions: Mapping[str, int]

    def where(self, position: str | None) -> Tensor:
        index = torch.arange(len(self.clean))
        if position is None:
            return index >= 0
        if position == "other":
            return ~torch.isin(index, torch.tensor(list(self.positions.values())))
        return index == (int(position) if position.isdecimal() else self.positions[position])

    def ld(self, now: Pass) -> Tensor:
        return now.logits[self.answer] - now.logits[self.foil]


def prompts_of(prompts: PromptSet) -> list[Prompt]:
    found = []
    for row in range(len(prompts)):
        length = int(prompts.positions["end"][row]) + 1
        found.append(
            Prompt(
                prompts.clean[row, :length], prompts.counterfactual[row, :length],
                int(prompts.answer[row]), int(prompts.foil[row]),
                {name: int(index[row]) for name, index in prompts.positions.items()},
            )
        )  # fmt: skip
    return found


def frozen(oracle: Oracle, clean: Pass, other: Pass, sender: Iterable[Node], prompt: Prompt, mlps: str) -> dict:
    """Every head (and MLP, where asked) at its clean value, except the sender at its positions."""
    everywhere = prompt.where(None)
    kinds = ("z", "mlp") if mlps == "frozen" else ("z",)
    replace = {key: (everywhere, value) for key, value in clean.seen.items() if key[0] in kinds}
    for node in sender:
        key, where = key_of(node), prompt.where(node.position)
        # A part that is named twice is replaced wherever either name says.
        base = replace.get(key, (torch.zeros_like(where), clean.seen[key]))
        mixed = torch.where(where[:, None], other.seen[key], base[1])
        replace[key] = (base[0] | where, mixed)
    return replace


def path_effect(
    oracle: Oracle,
    prompt: Prompt,
    sender: Sequence[Node],
    receivers: Sequence[Node],
    mlps: str = "live",
    knocked: Mapping[Key, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Steps A to D of path patching."""
    knocked = knocked or {}
    other, clean = oracle.run(prompt.counterfactual, knocked), oracle.run(prompt.clean, knocked)
    third = oracle.run(prompt.clean, frozen(oracle, clean, other, sender, prompt, mlps))
    if receivers[0].kind == "logits":
        return prompt.ld(third) - prompt.ld(clean)
    replace = dict(knocked)
    for node in receivers:
        key = read_key(node)
        where, value = prompt.where(node.position), third.seen[key]
        if key in replace:
            where, value = replace[key][0] | where, value
        replace[key] = (where, value)
    return prompt.ld(oracle.run(prompt.clean, replace)) - prompt.ld(clean)


def activation_effect(oracle: Oracle, prompt: Prompt, site: Sequence[Node], into: str = "clean") -> Tensor:
    """The other run's value at a site, everything after it free."""
    runs = {"clean": oracle.run(prompt.clean), "counterfactual": oracle.run(prompt.counterfactual)}
    base, tokens = runs.pop(into), prompt.clean if into == "clean" else prompt.counterfactual
    (other,) = runs.values()
    replace: dict[Key, tuple[Tensor, Tensor]] = {}
    for node in site:
        key, where = key_of(node), prompt.where(node.position)
        replace[key] = (where | replace[key][0] if key in replace else where, other.seen[key])
    return prompt.ld(oracle.run(tokens, replace)) - prompt.ld(base)


def noised_run(oracle: Oracle, prompt: Prompt, noise: Tensor, restored: Mapping[Key, tuple[Tensor, Tensor]]) -> Pass:
    """A full forward pass whose embeddings get noise, with values replaced by hooks."""
    embedding = oracle.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output + noise)
    try:
        return oracle.run(prompt.clean, restored)
    finally:
        handle.remove()


def draw_noise(prompt: Prompt, key: tuple[int, int, int], noised: Iterable[str], sigma: float, d_model: int) -> Tensor:
    """The noise of a prompt by its definition, for (seed, draw, row)."""
    noise = torch.zeros(len(prompt.clean), d_model)
    for position in {prompt.positions[name] for name in noised}:
        values = np.random.default_rng((*key, position)).standard_normal(d_model, dtype=np.float32)
        noise[position] = sigma * torch.from_numpy(values)
    return noise


def tracing_effect(oracle: Oracle, prompt: Prompt, noises: Iterable[Tensor], nodes: Iterable[Node]) -> Tensor:
    """What clean values bring back in noised runs, the mean over the draws."""
    clean = oracle.run(prompt.clean)
    restored = {key_of(node): (prompt.where(node.position), clean.seen[key_of(node)]) for node in nodes}
    changes = [
        prompt.ld(noised_run(oracle, prompt, noise, restored)) - prompt.ld(noised_run(oracle, prompt, noise, {}))
        for noise in noises
    ]
    return torch.stack(changes).mean()


def attribution(
    oracle: Oracle, prompt: Prompt, source: Node, destination: Node, points: int, method: str, step: float = 1e-4
) -> Tensor:
    """Edge attribution by central differences: LD when the receiver reads a little of what the sender changes."""
    clean, other = oracle.run(prompt.clean), oracle.run(prompt.counterfactual)
    everywhere = prompt.where(None)

    def at(way: float) -> dict:
        mixed = (1 - way) * clean.seen["residual", 0, 0] + way * other.seen["residual", 0, 0]
        return {("residual", 0, 0): (everywhere, mixed)}

    norm = oracle.names.norm_before(destination)
    total = torch.zeros((), dtype=torch.float64)
    for point in range(points):
        begin = at(point / points)
        here = oracle.run(prompt.clean, begin)
        if method == "ceap":
            base, changed = here, oracle.run(prompt.clean, at((point + 1) / points))
        else:
            base, changed = clean, other
        # What the sender writes, seen in what the receiver's norm is given, all else at its base value.
        nothing = torch.zeros_like(clean.seen["residual", 0, 0])
        fixed = frozen(oracle, base, changed, (), prompt, "frozen") | {
            ("residual", 0, 0): (everywhere, base.seen["residual", 0, 0])
        }
        sent = frozen(oracle, base, changed, (source,), prompt, "frozen")
        sent = {("residual", 0, 0): fixed["residual", 0, 0]} | sent
        reads = [oracle.run(prompt.clean, each, {norm: nothing}).seen["read", norm, 0] for each in (fixed, sent)]
        change = reads[1] - reads[0]
        values = []
        for sign in (1, -1):
            added = {norm: sign * step * change}
            if destination.kind == "head":
                read = oracle.run(prompt.clean, begin, added).seen[read_key(destination)]
                now = oracle.run(prompt.clean, begin | {read_key(destination): (everywhere, read)})
            else:
                now = oracle.run(prompt.clean, begin, added)
            values.append(prompt.ld(now))
        total += (values[0] - values[1]) / (2 * step) / (1 if method == "ceap" else points)
    return total
