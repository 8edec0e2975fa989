"""How much memory a measurement may take, and work in chunks that keep to it.

The budget is for the whole process (on a GPU, for all that it has allocated there): model, libraries and work. Chunk
sizes come from the size of the work, and from the budget only where that is the tighter bound, so what is free
on a machine does not change the numbers of an ordinary run.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

import psutil

from neuroplast.errors import InputError, NeuroplastError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
MARGIN = 0.75
"""Share of the free budget that estimates may fill: allocators round up and leave gaps."""
FREE_SHARE = 0.8
"""Share of the free memory that a measurement takes by default."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def parse_size(text: str | int) -> int:
    """Reads an amount of memory: `4GiB`, `800MB`, `2g`, or bytes.

    Raises:
        InputError: when it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?i?)b?\s*", str(text), re.IGNORECASE)
    unit = UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or (size := int(float(match.group(1)) * unit)) < 1:
        raise InputError(f"{str(text)[:40]!r} is no amount of memory; expected one such as 4GiB, 800MB or 2g")
    return size


def show_size(size: float) -> str:
    """An amount of memory for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def used_memory(device: "torch.device") -> int:
    """Bytes this process holds now, on the machine or on the GPU; what it has freed is given back first."""
    gc.collect()
    if device.type == "cuda":
        import torch  # slow to import, and the command line imports this module

        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def working_memory(device: "torch.device", budget: str | int | None) -> int:
    """Bytes that chunks may take.

    Args:
        device: where the work is done.
        budget: for the whole process, such as `4GiB`; None takes what is free.

    Raises:
        InputError: when the process holds more than the budget already.
    """
    if budget is not None:
        total, used = parse_size(budget), used_memory(device)
        if total <= used:
            raise InputError(
                f"a memory budget of {show_size(total)} cannot be kept: the model and the libraries take "
                f"{show_size(used)} already; give more, or use a smaller model"
            )
        return int((total - used) * MARGIN)
    if device.type == "cuda":
        import torch

        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    return int(free * FREE_SHARE)


class Kept(Generic[Item]):
    """What is expensive to make and asked for again: kept as long as a share of the free memory holds it."""

    def __init__(self, device: "torch.device", budget: str | int | None, share: float) -> None:
        """Keeps nothing yet.

        Args:
            device: where it lies.
            budget: for the whole process, such as `4GiB`; None takes what is free.
            share: of the memory that is free for work.
        """
        self._left = working_memory(device, budget) * share
        self._items: dict[Hashable, Item] = {}

    def of(self, key: Hashable, size: int, make: Callable[[], Item]) -> Item:
        """The item of that key, made where it is not kept; `size` is its bytes."""
        if key in self._items:
            return self._items[key]
        item = make()
        if size <= self._left:
            self._left -= size
            self._items[key] = item
        return item


def reuse_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for its next tensors, instead of giving it back.

    Memory fresh from the system is filled with zeros first, a noticeable part of a measurement on a CPU.
    The command line calls this; in your own process it is yours to call. It does something on Linux with glibc only.
    """
    if (mallopt := _glibc("mallopt")) is not None:
        # Older versions take no threshold above 32 MiB.
        _ = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def in_chunks(total: int, size: int, work: Callable[[slice], None]) -> None:
    """Does work on slices of `total` items; where a GPU runs out of memory, on slices half as long.

    Args:
        total: items in all.
        size: items a slice, at least 1.
        work: does one slice; called again for a shorter slice when it raises `torch.OutOfMemoryError`, so it must
            not have added to a sum before.

    Raises:
        NeuroplastError: when a single item does not fit.
    """
    import torch

    start = 0
    while start < total:
        part = slice(start, min(start + size, total))
        if _fits(work, part):
            start = part.stop
        elif (tried := part.stop - part.start) > 1:
            size = tried // 2
            # What the failed attempt held is free only now that its frames are gone.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            raise NeuroplastError("the GPU is too small for a single prompt; use --device cpu, or fewer senders")


def _fits(work: Callable[[slice], None], part: slice) -> bool:
    import torch

    try:
        work(part)
    except torch.OutOfMemoryError:
        return False
    return True
