"""How fast this machine multiplies matrices, and how long something takes on it."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuroplast.models.network import Network

ROWS = 4096
"""Rows that go through the map."""
PRODUCTS = 4
"""Products that are timed together."""
TRIES = 6
"""How often; the median counts."""


def matrix_rate(model: Network) -> float:
    """Operations a second of this machine's matrix products, at the widest linear map of a model's layers."""
    inner, outer = max((weight.shape for weight in linear_weights(model.layers[0])), key=math.prod)
    options: dict[str, Any] = {"device": model.device, "dtype": model.module.dtype}
    a, b = torch.randn(ROWS, inner, **options), torch.randn(inner, outer, **options)
    seconds = statistics.median(timed(lambda: [a @ b for _ in range(PRODUCTS)], model) for _ in range(TRIES))
    return PRODUCTS * 2 * ROWS * inner * outer / seconds


def linear_weights(part: nn.Module) -> list[Tensor]:
    """The weights of all linear maps under a module."""
    weights = [getattr(each, "weight", None) for each in part.modules() if not isinstance(each, nn.Embedding)]
    return [weight for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2]


def timed(work: Callable[[], Any], model: Network) -> float:
    """Seconds that something takes, on the model's device."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
