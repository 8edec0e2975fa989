"""One measurement from words to files: what `neuroplast patch` does.

A folder gets `patch.json` (what is measured, and on which weights and prompts), `effects.safetensors` (every number
prompt by prompt, and the means with their intervals; of attributions the means alone), `prompts.jsonl`, `effects.csv`
and `effects.png`. Many rows are measured in parts; an interrupted measurement continues with those that are missing.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroplast.errors import InputError, StorageError, unknown_name
from neuroplast.interventions.activation_patching import INTO, activation_patch
from neuroplast.interventions.edge_attribution import METHODS as ATTRIBUTIONS
from neuroplast.interventions.edge_attribution import STEPS, attribute_edges
from neuroplast.interventions.edge_patching import choose_edges, patch_edges
from neuroplast.interventions.effects import group_name
from neuroplast.interventions.knockout import select_heads
from neuroplast.interventions.path_patching import MLPS, path_patch
from neuroplast.interventions.selection import (
    Group,
    select_receivers,
    select_senders,
    select_sites,
)
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.models.network import Network
from neuroplast.observer import Observer, Silent
from neuroplast.reading import parse_json
from neuroplast.report.patch import write_patch_report
from neuroplast.statistics import NORMAL_95, bootstrap_weights, estimate_mean, interval
from neuroplast.storage import (
    is_begun,
    load_metadata,
    load_tensors,
    telling,
    write_jsonl,
    write_tensors,
)
from neuroplast.subject import Subject, require_whole, spelled, versions
from neuroplast.tasks.prompts import PromptSet

METHODS = ("path", "activation", "edge", *ATTRIBUTIONS)
DEFAULTS: Mapping[str, Mapping[str, str | int | None]] = {
    "path": {"senders": "heads", "receivers": "logits", "mlps": "live", "knocked_out": ""},
    "activation": {"senders": "residual@each", "into": "clean"},
    "edge": {"senders": "all", "receivers": "logits"},
    "eap": {"senders": "all", "receivers": "all"},
    "eap-ig": {"senders": "all", "receivers": "all", "steps": STEPS},
    "ceap": {"senders": "all", "receivers": "all", "steps": STEPS},
}
"""The settings that each method has, with what they are unless given; the others do not have them."""

ROWS_A_PART = 2000
"""Rows measured between two saves: long enough that running the prompts again for each part hardly counts."""
TOP = 15
FILE, PARTS, PROMPTS, SETTINGS = "effects.safetensors", "parts", "prompts.jsonl", "patch.json"


@dataclass(frozen=True, kw_only=True)
class PatchConfig(Subject):
    """What to measure. Settings that are None take what suits the method."""

    method: str = "path"
    """`path`, `activation`, `edge` (exact), or `eap`, `eap-ig`, `ceap` (estimated, all edges)."""
    senders: str | None = None
    """What is patched: `heads`, `mlps`, `input`, `all`, or names; for activations `heads`, `q`, `residual@each`, …"""
    receivers: str | None = None
    """Into what: `logits`, or `a23.h3<q>@end, …`; for edges also `q`, `k`, `v`, `mlps`, `all`."""
    mlps: str | None = None
    """On paths, MLPs are `live` or `frozen`."""
    knocked_out: str | None = None
    """On paths, heads that are knocked out underneath."""
    into: str | None = None
    """Of activations, the run that is patched: `clean` or `counterfactual`."""
    steps: int | None = None
    """Of `eap-ig` and `ceap`, points on the way."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        super().__post_init__()
        require_whole("steps", self.steps)
        for name, kind, known in (("mlps", "treatment of MLPs", MLPS), ("into", "run to patch into", INTO)):
            if (value := getattr(self, name)) is not None and value not in known:
                raise unknown_name(kind, value, known)
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        for name in ("senders", "receivers", "mlps", "knocked_out", "into", "steps"):
            if getattr(self, name) is not None and name not in DEFAULTS[self.method]:
                having = [method for method, settings in DEFAULTS.items() if name in settings]
                raise InputError(
                    f"method {self.method!r} has no setting {spelled(name)}: it is for {', '.join(having)}"
                )

    def resolved(self) -> "PatchConfig":
        """The same with every setting of the method filled in."""
        missing = {name: value for name, value in DEFAULTS[self.method].items() if getattr(self, name) is None}
        return replace(super().resolved(), **missing)  # pyright: ignore[reportArgumentType]


def run_patch(
    config: PatchConfig, out: Path | str, observer: Observer | None = None, *, memory: str | int | None = None
) -> dict[str, Any]:
    """Measures, writes the folder, and gives a summary; what the folder has already is not measured again.

    Args:
        config: what to measure.
        out: the folder: new, empty, or of the same measurement.
        observer: is told how it goes; by default nobody is.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for a name that is none, a folder that holds something else, or a budget that is too small.
        StorageError: when the folder cannot be written.
    """
    config, out, observer = config.resolved(), Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    is_begun(out, SETTINGS, "measurement")
    model, prompts = config.load(observer)
    measurement = _Measurement(config, model, prompts, memory, observer)
    provenance = config.provenance(model, prompts)
    with claimed(out, SETTINGS, "measurement", provenance):
        if not (out / FILE).is_file():
            tensors = measurement.run(out / PARTS)
            described = {name: json.dumps(value, ensure_ascii=False) for name, value in provenance.items()}
            described |= {
                "rows": json.dumps(measurement.names),
                "sign": measurement.sign,
                "interval": measurement.interval,
                "versions": json.dumps(versions()),
            }
            write_tensors(out / FILE, tensors, described)
            shutil.rmtree(out / PARTS, ignore_errors=True)
    write_jsonl(out / PROMPTS, (record.row() for record in prompts.records))
    with telling(out / FILE):
        kept = {name: parse_json(text) for name, text in load_metadata(out / FILE).items() if name in provenance}
    if kept != provenance:
        raise StorageError(f"{out / FILE} is of another measurement; remove it, then run the same command again")
    write_patch_report(out)
    return _summary(out, config, len(prompts))


def _require_path(senders: Sequence[Group], receivers: Group) -> None:
    """Refuses senders that are all computed after the receivers: every effect would be 0."""
    if min(node.depth for group in senders for node in group) >= max(node.depth for node in receivers):
        names = ", ".join(map(str, receivers))
        raise InputError(f"no path leads from these senders to {names}: a receiver must come after its sender")


class _Measurement:
    """The rows of one measurement, and how they are measured."""

    def __init__(
        self, config: PatchConfig, model: Network, prompts: PromptSet, memory: str | int | None, observer: Observer
    ) -> None:
        self.config, self.model, self.prompts = config, model, prompts
        self.memory, self.observer = memory, observer
        self.sign = "LD(patched) - LD(clean); negative: it helps"
        if config.into == "counterfactual":
            self.sign = "LD(patched) - LD(counterfactual); positive: the clean value helps"
        self.interval = "95 % bootstrap over prompts"
        senders, receivers = config.senders or "", config.receivers or ""
        if config.method == "path":
            self.groups: Sequence[Group] = select_senders(senders, model, prompts)
            _require_path(self.groups, select_receivers(receivers, model, prompts))
            select_heads(config.knocked_out or (), model, prompts)
            self.names = list(map(group_name, self.groups))
        elif config.method == "activation":
            self.groups = select_sites(senders, model, prompts)
            self.names = list(map(group_name, self.groups))
        else:
            self.edges = choose_edges(model, prompts, None, senders, receivers)
            self.names = list(map(str, self.edges))
            if config.method in ATTRIBUTIONS:
                self.interval = "mean plus or minus 1.96 standard errors over prompts"
                if any(node.position for edge in self.edges for node in (edge.source, edge.destination)):
                    raise InputError(f"{config.method} sums over positions: name nodes without @position")

    def run(self, parts: Path) -> dict[str, Tensor]:
        """Measures all rows; those that are kept in `parts` are not measured again."""
        if self.config.method in ATTRIBUTIONS:
            return self._attribute()
        found: list[dict[str, Tensor]] = []
        starts = range(0, len(self.names), ROWS_A_PART)
        for index, first in enumerate(starts):
            path = parts / f"{first:07}.safetensors"
            if not path.is_file():
                part = slice(first, first + ROWS_A_PART)
                tensors = self._measure(part, self._progress(index, len(starts)))
                if len(starts) == 1:
                    found.append(tensors)
                    break
                write_tensors(path, tensors, {})
            found.append(load_tensors(path))
            rows = len(found[-1].get("effects", ()))
            if rows != len(self.names[first : first + ROWS_A_PART]):
                raise StorageError(f"{path} is damaged: it has {rows} rows; remove it, then run the same command again")
        effects = torch.cat([each["effects"] for each in found])
        kept = {**found[0], "effects": effects, "mean": effects.mean(dim=1)}
        if effects.shape[1] == 1:
            return kept
        weights = bootstrap_weights(effects.shape[1], seed=0)
        ends = [interval(weights @ part.T.double().numpy()) for part in effects.split(500)]
        low, high = (torch.from_numpy(np.concatenate(each)).float() for each in zip(*ends, strict=True))
        return kept | {"low": low, "high": high}

    def _measure(self, part: slice, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
        config, memory = self.config, self.memory
        if config.method == "path":
            found = path_patch(
                self.model,
                self.prompts,
                senders=self.groups[part],
                receivers=config.receivers or "",
                mlps=config.mlps or "",
                knocked_out=config.knocked_out or (),
                memory=memory,
                progress=progress,
            )
        elif config.method == "activation":
            found = activation_patch(
                self.model,
                self.prompts,
                sites=self.groups[part],
                into=config.into or "",
                memory=memory,
                progress=progress,
            )
        else:
            found = patch_edges(self.model, self.prompts, self.edges[part], memory=memory, progress=progress)
        return {"effects": found.effects, "clean": found.clean, "counterfactual": found.counterfactual}

    def _attribute(self) -> dict[str, Tensor]:
        config = self.config
        found = attribute_edges(
            self.model,
            self.prompts,
            method=config.method,
            steps=config.steps or 1,
            memory=self.memory,
            progress=self._progress(0, 1),
        )
        rows = {node: row for row, node in enumerate(found.sources)}
        columns = {node: column for column, node in enumerate(found.destinations)}
        at = ([rows[edge.source] for edge in self.edges], [columns[edge.destination] for edge in self.edges])
        kept = {"mean": found.scores[at], "clean": found.clean, "counterfactual": found.counterfactual}
        if found.standard_error is None:
            return kept
        error = found.standard_error[at]
        return kept | {"low": kept["mean"] - NORMAL_95 * error, "high": kept["mean"] + NORMAL_95 * error}

    def _progress(self, index: int, parts: int) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self.observer.progress(f"{self.config.method} patching", index * total + done, parts * total)

        return tell


def _summary(out: Path, config: PatchConfig, n_prompts: int) -> dict[str, Any]:
    tensors, described = load_tensors(out / FILE), load_metadata(out / FILE)
    names: list[str] = parse_json(described["rows"])
    weights = bootstrap_weights(n_prompts, seed=0)
    differences = {name: estimate_mean(weights, tensors[name].double().numpy()) for name in ("clean", "counterfactual")}
    if n_prompts == 1:
        differences = {name: replace(each, ci95=None) for name, each in differences.items()}
    base = differences[config.into or "clean"]
    defined = base.value is not None and base.ci95 is not None and not base.ci95[0] <= 0 <= base.ci95[1]
    why = {} if defined else {"share": "LD of the unpatched run is not apart from 0"}
    if n_prompts == 1:
        why = dict.fromkeys(("interval", "share"), "one prompt has no spread")
    ends = (tensors["low"], tensors["high"]) if "low" in tensors else None
    order = tensors["mean"].abs().argsort(descending=True, stable=True)[:TOP].tolist()
    return {
        "schema": 1,
        "model": config.model,
        "method": config.method,
        "settings": parse_json(described["settings"]),
        "n_prompts": n_prompts,
        "n_rows": len(names),
        "logit_diff": {name: {"mean": each.value, "ci95": each.ci95} for name, each in differences.items()},
        "sign": described["sign"],
        "interval": described["interval"] if ends else None,
        "top": [
            {
                "name": names[row],
                "effect": float(tensors["mean"][row]),
                "ci95": [float(end[row]) for end in ends] if ends else None,
                "share": float(tensors["mean"][row]) / base.value if defined and base.value else None,
            }
            for row in order
        ],
        **({"why": why} if why else {}),
        "files": {name: str(out / f"effects.{name}") for name in ("safetensors", "csv", "png")},
    }
