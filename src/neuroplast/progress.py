"""Progress on the terminal: one bar for the stages, one for the work inside a stage, with the time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """The study's observer for a terminal; on a pipe it prints one line a stage."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._stages = self._bars.add_task("stages", total=None, visible=False, note="")
        self._work = self._bars.add_task("", total=None, visible=False, note="")
        self._activity = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        if not self._quiet:
            self._console.print(line, soft_wrap=True, markup=False)

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage begins; `index` counts from 0."""
        self._activity = ""
        self._bars.update(self._stages, total=total, completed=index, visible=True, note=name)
        self._bars.update(self._work, visible=False)
        if not self._console.is_terminal:
            self.say(f"stage {index + 1} of {total}: {name}")

    def progress(self, activity: str, done: int, total: int, note: str = "") -> None:
        """Work inside the stage."""
        if activity != self._activity or done < self._bars.tasks[1].completed:
            self._bars.reset(self._work, total=total, description=activity)
            self._activity = activity
        self._bars.update(self._work, total=total, completed=done, visible=True, note=note)
