"""The attention function that opens any `transformers` model: queries, keys, values, pattern and output.

One function is registered with the library's `AttentionInterface`. It receives every layer's q, k and v after
position encoding and hands them to the active *tap* together with the family's own eager function, so a tap can
record or replace q, k, v, the pattern or z in every architecture, grouped queries included. The tap lives in a
context variable: nothing is attached to the model and nothing can be left behind.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ATTENTION = "neuroplast"


class _Ungrouped:
    """An attention module as its eager function sees it, with a key and a value for every query head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention as the model calls it; `attend` computes it as the model's family does."""

    module: nn.Module
    """The attention module."""
    query: Float[Tensor, "prompt head pos d_head"]
    """Queries, position-encoded."""
    key: Float[Tensor, "prompt kv_head pos d_head"]
    """Keys, position-encoded; as many as the model has key-value heads."""
    value: Float[Tensor, "prompt kv_head pos d_value"]
    """Values."""
    mask: Float[Tensor, "_ _ _ _"] | None
    """What the model adds to the attention scores, (prompt or 1, 1, query, key): 0 where a query may look, the
    least number where not. In a window, that of the whole prompts."""
    options: Mapping[str, Any]
    """Whatever else the family passes: scaling, soft cap, …"""

    def attend(
        self,
        query: Float[Tensor, "prompt head query d_head"],
        key: Float[Tensor, "prompt keys key d_head"],
        value: Float[Tensor, "prompt keys key d_value"],
        mask: Float[Tensor, "#prompt 1 query key"] | None,
    ) -> tuple[Float[Tensor, "prompt query head d_value"], Float[Tensor, "prompt head query key"]]:
        """The family's eager function on any q, k and v; `keys` is the number of key-value or of query heads.

        Returns:
            Each head's value z, and the attention pattern.
        """
        eager = sys.modules[type(self.module).__module__].eager_attention_forward
        ungrouped = key.shape[1] == query.shape[1] != self.key.shape[1]
        module = _Ungrouped(self.module) if ungrouped else self.module
        return eager(module, query, key, value, mask, **self.options)

    def ungroup(self, keys: Float[Tensor, "prompt keys key d"]) -> Float[Tensor, "prompt head key d"]:
        """Keys or values with one for every query head, which may then differ."""
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[1], dim=1)


Tap = Callable[[AttentionCall], Float[Tensor, "prompt pos head d_head"]]
"""Receives a layer's attention; returns the per-head output z to go on with."""

_tap: ContextVar[Tap | None] = ContextVar("neuroplast_tap", default=None)


def attend_plainly(call: AttentionCall) -> Float[Tensor, "prompt pos head d_head"]:
    """What the model does by itself."""
    return call.attend(call.query, call.key, call.value, call.mask)[0]


@contextmanager
def tapped(tap: Tap) -> Generator[None]:
    """Hands every attention computed inside the block to `tap`; the former tap is back after it, also on an error."""
    token = _tap.set(tap)
    try:
        yield
    finally:
        _tap.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    call = AttentionCall(module, query, key, value, attention_mask, options)
    return (_tap.get() or attend_plainly)(call), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
