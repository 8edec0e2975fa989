"""The processes that `accelerate launch` starts to train one model together.

Each takes its share of every batch. What is written, measured and told is the main process's. What one of them finds
wrong is raised in all of them: no process may wait for one that has ended, and the launcher, which stops the others
when one ends, must not stop the one that tells why.

Started alone, a process is the main one of one, and nothing here costs anything.
"""

import atexit
import json
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from neuroplast import errors
from neuroplast.errors import InputError, NeuroplastError
from neuroplast.reading import parse_json

if TYPE_CHECKING:
    from accelerate import PartialState

Made = TypeVar("Made")
Item = TypeVar("Item")

LONGEST_WAIT = timedelta(hours=1)
"""How long the others wait for one that measures or writes, before they take it for lost."""
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
"""Ways of launching that split the model itself, by the variable that tells of them."""


def launched() -> int:
    """How many processes were launched together; 1 where this one was started alone."""
    told = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")]
    return int(told[0]) if all(each.isdecimal() for each in told) and "MASTER_ADDR" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes and tells."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    count: int = 1
    """How many there are."""
    index: int = 0
    """Which one this is; 0 is the main one."""
    local_index: int = 0
    """Which one this is of those on its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch: neighbours, as many as any other's or one more or less."""
        return items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count]

    def place(self, device: str) -> str:
        """The device of this process, where a user named one for all.

        Raises:
            InputError: one GPU was named for several processes, or there are fewer GPUs than processes.
        """
        if self.count == 1 or device == "cpu":
            return device
        import torch  # slow to import, and the command line imports this module

        if device != "cuda":
            raise InputError(f"device {device!r} is one for {self.count} processes; use cuda, and each takes its own")
        gpus = torch.cuda.device_count()
        if 0 < gpus <= self.local_index:
            raise InputError(f"this machine has {gpus} GPUs, fewer than its processes; launch as many as it has GPUs")
        return f"cuda:{self.local_index}" if gpus else device

    @contextmanager
    def agreed(self) -> Generator[None]:
        """What any process finds wrong inside the block is raised in all of them, when all have come to its end.

        Raises:
            NeuroplastError: so it is; of several, that of the lowest index.
        """
        if self.count == 1:
            yield
            return
        wrong = ""
        try:
            yield
        except NeuroplastError as error:
            wrong = json.dumps([type(error).__name__, str(error)])
        if found := next(filter(None, self._told(wrong)), None):
            kind, message = parse_json(found)
            raise getattr(errors, kind, NeuroplastError)(message)

    def by_main(self, do: Callable[[], bool | None]) -> bool:
        """Has the main process do something that the others wait for; what it gives is everyone's."""
        if self.count == 1:
            return bool(do())
        with self.agreed():
            done = self.is_main and bool(do())
        return "True" in self._told(str(done))

    def first_on_machine(self, do: Callable[[], Made]) -> Made:
        """Has all do something, one of each machine before the others, so that what it fetches is there for them."""
        made: list[Made] = []
        for turn in (True, False):
            with self.agreed():
                if turn == (self.local_index == 0):
                    made.append(do())
        return made[0]

    def require_same(self, value: object, message: str) -> None:
        """Checks that all processes see the same.

        Raises:
            InputError: with the message, when they do not.
        """
        if self.count > 1 and len(set(self._told(repr(value)))) > 1:
            raise InputError(message)

    def _told(self, text: str) -> list[str]:
        """What every process has to say, in their order."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather, pad_across_processes

        row = torch.tensor([[*text.encode(), 0]], dtype=torch.uint8, device=PartialState().device)
        rows: Any = gather(pad_across_processes(row, dim=1))
        return [bytes(each).rstrip(b"\0").decode() for each in rows.tolist()]


def join(device: str) -> Processes:
    """Joins the processes that were launched together, once all have come here.

    Args:
        device: what the model is on, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: they were launched to split the model, which is not done here.
    """
    if launched() == 1:
        return Processes()
    if split := [name for name in SHARDED if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]:
        raise InputError(f"every process holds the whole model: launch without --use_{split[0].lower()}")
    state = _joined(device == "cpu")
    return Processes(state.num_processes, state.process_index, state.local_process_index)


def wait_for_all() -> None:
    """Waits until every process has come here to fail, each with its own exit code."""
    if launched() > 1:
        _joined(on_cpu=True).wait_for_everyone()
        # The launcher stops all that are left when the first has failed, but what is left is only to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _joined(on_cpu: bool) -> "PartialState":
    import torch
    from accelerate import PartialState

    is_new = not torch.distributed.is_initialized()
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    if is_new:
        atexit.register(state.destroy_process_group)
    return state
