"""How results look in a terminal. Results go to stdout, progress and errors to stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from neuroplast.memory import show_size

CLAIMS = ("amplification", "localisation_expressed", "localisation_stored", "specificity", "plasticity")
"""A study's findings, in the order in which a grid's table has them."""
CIRCUIT_ROWS = 40
"""Most nodes that are printed."""

stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
stderr = Console(stderr=True, highlight=False)


def print_story(summary: dict[str, Any]) -> None:
    """The table of a study, stage by stage."""
    right = "IO>S" if summary["task"] == "ioi" else "right>wrong"
    table = build_table("stage", "steps", "LD [95 %]", right, "top-1", "effects ~ base", "undone")
    for stage in summary["stages"]:
        behaviour, similarity = stage["behaviour"], stage["similarity_to_base"]
        restored = stage["restoration"] or {}
        ld = behaviour["logit_diff"]
        table.add_row(
            stage["id"],
            str(stage["step"]),
            _with_interval(ld["mean"], ld["ci95"]),
            f"{behaviour['accuracy']:.0%}",
            f"{behaviour['top1']:.0%}",
            _with_interval(similarity["effects"], similarity["ci95"]["effects"]),
            _with_interval(restored.get("damage_undone"), restored.get("ci95", {}).get("damage_undone")),
        )
    stdout.print(table)
    stdout.print(
        "LD: logit(answer) - logit(foil), of several the log odds, mean over held-out prompts. effects ~ base: "
        "correlation of the effects of all heads with the base's.\ncontrol/equal_steps: clean training of the "
        "undamaged base for as many steps as the recovery took.",
        style="dim",
    )


def print_grid(result: dict[str, Any]) -> None:
    """The table of a grid: the last stage of each kind of every cell, and what became of its findings."""
    kinds = ("base", "poisoned", "recovered")
    table = build_table("cell", *(f"LD {kind}" for kind in kinds), "undone", "findings")
    failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
    for cell in result["cells"]:
        if cell in failed:
            table.add_row(escape(cell["name"]), "failed", *[""] * (len(kinds) + 1))
            continue
        last = {stage["kind"]: stage for stage in cell["stages"]}
        logit_diffs = [last[kind]["logit_diff"] for kind in kinds]
        undone = last["recovered"]["damage_undone"]
        table.add_row(
            escape(cell["name"]),
            *(_with_interval(each["mean"], each["ci95"]) for each in logit_diffs),
            _with_interval(undone["value"], undone["ci95"]),
            " ".join({True: "yes", False: "no", None: "?"}[cell["claims"][name]] for name in CLAIMS),
        )
    stdout.print(table)
    stdout.print(
        "LD: mean over held-out prompts, with 95 % interval. findings: amplification, expressed, stored, specificity, "
        "plasticity; ? is undecided.",
        style="dim",
    )
    for cell in failed:
        stdout.print(f"failed  {cell['name']}: {cell['why']}", style="red", soft_wrap=True, markup=False)


def print_plan(plan: dict[str, Any]) -> None:
    """The table of what a study, or each study of a grid, will take."""
    studies, totals = plan["studies"], plan["totals"]
    if len(studies) == 1:
        _print_stages(studies[0])
    else:
        table = build_table("cell", "stages", "to make", "shared", "time", "disk")
        for study in studies:
            states = [stage["state"] for stage in study["stages"]]
            shared = states.count("shared")
            to_make = len(states) - states.count("made") - shared
            row = (str(len(states)), str(to_make), str(shared), _time(study["seconds"]), show_size(study["disk_bytes"]))
            table.add_row(escape(study["name"]), *row)
        stdout.print(table)
    counts = {state: n for state, n in totals["by_state"].items() if n}
    said = {"made": "made already", "partly": "partly there", "nothing": "to make", "shared": "taken over from another"}
    stages = ", ".join(f"{n} {said[state]}" for state, n in counts.items())
    time = f"{_time(totals['seconds'])}, about {_duration(totals['seconds']['likely'])}"
    if totals["at_once"] > 1:
        time += f"; {totals['at_once']} stages at once: roughly {_time(totals['elapsed_seconds'])}"
    print_files(
        {
            "stages": f"{totals['n_stages']}: {stages}",
            "time": time if totals["seconds"]["likely"] else "nothing is left to do",
            "memory": f"about {show_size(totals['memory_bytes'])} at most",
            "disk": f"about {show_size(totals['disk_bytes'])} when finished; {show_size(totals['disk_needed_bytes'])} "
            f"must be free, and {show_size(totals['disk_free_bytes'])} is",
        }
    )
    if totals["disk_free_bytes"] < totals["disk_needed_bytes"]:
        stdout.print("too little disk space: keep fewer checkpoints (--set keep=last or none)", style="red")
    for note in plan["notes"]:
        stdout.print(note, style="dim", markup=False)


def _print_stages(study: dict[str, Any]) -> None:
    there = {"made": "all", "partly": "partly", "nothing": "–", "shared": "shared"}
    table = build_table("stage", "there", "steps", "to make", "time", "disk")
    for stage in study["stages"]:
        steps, left = stage["steps"], stage["steps_left"]
        counted = "–" if not steps else str(steps) if left in (0, steps) else f"{left} of {steps}"
        row = (there[stage["state"]], counted, ", ".join(stage["to_make"]) or "nothing")
        table.add_row(escape(stage["id"]), *row, _time(stage["seconds"]), show_size(stage["disk_bytes"]))
    if ending := study["ending"]:
        seconds = {name: sum((each[name] for each in ending.values()), 0.0) for name in ("low", "likely", "high")}
        table.add_row("then", "", "", "summary, report", _time(seconds), "")
    stdout.print(table)


def _time(seconds: dict[str, float]) -> str:
    """A range of seconds for people."""
    if not seconds["high"]:
        return "–"
    low, high = _duration(seconds["low"]), _duration(seconds["high"])
    (first, unit), (last, same) = low.split(" "), high.split(" ")
    return f"{first}–{last} {unit}" if unit == same else f"{low} – {high}"


def _duration(seconds: float) -> str:
    """To two figures, no more than a forecast knows."""
    for unit, factor in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * factor:
            return f"{float(f'{seconds / factor:.2g}'):g} {unit}"
    return f"{max(1, round(seconds))} s"


def print_circuit(summary: dict[str, Any]) -> None:
    """The table of a circuit that was found."""
    stability = summary["stability"] or {}
    table = build_table("node", "score", "role", "in resamples")
    heads = sorted(summary["nodes"], key=lambda row: -abs(row["score"] or 0.0))
    for row in heads[:CIRCUIT_ROWS]:
        score = "–" if row["score"] is None else f"{row['score']:+.3f}"
        share = stability.get("frequency", {}).get(row["node"])
        table.add_row(row["node"], score, row["role"] or "–", "–" if share is None else f"{share:.0%}")
    stdout.print(table)
    circuit = summary["circuit"]
    shares = ", ".join(
        f"{count} {level} ({circuit['sparsity'][level]:.2%} of {circuit['of'][level]})"
        for level, count in (
            ("heads", circuit["n_heads"]),
            ("nodes", circuit["n_nodes"]),
            ("edges", circuit["n_edges"]),
        )
    )
    left_out = f"the {CIRCUIT_ROWS} largest of {len(heads)} are shown. " if len(heads) > CIRCUIT_ROWS else ""
    stdout.print(
        f"{left_out}{shares}; {summary['n_prompts']} prompts. A score is a change of LD when the head is patched; "
        "negative: it helps the task.",
        style="dim",
        markup=False,
    )
    for level in ("nodes", "edges"):
        if (found := stability.get(f"{level}_jaccard")) and found["mean"] is not None:
            stdout.print(
                f"stability of the {level}: mean pairwise Jaccard {_with_interval(found['mean'], found['spread'])} "
                f"over {stability['resamples']} resamples of the prompts",
                style="dim",
                markup=False,
            )


def print_criteria(document: dict[str, Any]) -> None:
    """The table of what a circuit was judged by."""
    from neuroplast.report.evaluation import criteria_rows

    table = build_table("criterion", "value [95 %]", "what")
    for name, value, low, high, note in criteria_rows(document)[1:]:
        shown = "null" if value is None else _with_interval(value, [low, high] if low is not None else None, ".3f")
        table.add_row(escape(name), shown, escape(note or ""))
    stdout.print(table)
    for line in (*document["warnings"], document["methodology"]):
        stdout.print(line, style="dim", markup=False)


def print_files(files: dict[str, str]) -> None:
    """Names and paths of what was written."""
    width = max(map(len, files))
    for name, path in files.items():
        stdout.print(f"{name:<{width}}  {path}", soft_wrap=True, markup=False)


def _with_interval(value: float | None, ci95: list[float] | None, form: str = ".2f") -> str:
    if value is None:
        return "–"
    return f"{value:{form}}" + (f" [{ci95[0]:{form}}, {ci95[1]:{form}}]" if ci95 else "")


def build_table(*columns: str) -> Any:
    """An empty table."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column in ("stage", "cell"))
    return table


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def print_error(message: str) -> None:
    """One line on stderr."""
    stderr.print("[bold red]error:[/] ", end="")
    stderr.print(" ".join(message.split("\n")), markup=False, soft_wrap=True)


def print_effects(summary: dict[str, Any]) -> None:
    """The table of one intervention's largest effects."""
    table = build_table(summary["method"], "effect [95 %]", "share of LD")
    for row in summary["top"]:
        share = "–" if row["share"] is None else f"{row['share']:+.1%}"
        table.add_row(escape(row["name"]), _with_interval(row["effect"], row["ci95"], ".3g"), share)
    stdout.print(table)
    for name, reason in summary.get("why", {}).items():
        stdout.print(f"no {name}: {reason}", style="dim", markup=False)
    difference = {name: _with_interval(each["mean"], each["ci95"]) for name, each in summary["logit_diff"].items()}
    stdout.print(
        f"{len(summary['top'])} of {summary['n_rows']} rows, the largest, over {summary['n_prompts']} prompts. "
        f"Effect: {summary['sign']}.\nLD: clean {difference['clean']}, counterfactual {difference['counterfactual']}.",
        style="dim",
        markup=False,
    )


def print_comparison(document: dict[str, Any]) -> None:
    """The table of a comparison, and its verdict."""
    from neuroplast.report.audit import summary_rows

    table = build_table("", "what", "value [95 %]", "null")
    for row in summary_rows(document):
        table.add_row(*map(escape, row))
    if table.row_count:
        stdout.print(table)
    stdout.print(f"[bold]{document['verdict']['label']}[/]: {escape(document['verdict']['statement'])}")


SHOWN_OF_A_STRATEGY = 4
"""The last models that were tried of each strategy, those around the target; the one that was taken is there always."""


def print_repair(document: dict[str, Any]) -> None:
    """What was tried, what it cost and gave, and what became of other tasks."""
    table = build_table("strategy", "parts", "weights", "steps", "examples", "back", "LD", "undone [95 %]")
    for strategy in dict.fromkeys(each["strategy"] for each in document["frontier"]):
        tried = [each for each in document["frontier"] if each["strategy"] == strategy]
        for number, each in enumerate(tried, start=1):
            is_chosen = each["cost"] == document["cost"] and document["strategy"] == strategy
            if not is_chosen and number <= len(tried) - SHOWN_OF_A_STRATEGY:
                continue
            cost, found = each["cost"], each["restored"]
            score = "–" if found["score"] is None else f"{found['score']:.0%}"
            parts = "all" if cost["n_parts"] is None else str(cost["n_parts"])
            counted = (f"{cost['parameters_share']:.1%}", str(cost["steps"]), str(cost["examples"]))
            undone = _with_interval(found["damage_undone"], found["ci95"]["damage_undone"])
            table.add_row(
                strategy + (" ←" if is_chosen else ""),
                parts,
                *counted,
                score,
                f"{found['logit_diff']['value']:.2f}",
                undone,
            )
    if table.row_count:
        stdout.print(table)
    for name, each in (document.get("spared") or {}).items():
        if "against_poisoned" in each:
            told = each["against_poisoned"]
            kept = _with_interval(told["kept"]["value"], told["kept"]["ci95"])
            beside = (
                f"; of base's {each['mended']['status']}, before {each['poisoned']['status']}"
                if "mended" in each
                else ""
            )
            stdout.print(f"{name}: {told['status']} by mending, kept {kept}{beside}", style="dim", markup=False)
    mended = document["restoration"] or {}
    if random := mended.get("function_random"):
        share = _with_interval(mended["function"], mended["ci95"]["function"])
        said = f"base's circuit alone gives {share} of the mended model's logit difference"
        said += f", {random['n']} random ones {random['max']:.2f} at most" if random["n"] else ""
        if of_base := document["function_in_base"]:
            said += f"; of base's, {_with_interval(*list(of_base['faithfulness'].values())[:2])}"
        stdout.print(said, style="dim", markup=False)
    stdout.print(document["statement"], markup=False)
    if document.get("new_damage"):
        stdout.print(f"New damage: {', '.join(document['new_damage'])}.", style="bold red", markup=False)


def print_dose(document: dict[str, Any]) -> None:
    """What came back by the number of clean examples, and by the rate of the poison."""
    table = build_table(
        "clean examples", "rate", "poisoned LD", "~ base", "retrained LD [95 %]", "~ base [95 %]", "undone [95 %]"
    )
    for curve, name in (("by_examples", "examples"), ("by_rate", "rate")):
        for point in document[curve]:
            found = point["restored"]
            at = (str(point[name]), f"{document['by_rate'][-1]['rate']:g}")
            if name == "rate":
                at = (str(document["retrained_on"]), f"{point[name]:g}")
            before = document["by_rate"][-1] if name == "examples" else point
            was, ld = before["poisoned"], found["logit_diff"]
            poisoned = (_with_interval(each, None) for each in (was["logit_diff"]["value"], was["mechanism"]))
            rows = (_with_interval(found[row], found["ci95"][row]) for row in ("mechanism", "damage_undone"))
            table.add_row(*at, *poisoned, _with_interval(ld["value"], ld["ci95"]), *rows)
    stdout.print(table)
    base = document["base"]["logit_diff"]
    stdout.print(
        "Each row is a poisoning and a retraining of its own. Base's LD is "
        f"{_with_interval(base['value'], base['ci95'])}. ~ base: correlation of the effects of all heads with base's.",
        style="dim",
        markup=False,
    )


def print_bench(document: dict[str, Any]) -> None:
    """The table of what everything takes, and what is missing from it."""
    then = document.get("against")
    columns = ("row", "measured", "range", "floor", "÷ floor", "peer", "÷ peer", "now ÷ then")
    table = build_table(*columns[: None if then else -1])
    for row in document["rows"]:
        low, high = row["range"] or (None, None)
        cells = [
            escape(row["what"]),
            _seconds(row["seconds"]),
            "once" if row["repeats"] == 1 else "–" if low is None else f"{_seconds(low)} to {_seconds(high)}",
            _seconds(row["floor_seconds"]),
            _ratio(row["over_floor"]),
            _seconds(row["peer_seconds"]),
            _ratio(row["over_peer"]),
        ]
        table.add_row(*cells, *([_ratio(then["rows"][row["name"]]["ratio"])] if then else []))
    stdout.print(table)
    rate, hardware, versions = document["rate"], document["hardware"], document["versions"]
    low, high = (each / 1e9 for each in rate["range"])
    model = document["model"]
    lines = [
        f"{model['name']}: {model['n_layers']} layers of {model['n_heads']} heads, on {hardware['device']}; "
        f"{hardware['processor']}, {hardware['threads']} threads; torch {versions['torch']}",
        f"floor: the matrix products at {rate['operations_a_second'] / 1e9:.0f} GFLOP/s ({low:.0f} to {high:.0f}), or, "
        "of edges and the ledger, what they need of the plain model, run in turn",
    ]
    peers: dict[str, list[str]] = {}
    for row in document["rows"]:
        if row["peer"] is not None:
            error = "" if row["max_difference"] is None else f", largest difference {row['max_difference']:.1e}"
            peers.setdefault(row["peer"], []).append(f"{row['name']} ({row['peer_timed']}{error})")
    lines += [f"{peer}: {', '.join(rows)}" for peer, rows in peers.items()]
    missing: dict[str, list[str]] = {}
    for row in document["rows"]:
        for what, why in row["why"].items():
            missing.setdefault(why, []).append(f"{row['name']} ({what})")
    lines += [f"none for {', '.join(rows)}: {why}" for why, rows in missing.items()]
    if then:
        lines.append(f"then: {then['file']} of {then['date']}; products now ÷ then {then['rate_ratio']:.2f}")
        lines += [f"{name} is not compared: {each['why']}" for name, each in then["rows"].items() if "why" in each]
    lines.append(f"{document['seconds']:.0f} s in all")
    for line in lines:
        stdout.print(line, style="dim", markup=False)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
