"""The tables, the picture and the JUnit file of a comparison, from its saved document alone."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from neuroplast.report.style import DIVERGING, KIND_COLOURS

DAMAGED, SPARED, GREY = KIND_COLOURS["poisoned"], KIND_COLOURS["recovered"], KIND_COLOURS["base"]
STATUS_COLOURS = {
    "damaged": DAMAGED,
    "improved": KIND_COLOURS["tuned"],
    "spared": SPARED,
    "uncertain": GREY,
    "undefined": GREY,
}
SHOWN_FLIPS = 12
ENDS = ("", "_low", "_high")

Document = Mapping[str, Any]
Row = Sequence[Any]


PART_COLUMNS = (
    "part",
    "patched_at",
    *(f"{name}{end}" for name in ("undoes", "brings", "stored_share") for end in ENDS),
)


def part_rows(document: Document) -> list[Row]:
    """Every part: what it undoes and brings when it is patched, in logits, and its share of what is stored."""
    expressed = {row["name"].partition("@")[0]: row for row in document["expressed"]["parts"]}
    stored = {row["name"]: row for row in document["stored"]["parts"]}
    nothing = {"value": None, "ci95": None}
    rows: list[Row] = []
    for name in dict.fromkeys([*expressed, *stored]):
        found = expressed.get(name, {})
        parts = (found.get("undoes", nothing), found.get("brings", nothing), stored.get(name, {}).get("share", nothing))
        cells = [cell for each in parts for cell in (each["value"], *(each.get("ci95") or (None, None)))]
        at = "" if name not in expressed else found["name"].partition("@")[2] or "all positions"
        rows.append((name, at, *cells))
    return rows


def build_junit(document: Document) -> str:
    """A test case for the verdict, every task and text: failed where the gate says so, skipped where undefined."""
    gate, task, verdict = document["gate"], document["task"], document["verdict"]
    failed, unknown = set(gate["failed"]), set(gate["unknown"])
    suite = ElementTree.Element("testsuite", name="neuroplast audit")
    counts = {"tests": 0, "failures": 0, "skipped": 0}

    def add(name: str, failure: str | None, skipped: str | None) -> None:
        case = ElementTree.SubElement(suite, "testcase", classname=f"neuroplast.audit.{task}", name=name)
        counts["tests"] += 1
        for kind, tag, message in (("failures", "failure", failure), ("skipped", "skipped", skipped)):
            if message is not None:
                ElementTree.SubElement(case, tag, message=message)
                counts[kind] += 1
                break

    label, said = verdict["label"], verdict["statement"]
    untold = any(not name.startswith("damaged") for name in unknown)
    add("verdict", f"{label}: {said}" if label in failed else None, said if untold else None)
    changed = {} if label == "unchanged" else {task: document["behaviour"], **document["spared"]}
    for name, found in changed.items():
        status = found["status"]
        is_failed = status == "damaged" and bool(failed & {"damaged", f"damaged:{name}"})
        why = found.get("why", said) if status == "undefined" else None
        add(name, f"{name} was damaged: kept {show(found['kept'])}" if is_failed else None, why)
    for name, count in counts.items():
        suite.set(name, str(count))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def draw_audit(document: Document) -> Figure:
    """Four maps of heads, the shares of what is stored, the curves, and what was spared."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = parts
    maps = document["maps"]
    effects = max(abs(value) for name in ("effects_start", "effects_end") for row in maps[name] for value in row) or 1.0
    axes = top.subplots(1, 4)
    titles = {
        "effects_start": ("effect on LD, before", effects),
        "effects_end": ("effect on LD, after", effects),
        "undoes": ("expressed: patching it back undoes", None),
        "stored": ("stored: its weights add", None),
    }
    colours = LinearSegmentedColormap.from_list("effect", DIVERGING)
    for axis, (name, (title, bound)) in zip(axes, titles.items(), strict=True):
        grid = np.array(maps[name])
        limit = bound or float(np.abs(grid).max()) or 1.0
        image = axis.imshow(grid, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        top.colorbar(image, ax=axis, shrink=0.85, label="logits")
    groups, curves, spared = bottom.subplots(1, 3, width_ratios=(1, 1, 1.1))
    _draw_groups(groups, document)
    _draw_curves(curves, document)
    _draw_spared(spared, document)
    return figure


def _draw_groups(axis: Axes, document: Document) -> None:
    rows = {name: each for name, each in document["stored"]["sizes"].items() if each["share"]}
    places = np.arange(len(rows))
    axis.barh(places, [each["share"] for each in rows.values()], color=KIND_COLOURS["tuned"], label="the change")
    for place, each in zip(places, rows.values(), strict=True):
        if each["null"]:
            axis.plot(each["null"], [place] * len(each["null"]), "|", color=DAMAGED, markersize=14)
    axis.plot([], [], "|", color=DAMAGED, markersize=10, label="drift of the same size")
    axis.set_yticks(places, list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("share of the summed sizes of the ledger")
    axis.set_title("where it is stored", fontsize=10)
    axis.legend(fontsize=8, loc="best", framealpha=0.85)


def _draw_curves(axis: Axes, document: Document) -> None:
    styles = {"rank": ("-", "o"), "greedy": ("--", "s"), "random": (":", "")}
    for name, colour in (("expressed", KIND_COLOURS["poisoned"]), ("stored", KIND_COLOURS["tuned"])):
        for curve in document[name]["curves"]:
            values = [share["value"] for share in curve["shares"]]
            if None not in values and values:
                line, marker = styles[curve["order"]]
                label = f"{'heads patched' if name == 'expressed' else 'weights grafted'}, {curve['order']}"
                axis.plot(curve["sizes"], values, line, marker=marker, markersize=4, color=colour, label=label)
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("parts")
    axis.set_title("share of the change that is undone", fontsize=10)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, loc="best", framealpha=0.85)


def _draw_spared(axis: Axes, document: Document) -> None:
    rows = {name: each for name, each in document["spared"].items() if each.get("kept", {}).get("ci95")}
    for place, each in enumerate(rows.values()):
        drift = each["null"].get("range")
        if drift:
            low, high = (1 + end / each["logit_diff"]["start"]["value"] for end in drift)
            axis.barh(place, high - low, left=low, height=0.6, color=GREY, alpha=0.3)
        value, (low, high) = each["kept"]["value"], each["kept"]["ci95"]
        ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar([value], [place], xerr=ends, fmt="o", color=STATUS_COLOURS[each["status"]], capsize=3)
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.axvline(1 - document["settings"]["tolerance"], color=DAMAGED, linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    axis.invert_yaxis()
    axis.set_xlabel("share that is left; grey: what drift does; dashed: the tolerance")
    axis.set_title("what was spared" if rows else "no other task was measured", fontsize=10)


def summary_rows(document: Document) -> list[tuple[str, str, str, str]]:
    """What was found, a line each: section, what, value with its interval, and its null."""
    if document["verdict"]["label"] == "unchanged":
        return []
    behaviour, mechanism = document["behaviour"], document["mechanism"]
    expressed, stored = document["expressed"], document["stored"]
    null = behaviour["null"]
    drift = f"drift: {_range(null['range'])}, p fall {_number(null['p_fall'], 3)}, rise {_number(null['p_rise'], 3)}"
    shape = mechanism["null"]
    ld, accuracy = behaviour["logit_diff"], behaviour["accuracy"]
    rows = [
        ("behaviour", "LD before", show(ld["start"]), ""),
        ("behaviour", "LD after", show(ld["end"]), drift),
        ("behaviour", "accuracy before", show(accuracy["start"]), ""),
        ("behaviour", "accuracy after", show(accuracy["end"]), ""),
        ("behaviour", "share of LD that is left", show(behaviour["kept"]), behaviour["status"]),
        (
            "mechanism",
            "correlation of head effects",
            show(mechanism["similarity"]),
            f"1 − r on some of the prompts {_number(mechanism['distance'], 4)}, drift "
            f"{_range(shape['distance_range'], 4)}, p {_number(shape['p'], 3)}",
        ),
        ("mechanism", "gain", show(mechanism["gain"]), "1: as strong as before; below 0: against the task"),
        ("mechanism", "heads that flipped sign", _flips(mechanism["sign_flips"]), ""),
        ("expressed", "circuit's heads undo", show(expressed["circuit"]["undone"]), against(expressed["circuit"])),
        ("expressed", "all heads at END undo", show(expressed["all_heads"]), ""),
        ("expressed", "effective number of heads", *_concentration(expressed["concentration"])),
        ("stored", "circuit's heads", show(stored["circuit"]["share"]), against(stored["circuit"])),
    ]
    for name in (name for name in stored["groups"] if "<" not in name):
        squares = stored["groups"][name]["null"]["share_of_squared_change"]
        of_sizes = stored["sizes"][name]
        drifts = ", ".join(_number(value) for value in of_sizes["null"]) or "–"
        said = f"of sizes {_number(of_sizes['share'])} (drift {drifts}); of the squared change {_number(squares)}"
        rows.append(("stored", name, show(stored["groups"][name]["share"]), said))
    rows.append(("stored", "effective number of parts", *_concentration(stored["concentration"])))
    error = f"ledger {_number(stored['ledger']['sum'], 3)} of {_number(stored['ledger']['change'], 3)} measured"
    rows.append(("stored", "left over by the ledger", f"{stored['ledger']['error']:.2%}", error))
    rows += [(f"spared: {name}", each["status"], *_spared(each)) for name, each in document["spared"].items()]
    return rows


def _spared(found: Document) -> tuple[str, str]:
    if "kl_divergence" in found:
        null, perplexity = found["null"], found["perplexity"]
        moved = f"perplexity {_number(perplexity['start']['value'])} → {_number(perplexity['end']['value'])}"
        moved += f", kept {show(found['kept'])}"
        drift = f"drift {_range(null['kl_divergence_range'], 4)}, p {_number(null['p'], 3)}; {moved}"
        return f"KL {show(found['kl_divergence'], 3)}", drift
    if "change" in found:
        null, ld = found["null"], found["logit_diff"]
        drift = f"drift {_range(null['range'])}, p fall {_number(null['p_fall'], 3)}"
        kept = f"kept {show(found['kept'])}, effects r {_number(found['mechanism']['similarity']['value'])}"
        return f"LD {_number(ld['start']['value'])} → {show(ld['end'])}", f"{drift}; {kept}"
    return "–", found.get("why", "")


def _concentration(found: Document) -> tuple[str, str]:
    null = found["null"]
    drifts = ", ".join(_number(value, 1) for value in null["effective_number"]) or "–"
    ginis = ", ".join(_number(value) for value in null["gini"]) or "–"
    value = f"{_number(found['effective_number'], 1)} of {found['n_parts']}"
    return value, f"drift {drifts}; Gini {_number(found['gini'])}, drift {ginis}"


def against(found: Document) -> str:
    """What random sets of heads do, beside what a circuit's do, in words."""
    null = found["null"]
    if null["p"] is None:
        return null.get("why", "")
    sizes = f"{null['n']} random sets {_number(null['mean'])} ± {_number(null['sd'])}"
    said = {True: "localised", False: "not localised", None: null.get("why") or "undecided"}[found["localised"]]
    return f"{said}: {sizes}, p {_number(null['p'], 3)}, effect size {_number(null['effect_size'], 1)}"


def _flips(flips: Sequence[Document]) -> str:
    names = [flip["name"] for flip in flips]
    return f"{len(names)}" + (f": {', '.join(names[:SHOWN_FLIPS])}" if names else "")


def show(found: Document, digits: int = 2) -> str:
    """A value with its interval, or `undefined`."""
    if found["value"] is None:
        return "undefined"
    ends = found.get("ci95")
    return _number(found["value"], digits) + (f" {_range(ends, digits)}" if ends else "")


def _range(ends: Sequence[float] | None, digits: int = 2) -> str:
    return "–" if ends is None else f"[{_number(ends[0], digits)}, {_number(ends[1], digits)}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
