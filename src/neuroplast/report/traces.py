"""The picture of causal traces: layers × positions, a panel for each kind of restored value and each model.

With one or two models all panels stand in one row, a kind's models beside each other; with more, a kind is a row. All
share one colour scale, symmetric around zero. A star marks the positions that were noised.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from neuroplast.errors import InputError
from neuroplast.report import style
from neuroplast.report.figures import DPI, write_drawing

LABELS = {"residual": "residual stream", "attention": "attention", "mlp": "MLP"}
SIGN_NOTE = "change of the logit difference when the clean value is restored\npositive: it brings the answer back"
TWO = 2
"""Most models whose panels stand in one row."""


class _Noise(Protocol):
    @property
    def positions(self) -> Sequence[str]:
        """The noised positions."""
        ...


class TraceMaps(Protocol):
    """What is drawn of a trace, such as `neuroplast.causal_trace(...)` gives."""

    @property
    def kinds(self) -> Sequence[str]:
        """What was restored."""
        ...

    @property
    def positions(self) -> Sequence[str]:
        """Where."""
        ...

    @property
    def noise(self) -> _Noise:
        """Where the noise was."""
        ...

    @property
    def window(self) -> int:
        """Layers whose attention or MLP was restored together."""
        ...

    @property
    def mean(self) -> np.ndarray:
        """Mean effects, (kind, layer, position)."""
        ...


def draw_traces(results: Sequence[TraceMaps], names: Sequence[str], path: Path | str) -> None:
    """Draws the layer × position maps of traces into an `.svg` or `.png` file.

    Args:
        results: one trace a model, all of the same kinds, layers and positions.
        names: the models' names, such as `base` and `poisoned`.
        path: the file.

    Raises:
        InputError: for traces that cannot stand beside each other, or another kind of file.
        StorageError: when it cannot be written.
    """
    write_drawing(lambda: build_trace_figure(results, names), path, "traces are")


def build_trace_figure(results: Sequence[TraceMaps], names: Sequence[str]) -> Figure:
    """The figure.

    Args:
        results: one trace a model, all of the same kinds, layers and positions.
        names: the models' names.

    Raises:
        InputError: for no traces, as many names as there are not, or traces of different shapes.
    """
    if not results or len(results) != len(names):
        raise InputError(f"{len(results)} traces and {len(names)} names: expected at least one trace, and a name each")
    first = results[0]
    for result, name in zip(results, names, strict=True):
        mine, wanted = ((tuple(each.kinds), tuple(each.positions), each.mean.shape) for each in (result, first))
        if mine != wanted:
            raise InputError(
                f"the trace of {name!r} has other kinds, layers or positions than that of {names[0]!r}: trace both on "
                "the same prompts"
            )
    n_kinds, n_layers, n_positions = first.mean.shape
    rows, columns = (1, n_kinds * len(results)) if len(results) <= TWO else (n_kinds, len(results))
    width, height = max(0.33 * n_positions, 1.1), min(max(0.13 * n_layers, 1.6), 6.0)
    figure = Figure(
        figsize=((width + 0.15) * columns + 1.7, (height + 0.9) * rows + 0.4), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    # Blue helps in every picture; here that is what brings the answer back.
    colours = LinearSegmentedColormap.from_list("restores", style.DIVERGING[::-1])
    bound = max(float(np.abs(result.mean).max()) for result in results) or 1.0
    scale = ScalarMappable(Normalize(-bound, bound), colours)
    for number, panel in enumerate(panels.flat):
        kind, which = divmod(number, len(results))
        values = results[which].mean[kind]
        panel.imshow(values, cmap=colours, norm=scale.norm, origin="lower", aspect="auto")
        _label(panel, results[which], first.kinds[kind], names[which])
    bar = figure.colorbar(scale, ax=panels, shrink=0.9, pad=0.02)
    bar.set_label(SIGN_NOTE, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("restored at (* noised)", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    return figure


def _label(panel: Axes, result: TraceMaps, kind: str, name: str) -> None:
    title = LABELS.get(kind, kind)
    if kind != "residual" and result.window > 1:
        title += f", {result.window} layers"
    panel.set_title(f"{title}\n{name}".replace("$", r"\$"), fontsize=8)
    marked = [f"{each}*" if each in result.noise.positions else each for each in result.positions]
    panel.tick_params(labelsize=7, length=2)
    panel.locator_params(axis="y", integer=True)
    panel.set_xticks(range(len(marked)), [each.replace("$", r"\$") for each in marked], fontsize=7)
