"""What a run measured, prompt by prompt, read back and checked: the right names, the right shapes, finite numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from neuroplast.errors import InputError
from neuroplast.report.documents import REMEDY
from neuroplast.storage import load_tensors


def load_measured(path: Path, wanted: Mapping[str, tuple[int | None, ...]]) -> tuple[np.ndarray, ...]:
    """Some tensors of a safetensors file, in float64.

    Args:
        path: the file.
        wanted: by name, the shape; None stands for any size.

    Raises:
        InputError: when one is missing, has another shape, or holds what is no finite number.
        StorageError: when the file cannot be read.
    """
    tensors = load_tensors(path)
    found: list[np.ndarray] = []
    for name, shape in wanted.items():
        if name not in tensors:
            raise InputError(f"{path} has no {name}; {REMEDY}")
        values = tensors[name].double().numpy()
        fits = values.ndim == len(shape) and all(
            size in (None, actual) for size, actual in zip(shape, values.shape, strict=False)
        )
        if not fits:
            expected = " x ".join("any" if size is None else str(size) for size in shape)
            raise InputError(f"{path}: expected {name} of {expected}, got {list(values.shape)}; {REMEDY}")
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {name} holds a number that is not finite; {REMEDY}")
        found.append(values)
    return tuple(found)
