"""What a circuit keeps of its model, and the logit difference that its thresholds are shares of."""

from typing import Any

import numpy as np
from jaxtyping import Float

from neuroplast.circuits.circuit import Shape
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.models.network import Network
from neuroplast.statistics import Weights, bootstrap_weights, interval


def shape_of(model: Network) -> Shape:
    """What a circuit keeps of its model; the hash of the weights is for who has it at hand."""
    return Shape(model.name, model.n_layers, model.n_heads, model.d_model, model.is_parallel)


def require_difference(clean: Float[np.ndarray, "prompt"], weights: Weights | None = None) -> float:
    """|mean LD|, which shares are taken of.

    Args:
        clean: LD on the clean prompts.
        weights: from `bootstrap_weights`; None draws some.

    Raises:
        NothingFoundError: when its interval includes 0.
    """
    low, high = interval((bootstrap_weights(len(clean), 0) if weights is None else weights) @ clean)
    if low <= 0 <= high:
        raise NothingFoundError(
            f"LD {clean.mean():.2f} [{low:.2f}, {high:.2f}] is not apart from 0: the model does not do the task, and "
            "shares of LD mean nothing"
        )
    return abs(float(clean.mean()))


def require_positive(name: str, value: Any) -> None:
    """Refuses a setting that is no share of |LD|.

    Raises:
        InputError: when it is no positive number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive number, a share of |LD| such as 0.005, got {value!r}")
