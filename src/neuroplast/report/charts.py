"""The interactive charts as plain plotly.js specifications; colours are left to the page's theme script.

A trace names what it shows in `meta.kind`; the script colours it from the CSS variable `--<kind>`.
"""

from html import escape
from typing import Any

from neuroplast.report import style
from neuroplast.report.changes import head_effects, head_name, largest_effect, training_paths
from neuroplast.report.results import Estimate, Stage, StudyResults

Spec = dict[str, Any]
"""`data`, `layout` and the least width in pixels, ready for `Plotly.newPlot`."""

_MARGIN = {"t": 12, "r": 16, "b": 44, "l": 56}


def build_charts(results: StudyResults) -> dict[str, Spec]:
    """Every chart of the page by the id of its element."""
    charts = {"training": training_chart(results)}
    for seed, stages in style.by_seed(style.reading_order(results)):
        charts[f"heads-{seed}"] = heads_chart(stages, largest_effect(results))
    return charts


def training_chart(results: StudyResults) -> Spec:
    """Logit difference over steps from base, with the measured stages as points with intervals."""
    data: list[Spec] = []
    bases = [stage for stage in results.stages if stage.kind == "base"]
    data += [_measured(stage, 0, first=stage is bases[0]) for stage in bases]
    named: set[str] = set()
    for path in training_paths(results):
        stage = path.stage
        group = " ".join(filter(None, (stage.kind, stage.poison))).replace("_", " ")
        first = group not in named
        named.add(group)
        shared = {"legendgroup": escape(group), "name": escape(group), "meta": {"kind": stage.kind}}
        if path.curve:
            data.append(
                shared
                | {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [step for step, _ in path.curve],
                    "y": [value for _, value in path.curve],
                    "line": {"width": 2.2, "dash": style.dash_of(stage, results)},
                    "showlegend": first,
                    "text": escape(stage.id),
                    "hovertemplate": "<b>%{text}</b><br>step %{x}: %{y:.2f}<extra></extra>",
                }
            )
        data.append(shared | _measured(stage, path.end, first=first and not path.curve))
    layout = {
        "height": 420,
        "margin": _MARGIN | {"t": 56},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "xaxis": {"title": {"text": "optimiser steps from base"}, "zeroline": False},
        "yaxis": {"title": {"text": "logit difference"}, "zeroline": True, "zerolinewidth": 1.6},
    }
    return {"data": data, "layout": layout, "width": 520}


def _measured(stage: Stage, step: int, *, first: bool) -> Spec:
    logit_diff = stage.behaviour.logit_diff
    up, down = _arms(logit_diff)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(stage.kind),
        "x": [step],
        "y": [logit_diff.value],
        "error_y": {"type": "data", "array": [up], "arrayminus": [down], "thickness": 1.5, "width": 4},
        "marker": {"size": 9},
        "showlegend": first,
        "meta": {"kind": stage.kind},
        "text": [escape(stage.id)],
        "customdata": [_interval(logit_diff)],
        "hovertemplate": "<b>%{text}</b> measured<br>%{y:.2f} %{customdata}<extra></extra>",
    }


def heads_chart(stages: tuple[Stage, ...], bound: float) -> Spec:
    """Head effects of the stages side by side, all on the colour axis from −`bound` to `bound`."""
    rows, columns = style.grid(len(stages))
    n_layers = len(stages[0].effects.mean)
    map_height = n_layers * min(max(380 // n_layers, 8), 20)
    inner = rows * map_height + (rows - 1) * _BETWEEN_MAPS
    layout: Spec = {
        "height": inner + 60 + 116,
        "margin": {"t": 60, "r": 12, "b": 116, "l": 52, "autoexpand": False},
        "hovermode": "closest",
        "annotations": [],
        "coloraxis": {"cmin": -bound, "cmid": 0, "cmax": bound, "colorbar": _COLOUR_BAR},
    }
    data: list[Spec] = []
    for index, stage in enumerate(stages):
        row, column = divmod(index, columns)
        number = str(index + 1) if index else ""
        left, right = (column + 0.08) / columns, (column + 0.92) / columns
        top = 1 - row * (map_height + _BETWEEN_MAPS) / inner
        layout[f"xaxis{number}"] = _MAP_AXIS | {
            "domain": [left, right],
            "anchor": f"y{number}",
            "dtick": _tick_step(len(stage.effects.mean[0])),
            "title": {"text": "head", "standoff": 4},
        }
        layout[f"yaxis{number}"] = _MAP_AXIS | {
            "domain": [max(top - map_height / inner, 0), top],
            "anchor": f"x{number}",
            "dtick": _tick_step(n_layers),
            "showticklabels": column == 0,
            "title": {"text": "layer" if column == 0 else ""},
        }
        title = "<br>".join(escape(line) for line in style.lines_of(stage))
        layout["annotations"].append(_MAP_TITLE | {"text": title, "x": left, "y": top})
        data.append(_heat_map(stage) | {"xaxis": f"x{number}", "yaxis": f"y{number}"})
    return {"data": data, "layout": layout, "width": 70 + columns * 105}


_BETWEEN_MAPS = 112
"""Pixels between two rows of heat maps: ticks of the upper, title of the lower."""

_MAP_AXIS = {"showgrid": False, "zeroline": False, "tickangle": 0}
_MAP_TITLE = {
    "xref": "paper",
    "yref": "paper",
    "xanchor": "left",
    "yanchor": "bottom",
    "align": "left",
    "showarrow": False,
}
_COLOUR_BAR = {
    "orientation": "h",
    "thickness": 12,
    "len": 320,
    "lenmode": "pixels",
    "x": 0,
    "xanchor": "left",
    "y": 0,
    "yanchor": "top",
    "ypad": 54,
    "xpad": 0,
    "outlinewidth": 0,
    "title": {"text": "effect on the logit difference", "side": "top"},
}


def _heat_map(stage: Stage) -> Spec:
    effects = dict(head_effects(stage))
    names = [[head_name(layer, head) for head in range(len(r))] for layer, r in enumerate(stage.effects.mean)]
    return {
        "type": "heatmap",
        "z": stage.effects.mean,
        "customdata": [[[name, _interval(effects[name])] for name in row] for row in names],
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "<b>%{customdata[0]}</b><br>effect %{z:.3f}<br>95 % %{customdata[1]}<extra></extra>",
    }


def _tick_step(count: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100) if count <= 6 * step or step == 100)


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f"[{low:.3f}, {high:.3f}]".replace("-", "−")


def _arms(estimate: Estimate) -> tuple[float, float]:
    if estimate.value is None or estimate.interval is None:
        return 0.0, 0.0
    low, high = estimate.interval
    return high - estimate.value, estimate.value - low
