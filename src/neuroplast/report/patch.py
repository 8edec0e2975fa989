"""The table and the picture of one patching measurement, from its saved results alone."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from neuroplast.components import Edge, Node, parse_edge, parse_group
from neuroplast.errors import StorageError
from neuroplast.reading import parse_json
from neuroplast.report import style
from neuroplast.report.figures import DPI
from neuroplast.storage import atomic_file, load_metadata, load_tensors, write_text

BARS = 30
"""Most bars in a picture of rows that form no grid."""
PANELS_A_ROW = 6


@dataclass(frozen=True)
class PatchResults:
    """One measurement read back."""

    title: str
    """What was measured, in one line."""
    sign: str
    """What the sign of an effect means."""
    names: list[str]
    """What was patched, one a row."""
    mean: np.ndarray
    """Mean effect of each row over prompts."""
    low: np.ndarray
    """Lower end of its 95 % interval; NaN where there is none."""
    high: np.ndarray
    """Upper end."""


def load_patch(folder: Path) -> PatchResults:
    """Reads the results in a folder.

    Raises:
        StorageError: when they are missing or damaged.
    """
    path = folder / "effects.safetensors"
    tensors, described = load_tensors(path), load_metadata(path)
    try:
        settings, names = parse_json(described["settings"]), parse_json(described["rows"])
        mean = tensors["mean"].numpy()
        nothing = np.full_like(mean, np.nan)
        low, high = (tensors[name].numpy() if name in tensors else nothing for name in ("low", "high"))
        if not mean.shape == low.shape == high.shape == (len(names),) or not np.isfinite(mean).all():
            raise ValueError(f"{len(names)} rows do not have a number each")
        return PatchResults(_title(settings), described["sign"], names, mean, low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error}); remove it, then run the same command again") from error


def _title(settings: Mapping[str, Any]) -> str:
    """What was measured; what is as usual goes without saying."""
    title = f"{settings['model']}, {settings['method']}: {settings['senders']}"
    if "receivers" in settings:
        title += f" -> {settings['receivers']}"
    special = {"mlps": "MLPs {}", "into": "into the {} run", "knocked_out": "without {}", "steps": "{} steps"}
    usual = ("live", "clean", "")
    said = [form.format(settings[name]) for name, form in special.items() if settings.get(name, "") not in usual]
    return ", ".join([title, *said])


def write_patch_report(folder: Path) -> None:
    """Writes `effects.csv` (all rows, the largest first) and `effects.png` beside the results.

    Raises:
        StorageError: when the results are missing or damaged, or the folder cannot be written.
    """
    results = load_patch(folder)
    order = np.argsort(-np.abs(results.mean), kind="stable")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "effect", "low", "high"])
    for row in order:
        ends = ("" if np.isnan(end[row]) else float(end[row]) for end in (results.low, results.high))
        writer.writerow([results.names[row], float(results.mean[row]), *ends])
    write_text(folder / "effects.csv", text.getvalue())
    with atomic_file(folder / "effects.png") as temporary:
        FigureCanvasAgg(draw_patch(results)).print_png(temporary)


def draw_patch(results: PatchResults) -> Figure:
    """Heat maps where the rows form grids (heads, layers by position, layers by layers), else bars."""
    if len({name.partition("->")[2] for name in results.names}) == 1:
        # Edges into one receiver are told apart by their senders.
        results = replace(results, names=[name.partition("->")[0] for name in results.names])
    if "->" in results.names[0]:
        panels, axes = _edge_panels(results), ("receiver's layer", "sender's layer")
        note = "sum of absolute effects of; all edges between two layers"
    elif panels := _node_panels(results):
        axes, note = ("", "layer"), results.sign
    else:
        return _draw_bars(results)
    bound = max((float(np.nanmax(np.abs(values))) for _, _, values in panels), default=0.0) or 1.0
    signed = any(bool((values < 0).any()) for _, _, values in panels)
    colours = LinearSegmentedColormap.from_list("effects", style.DIVERGING if signed else style.DIVERGING[3:])
    rows = -(-len(panels) // PANELS_A_ROW)
    columns = -(-len(panels) // rows)
    height = min(max(0.13 * max(len(values) for _, _, values in panels), 1.6), 6.0)
    widths = [min(max(0.16 * values.shape[1], 1.0), 5.0) for _, _, values in panels]
    if rows > 1:
        widths = [max(widths)] * columns
    figure = Figure(
        figsize=(sum(widths) + columns * 0.5 + 1.6, (height + 0.9) * rows + 0.7), dpi=DPI, layout="constrained"
    )
    frames = figure.subplots(rows, columns, squeeze=False, width_ratios=widths)
    image = None
    for frame, (title, labels, values) in zip(frames.flat, panels, strict=False):
        # Row -1 is the input, below layer 0.
        bottom = -1.5 if "->" in results.names[0] or title == "input" else -0.5
        extent = (-0.5, values.shape[1] - 0.5, bottom, bottom + len(values))
        image = frame.imshow(
            values,
            cmap=colours,
            vmin=-bound if signed else 0,
            vmax=bound,
            origin="lower",
            aspect="auto",
            extent=extent,
        )
        frame.set_title(title.replace("$", r"\$"), fontsize=8)
        _label(frame, labels)
        if title == "input":
            frame.set_yticks([])
        if title.startswith("heads"):
            frame.set_xlabel("head", fontsize=7)
    for frame in frames.flat[len(panels) :]:
        frame.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=frames, shrink=0.9, pad=0.02)
        bar.set_label(note.replace("; ", "\n"), fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel(axes[0], fontsize=9)
    figure.supylabel(axes[1], fontsize=9)
    figure.suptitle(_short(results.title), fontsize=9)
    return figure


Panel = tuple[str, Sequence[str], np.ndarray]
"""Title, labels of the columns (none: their numbers), and values by row and column."""


def _node_panels(results: PatchResults) -> list[Panel]:
    """Heads as layers × heads, one panel a channel and position; other parts as layers × positions."""
    groups = [parse_group(name) for name in results.names]
    if any(len(group) > 1 for group in groups):
        return []
    nodes = [node for (node,) in groups]
    n_layers = 1 + max((node.layer or 0 for node in nodes), default=0)
    n_heads = 1 + max((node.head or 0 for node in nodes), default=0)
    grids: dict[str, np.ndarray] = {}
    by_position: dict[str, dict[str, np.ndarray]] = {}
    for node, value in zip(nodes, results.mean, strict=True):
        if node.kind == "head":
            title = "heads" + (f" <{node.channel}>" if node.channel else "") + _at(node)
            grids.setdefault(title, np.full((n_layers, n_heads), np.nan))[node.layer, node.head] = value
        else:
            nothing = np.full(1 if node.kind == "input" else n_layers, np.nan)
            column = by_position.setdefault(node.kind, {}).setdefault(node.position or "all", nothing)
            column[node.layer or 0] = value
    maps: list[Panel] = [(title, (), values) for title, values in grids.items()]
    maps += [(kind, list(columns), np.stack(list(columns.values()), axis=1)) for kind, columns in by_position.items()]
    # A handful of names is read more easily as bars than as a map of mostly nothing.
    filled = sum(int(np.isfinite(values).sum()) for _, _, values in maps)
    return maps if 2 * filled >= sum(values.size for _, _, values in maps) else []


def _edge_panels(results: PatchResults) -> list[Panel]:
    edges = [parse_edge(name) for name in results.names]
    n_layers = 1 + max((node.layer or 0 for edge in edges for node in (edge.source, edge.destination)), default=0)
    maps: dict[str, np.ndarray] = {}
    for edge, value in zip(edges, results.mean, strict=True):
        kind = edge.destination.channel or edge.destination.kind
        width = 1 if kind == "logits" else n_layers
        values = maps.setdefault(kind, np.zeros((n_layers + 1, width)))
        values[_source_row(edge), edge.destination.layer or 0] += abs(value)
    titles = {"q": "into queries", "k": "into keys", "v": "into values", "mlp": "into MLPs", "logits": "into logits"}
    return [(titles[kind], ("logits",) if kind == "logits" else (), maps[kind]) for kind in titles if kind in maps]


def _source_row(edge: Edge) -> int:
    """Row 0 is the input, row l + 1 layer l."""
    return 0 if edge.source.layer is None else edge.source.layer + 1


def _draw_bars(results: PatchResults) -> Figure:
    order = np.argsort(-np.abs(results.mean), kind="stable")[:BARS]
    figure = Figure(figsize=(7, 0.26 * len(order) + 1.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#444444", linewidth=0.9)
    for place, row in enumerate(order):
        value = results.mean[row]
        axes.barh(place, value, color=style.DIVERGING[1] if value < 0 else style.DIVERGING[-2], height=0.7)
        if np.isfinite(results.low[row]):
            axes.plot((results.low[row], results.high[row]), (place, place), color="#222222", linewidth=1)
    axes.set_yticks(range(len(order)), [_short(results.names[row], 40) for row in order], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(results.sign, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_short(results.title), fontsize=9)
    return figure


def _label(frame: Axes, labels: Sequence[str]) -> None:
    frame.tick_params(labelsize=7, length=2)
    frame.locator_params(integer=True)
    frame.yaxis.set_major_formatter(lambda value, _: "input" if value == -1 else f"{value:.0f}")
    if labels:
        frame.set_xticks(range(len(labels)), labels, fontsize=7)


def _at(node: Node) -> str:
    return f" @{node.position}" if node.position else ""


def _short(text: str, most: int = 100) -> str:
    """A dollar sign would start mathematics in matplotlib."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")
