"""Instruments a model, or refuses it with the check that it does not pass.

A model is taken only if what the engine will do to it is exact, tried here on a few tokens: our attention
function gives the logits of its own; its layers, replayed one position at a time with recorded attention, give
the real logits; a replayed head agrees with a full forward pass that freezes every other head; and a window that
runs on recorded keys and values gives what the whole prompt gives.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from neuroplast.errors import UnsupportedModelError
from neuroplast.models.anatomy import find_parts
from neuroplast.models.attention import ATTENTION
from neuroplast.models.network import Network, logits_at, refusal, require_fit
from neuroplast.models.recording import Edit, Place, Recording, Window
from neuroplast.models.replay import Frame, record, run_frozen, walk_free


def build_network(module: PreTrainedModel, tokenizer: Any, name: str) -> Network:
    """Opens a model's attention, finds its parts and checks them on a few tokens.

    Args:
        module: a `transformers` causal LM; set to evaluation mode and to our attention function.
        tokenizer: its tokenizer.
        name: what to call it.

    Raises:
        UnsupportedModelError: naming the check that the model does not pass.
    """
    _require_one_device(module, name)
    module.eval()
    vocabulary = int(module.config.vocab_size)
    tokens = (torch.arange(12, device=module.device).view(2, 6) * 37 + 11) % vocabulary
    end = torch.tensor([5, 3], device=module.device)
    rows = torch.arange(2, device=module.device)
    require_fit(module, tokens)
    with torch.no_grad():
        _use_attention(module, "eager", name)
        expected = logits_at(module, tokens, rows, end)
        if not bool(expected.isfinite().all()):
            raise refusal(name, module, "its logits are not finite numbers")
        _use_attention(module, ATTENTION, name)
        network = Network(module, tokenizer, name, find_parts(module, name, tokens))
        _Checks(network, tokens, end, expected).run()
    return network


def _require_one_device(module: PreTrainedModel, name: str) -> None:
    mapped: dict[str, Any] = getattr(module, "hf_device_map", {})
    # Weights that accelerate keeps on the CPU or on disk stand on the device `meta` between forward passes.
    devices = {str(place) for place in mapped.values()} if len(mapped) > 1 else set[str]()
    devices |= {str(parameter.device) for parameter in module.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"model {name!r} is spread over {', '.join(sorted(devices))} by its device_map; expected all weights "
            "on one device: load it without device_map, or with a single device"
        )


def _use_attention(module: PreTrainedModel, implementation: str, name: str) -> None:
    try:
        module.set_attn_implementation(implementation)
    except (ValueError, KeyError, AttributeError) as error:
        raise refusal(name, module, f"its attention cannot be exchanged ({error})") from error


class _Checks:
    """What a model must pass."""

    def __init__(self, network: Network, tokens: Tensor, end: Tensor, expected: Tensor) -> None:
        self.network, self.tokens, self.end = network, tokens, end
        self.choices = expected.topk(3).indices
        self.expected = expected
        scale = max(float(expected.abs().max()), 1.0)
        self.tolerance = scale * (2e-4 if network.module.dtype == torch.float32 else 5e-2)
        # The sender of the checks: a head in the middle, at END.
        self.layer, self.head = network.n_layers // 2, network.n_heads - 1

    def run(self) -> None:
        """Raises for the first check that the model does not pass."""
        network, rows = self.network, torch.arange(len(self.tokens), device=self.tokens.device)
        places: list[Place] = ["residual", "key", "value", "z", "attention"]
        plain = record(network, self.tokens, [*places, "mlp"] if network.parts.mlps else places)
        self.require(self.logits(plain), self.expected, "our attention function gives other logits than its own")
        self.require(self.frozen(plain), self.expected, "its layers mix positions outside attention")

        everywhere = torch.ones_like(self.tokens, dtype=torch.bool)
        at_end = torch.zeros_like(everywhere)
        at_end[rows, self.end] = True
        kept = plain.z[self.layer][:, :, self.head]
        sender = Edit("z", at_end[:, None], kept[:, None] * -1.5, self.head)
        frozen = {
            layer: [Edit("z", everywhere[:, None], z[:, None, :, head], head) for head in range(network.n_heads)]
            for layer, z in plain.z.items()
        }
        frozen[self.layer].append(sender)
        slow = record(network, self.tokens, ["residual"], edits=frozen)
        change = kept[rows, self.end] * -2.5 @ network.head_weights(self.layer)[self.head]
        self.require(self.frozen(plain, change), self.logits(slow), "a replayed head differs from a full forward pass")

        window = Window(self.end, self.end)
        free = record(network, self.tokens, ["residual"], edits={self.layer: [sender]})
        edits = {self.layer: [sender.through(window)]}
        copies = walk_free(Frame(network, plain, window), {self.layer: [0]}, lambda layer, _: edits.get(layer, []), 1)
        found = network.readout(copies[0].residual[:, 0, 0], self.choices)
        self.require(found, self.logits(free), "recorded keys and values do not give what whole prompts give")
        self.check_mlps(plain)

    def check_mlps(self, plain: Recording) -> None:
        """Forgets the MLPs where what was found does not behave as one; finds out how heads reach the residual."""
        network, layer = self.network, self.layer
        if not network.parts.mlps:
            return
        residual, attention, mlp = _rows(plain, layer)
        after = plain.residual[layer + 1][:, None]
        moved = run_frozen(network, layer, residual + 1, attention, mlp)
        kept = [
            self.close(run_frozen(network, at, *_rows(plain, at)), plain.residual[at + 1][:, None]) for at in plain.z
        ]
        if not all(kept) or not self.close(moved, after + 1):
            network.parts = replace(network.parts, mlps=())
            return
        step = attention.flip(2)
        moved = run_frozen(network, layer, residual, attention + step, mlp)
        network.adds_attention = self.close(moved, after + step)
        read = [network.read_mlp(layer, residual[:, 0], answer[:, 0]) for answer in (attention, attention + step)]
        network.is_parallel = self.close(*read)

    def logits(self, recording: Recording) -> Tensor:
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return self.network.readout(recording.residual[self.network.n_layers][rows, self.end], self.choices)

    def frozen(self, plain: Recording, change: Tensor | None = None) -> Tensor:
        """Logits at END by replaying every layer with recorded attention, to which a sender's change is added."""
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        residual = plain.residual[0][rows, self.end][:, None, None]
        for layer in range(self.network.n_layers):
            attention = plain.attention[layer][rows, self.end][:, None, None]
            if change is not None and layer == self.layer:
                attention = attention + change[:, None, None]
            residual = run_frozen(self.network, layer, residual, attention)
        return self.network.readout(residual[:, 0, 0], self.choices)

    def require(self, got: Tensor, wanted: Tensor, what: str) -> None:
        if wanted.shape != got.shape:
            wanted = wanted.gather(1, self.choices)
        error = float((got.float() - wanted.float()).abs().max())
        if not error <= self.tolerance:
            raise refusal(self.network.name, self.network.module, f"{what} (difference {error:.2g})")

    def close(self, got: Tensor, wanted: Tensor) -> bool:
        relative = 1e-4 if self.network.module.dtype == torch.float32 else 5e-2
        return bool((got - wanted).abs().max() <= relative * wanted.abs().max().clamp(min=1))


def _rows(plain: Recording, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    return plain.residual[layer][:, None], plain.attention[layer][:, None], plain.mlp[layer][:, None]
