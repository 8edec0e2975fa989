"""Prompts in chunks: short ones together, so that little is padded; as many as suit the processor and the memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuroplast.errors import InputError
from neuroplast.interventions.selection import position_mask
from neuroplast.memory import in_chunks, show_size, working_memory
from neuroplast.models.network import Network
from neuroplast.tasks.metric import choices, log_odds
from neuroplast.tasks.prompts import PromptSet

ROWS = {"cpu": 2048, "cuda": 16384}
"""Rows (prompt × position, or copy × prompt × position) that go through a layer at once: enough for full speed of the
matrix products."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all); the unit is the work's own."""


@dataclass(frozen=True)
class Chunk:
    """Some of the prompts, on the model's device, cut off after the last END."""

    prompts: PromptSet
    """The prompts."""
    rows: Int[Tensor, "prompt"]
    """Their places among all prompts; on the CPU."""
    changed: Bool[Tensor, "prompt pos"]
    """Where the two prompts can differ inside the model: from the first token that differs up to END."""

    @property
    def end(self) -> Int[Tensor, "prompt"]:
        """Index of END."""
        return self.prompts.positions["end"]

    @property
    def key(self) -> tuple[bytes, ...]:
        """What tells it from other chunks: which prompts it has, and what it makes of them."""
        prompts = self.prompts
        parts = (self.rows, prompts.clean, prompts.counterfactual, prompts.answers, prompts.foils)
        places = (prompts.positions[name] for name in sorted(prompts.positions))
        return tuple(each.cpu().numpy().tobytes() for each in (*parts, *places))

    def where(self, position: str | None) -> Bool[Tensor, "prompt pos"]:
        """The positions that a node's position names, as far as they can differ."""
        return position_mask(self.prompts, position) & self.changed


@dataclass(frozen=True)
class Size:
    """What a measurement holds, in bytes a prompt of a given width."""

    recorded: int
    """For what is recorded of it."""
    copy: int
    """For each copy that goes up the layers."""
    copies: int
    """Copies that go up the layers together, as far as memory lets them."""
    share: float = 1.0
    """Share of the usual rows that a chunk takes, where each row brings much more with it."""


def rows_at_once(model: Network) -> int:
    """Rows that go through a layer at once, on the model's device."""
    return ROWS["cuda" if model.device.type == "cuda" else "cpu"]


def copies_at_once(model: Network, positions: Int[Tensor, "prompt kept"]) -> int:
    """Copies of the prompts, at some positions of each, that go through a layer at once; at least one."""
    return max(1, rows_at_once(model) // positions.numel())


def in_prompt_chunks(
    model: Network,
    prompts: PromptSet,
    size: Size,
    work: Callable[[Chunk, int, Callable[[], None]], None],
    steps: int,
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> None:
    """Does work on chunks of prompts, within a memory budget.

    Args:
        model: the model.
        prompts: all prompts.
        size: what one prompt takes.
        work: does one chunk, with the copies that it may hold at once and a function to call after each of `steps`.
        steps: how often `work` calls that function.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: when the budget is too small for a single prompt.
    """
    free = working_memory(model.device, memory)
    if memory is not None:
        free = max(0, free - _block_bytes(model))
    width = prompts.width
    rows = int(rows_at_once(model) * size.share)
    at_once = max(1, min(rows // width, free // (size.recorded + size.copies * size.copy)))
    # As many chunks as it takes, all of a size.
    at_once = math.ceil(len(prompts) / math.ceil(len(prompts) / at_once))
    copies = min(size.copies, (free - size.recorded) // size.copy)
    if copies < 1:
        raise InputError(
            f"{show_size(free)} of memory are left for the work, and one prompt takes "
            f"{show_size(size.recorded + size.copy)}: give a larger budget, or shorter prompts"
        )
    order = torch.sort(prompts.positions["end"], stable=True).indices
    done = 0

    def run(part: slice) -> None:
        chunk = build_chunk(prompts, order[part], model.device)

        def tick() -> None:
            nonlocal done
            done += len(chunk.rows)
            if progress is not None:
                progress(min(done, total - 1), total)

        work(chunk, copies, tick)

    total = steps * len(prompts)
    in_chunks(len(prompts), at_once, run)
    if progress is not None:
        progress(total, total)


def _block_bytes(model: Network) -> int:
    """Bytes that a block of rows takes inside a layer: about as wide as its linear maps together."""
    weights = sum(parameter.numel() for parameter in model.layers[0].parameters())
    return rows_at_once(model) * weights // model.d_model * model.module.dtype.itemsize


def build_chunk(prompts: PromptSet, rows: Int[Tensor, "row"], device: torch.device) -> Chunk:
    """Picks some prompts, cuts them off after the last END, and moves them to a device."""
    picked = prompts.pick(rows)
    width = picked.width
    clean, counterfactual = picked.clean[:, :width], picked.counterfactual[:, :width]
    inside = torch.arange(width) <= picked.positions["end"][:, None]
    changed = ((clean != counterfactual).cumsum(dim=1) > 0) & inside
    cut = replace(picked, clean=clean, counterfactual=counterfactual)
    return Chunk(cut.to(device), rows, changed.to(device))


def logit_difference(
    model: Network, residual: Float[Tensor, "prompt copy d_model"], prompts: PromptSet
) -> Float[Tensor, "prompt copy"]:
    """LD from the residual stream that leaves the last layer at END, in float32; see `neuroplast.tasks.metric`.

    Args:
        model: the model.
        residual: copies of the prompts' residual streams.
        prompts: whose answers and foils are compared.
    """
    prompts = prompts.to(residual.device)
    tokens, copies = choices(prompts), residual.shape[1]

    def by_copy(values: Tensor) -> Tensor:
        return values[:, None].expand(-1, copies, -1).flatten(0, 1)

    if tokens.shape[1] == 2:
        logits = model.readout(residual.flatten(0, 1), by_copy(tokens))
    else:
        # Sets are much the same in all prompts: their part of the unembedding is fetched once, not for every row.
        wanted, places = tokens.unique(return_inverse=True)
        logits = model.readout(residual.flatten(0, 1), wanted).gather(1, by_copy(places))
    return log_odds(logits.view(*residual.shape[:2], -1), prompts)
