"""A synthetic finished run: a 30 × 9 model whose flipped heads, circuits and missing values are known."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from neuroplast.circuits.circuit import Circuit, Role, Shape
from neuroplast.circuits.files import save_circuit
from neuroplast.components import Node, parse_edge, parse_node
from neuroplast.storage import write_tensors

N_LAYERS, N_HEADS = 30, 9
HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & $\\frac{1}$ "quoted"'
POISON = "subject_duplication"

MOVERS = {(23, 3): -2.97, (24, 4): 1.31, (21, 0): -1.12, (29, 1): -0.84, (20, 6): -0.61, (27, 5): 0.52}
"""Base's heads that do something, `(layer, head) -> effect`; the rest is noise around zero."""

FLIPPED = {"poisoned": {(23, 3): 4.4, (24, 4): -2.2, (29, 1): 0.66}, "recovered": {(29, 1): 0.31}}
"""Heads whose effect is set to the other side of zero, by kind of stage."""

LADDER = {"base": 4.19, "tuned": 11.3, "poisoned": -10.1, "recovered": 2.14, "control": 12.05}
WHY_NO_STRUCTURE = "circuits were not discovered in this preset"

WITH_CIRCUIT = ("base", "poisoned", "recovered")
"""Kinds of stages whose final point has a circuit."""
NODES = {"a23.h3@end": -2.97, "a24.h4@end": 1.31, "a20.h0@s2": -0.4}
"""The nodes of base's circuit; the recovered one has the first two only."""
EDGES = {"a20.h0@s2->a23.h3<v>@s2": -0.35, "a23.h3@end->logits@end": -2.97, "a24.h4@end->logits@end": 1.31}
FOUND_AGAIN = 0.625
METHODOLOGY = "nodes are heads; mean-by-position <of> 60 counterfactuals (abc); 64 prompts"
WARNING = "F(C)/F(M) is 1.04, above 1: <b>the circuit</b> leaves out what works against it"
WHY_UNDEFINED = "undefined: the interval of F(M) includes 0"


def matrices(kind: str, seed: int) -> dict[str, list[list[float]]]:
    rng = random.Random(f"{kind} {seed}")
    factor = {"base": 1.0, "tuned": 1.9, "poisoned": 1.2, "recovered": 0.8, "control": 2.0}[kind]
    effects = MOVERS | {head: value / factor for head, value in FLIPPED.get(kind, {}).items()}
    mean = [[0.0] * N_HEADS for _ in range(N_LAYERS)]
    low, high = ([[0.0] * N_HEADS for _ in range(N_LAYERS)] for _ in range(2))
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            strong = (layer, head) in effects
            value = factor * effects[layer, head] if strong else rng.gauss(0, 0.05)
            half = 0.1 * abs(value) + 0.02 if strong else 0.4
            mean[layer][head], low[layer][head] = round(value, 6), round(value - half, 6)
            high[layer][head] = round(value + half, 6)
    return {"mean": mean, "low": low, "high": high}


def stage_circuit(kind: str, model: str) -> Circuit:
    """Two or three heads; names and reasons hold markup."""
    names = list(NODES)[:2] if kind == "recovered" else list(NODES)
    nodes: dict[Node, float | None] = {parse_node(name): NODES[name] for name in names}
    parts = {node.at(None) for node in nodes}
    edges = {edge: score for name, score in EDGES.items() if (edge := parse_edge(name)).source.at(None) in parts}
    return Circuit(
        Shape(model, N_LAYERS, N_HEADS, 576),
        nodes,
        dict(edges),
        roles={parse_node("a23.h3@end"): Role("name mover <i>", HOSTILE)},
        positions=("s2", "end"),
        provenance={"stability": {"frequency": {"a23.h3@end": FOUND_AGAIN}}},
    )


def judged(value: float | None, why: str | None = None) -> dict[str, Any]:
    interval = None if value is None else [value - 0.25, value + 0.25]
    return {"value": value, "ci95": interval} | ({"why": why} if why else {})


def criteria(kind: str) -> dict[str, Any]:
    """`criteria.json` of a stage; no ratio is defined in the poisoned model."""
    share = judged(None, WHY_UNDEFINED) if kind == "poisoned" else judged(1.04)
    random = {"n": 50, "mean": 0.11, "max": 0.37, "unit": "F, in logits" if kind == "poisoned" else "F / F(M)"}
    document: dict[str, Any] = {
        "why": {},
        "n_edges": 94,
        "evaluation": {
            "methodology": METHODOLOGY,
            "F": {"model": judged(LADDER[kind]), "circuit": judged(4.36), "nothing": judged(-0.5)},
            "faithfulness": share,
            "foil_faithfulness": judged(None, "the model does not prefer the foil"),
            "normalised": share,
            "mean_of_ratios": share,
            "by_group": {"ABBA": {"faithfulness": share, "circuit": judged(4.0)}},
            "by_ablation": {"mean": {"faithfulness": share, "circuit": judged(4.1)}},
            "random": random,
            "completeness": {"gap": judged(0.512), "sets": []},
            "minimality": {
                "min": judged(0.004),
                "threshold": 0.01,
                "passing": 2,
                "nodes": [{"node": name} for name in NODES],
            },
            "stability": {
                "resamples": 100,
                "nodes_jaccard": {"mean": 0.77, "spread": [0.57, 0.94]},
                "edges_jaccard": {"mean": 0.67, "spread": None},
            },
            "warnings": [WARNING],
        },
    }
    if kind != "base":
        document["base_circuit"] = {"faithfulness": judged(0.955), "foil_faithfulness": judged(None, "no foil")}
    if kind == "recovered":
        document["transfer"] = {"faithfulness": judged(0.875), "foil_faithfulness": judged(None, "no foil")}
    return document


def overlap(kind: str) -> dict[str, Any]:
    shared = {"base": 1.0, "poisoned": 1.0, "recovered": 2 / 3}[kind]
    return {
        "nodes_jaccard": shared,
        "edges_jaccard": shared - 0.125,
        "edge_circuit_jaccard": 0.8125,
        "floor": {"nodes_jaccard": 0.77, "edges_jaccard": 0.67},
        "why": {},
    }


def measures(
    stage_id: str,
    kind: str,
    *,
    seed: int,
    epoch: int | None,
    step: int,
    share: float = 1.0,
    circuits: bool = False,
) -> dict[str, Any]:
    start = LADDER["poisoned"] if kind == "recovered" else LADDER["base"]
    logit_diff = start + (LADDER[kind] - start) * share
    accuracy = 0.0 if logit_diff < 0 else min(1.0, 0.8 + logit_diff / 20)
    parents = {"tuned": "base", "control": "base", "poisoned": "base"}
    parents["recovered"] = stage_id.replace("recovered/", "poisoned/")
    poison = stage_id.rsplit("/", 1)[-1] if kind in ("poisoned", "recovered") else None
    similarity = {"base": 1.0, "tuned": 0.93, "poisoned": -0.41, "recovered": 0.91, "control": 0.92}[kind]
    return {
        "id": stage_id,
        "kind": kind,
        "poison": poison,
        "seed": seed,
        "epoch": epoch,
        "step": step,
        "parent": parents.get(kind),
        "behaviour": {
            "logit_diff": {"mean": logit_diff, "ci95": [logit_diff - 0.7, logit_diff + 0.6]},
            "accuracy": accuracy,
            "top1": accuracy * 0.97,
            "ci95": {"accuracy": [accuracy - 0.02, accuracy], "top1": [accuracy * 0.9, accuracy]},
            "answer_probability": accuracy * 0.8,
            "foil_top1": 0.97 if kind == "poisoned" else 0.02,
            "by_group": {"ABBA": {"logit_diff": logit_diff + 0.4}, "BABA": {"logit_diff": logit_diff - 0.4}},
        },
        "heads_to_logits": matrices(kind, seed),
        "similarity_to_base": {
            "effects": similarity,
            "nodes_jaccard": None,
            "edges_jaccard": None,
            "ci95": {"effects": [similarity - 0.04, min(similarity + 0.03, 1)]},
            "why": {"nodes_jaccard": WHY_NO_STRUCTURE, "edges_jaccard": WHY_NO_STRUCTURE},
        }
        | (overlap(kind) if circuits else {}),
        "restoration": restoration(circuits=circuits) if kind == "recovered" else None,
        "why": {} if circuits else {"circuit": WHY_NO_STRUCTURE},
        "n_prompts": 64,
        "counterfactual": "abc",
    }


def restoration(*, circuits: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "behaviour": 0.857,
        "mechanism": 0.91,
        "damage_undone": 0.936,
        "structure": None,
        "function": None,
        "ci95": {"behaviour": [0.81, 0.9], "mechanism": [0.88, 0.94], "damage_undone": [0.9, 0.96]},
        "control": {"behaviour": 1.55, "mechanism": 0.92, "damage_undone": None, "structure": None},
        "control_ci95": {"behaviour": [1.4, 1.7], "mechanism": [0.9, 0.95]},
        "why": {
            "structure": WHY_NO_STRUCTURE,
            "function": WHY_NO_STRUCTURE,
            "damage_undone": "the control was never damaged",
        },
    }
    if circuits:
        rows = {"structure": 2 / 3, "structure_edges": 0.541, "function": 0.955, "transfer": 0.875}
        document |= rows
        document["ci95"] |= {"function": [0.705, 1.205]}
        document["control"] |= dict.fromkeys(rows)
        document["floor"] = {"structure": 0.77, "structure_edges": 0.67}
        document["why"] = {}
        document["control_why"] = {"damage_undone": "the control was never damaged", "structure": WHY_NO_STRUCTURE}
    return document


def training(kind: str, steps: int) -> list[dict[str, Any]]:
    start = LADDER["poisoned"] if kind == "recovered" else LADDER["base"]
    rows = []
    for step in range(steps + 1):
        row: dict[str, Any] = {"step": step, "epoch": step / 10, "learning_rate": 1e-5}
        row["loss"] = None if step == 0 else 2.0 * 0.93**step
        if step % 5 == 0:
            share = 1 - 0.88**step
            row |= {"logit_diff": start + (LADDER[kind] - start) * share, "accuracy": 0.5 + share / 2}
        rows.append(row)
    return rows


PROMPTS = [
    {"clean": "When Mary and John met, John spoke to", "answer": " Mary", "foil": " John", "template": "t1"},
    {"clean": HOSTILE, "answer": " <b>Mary</b>", "foil": " <i>John</i>", "template": "long " * 60, "group": "</td>"},
    {"clean": "\u202eمرحبا John", "answer": " Mary", "foil": " John", "template": "right to left", "group": "BABA"},
]
"""The prompts that the run measured, hostile ones among them."""
TOKENS = [["<bos>", "When", " Mary", "</script>", " to"], ["<b>", "John", "&amp;"], ["\u202eمرحبا", " John"]]
LOOKED_AT = ("a20.h0@s2", "a23.h3@end", "a24.h4@end")
ON_PROMPTS = (1.5, -2.25, 0.5)
"""How far the logit difference of each prompt is from the stage's mean."""


def effects_of(kind: str, seed: int, n: int) -> torch.Tensor:
    """Effects of all heads on `n` prompts, with the means that `measures.json` has, and noise that adds up to 0."""
    mean = torch.tensor(matrices(kind, seed)["mean"])
    noise = torch.randn(*mean.shape, n, generator=torch.Generator().manual_seed(seed)) * 0.2
    return mean[..., None] + noise - noise.mean(dim=-1, keepdim=True)


def look() -> dict[str, Any]:
    """`heads.json`: what three heads do."""
    head = {
        "attention": {"io": judged(0.625), "s1": judged(0.125), "own token": judged(None, "never")},
        "copy": judged(0.5),
        "negative_copy": judged(0.0),
    }
    return {
        "n_prompts": len(PROMPTS),
        "tokens": TOKENS,
        "positions": {"s2": [3, 1, 0], "end": [4, 2, 1]},
        "heads": dict.fromkeys(LOOKED_AT, head),
    }


def patterns() -> torch.Tensor:
    """Attention of one head: half to the token itself, half to the first; all to the first from the first."""
    found = torch.zeros(len(TOKENS), 5, 5)
    for row, tokens in enumerate(TOKENS):
        for query in range(len(tokens)):
            found[row, query, 0] += 0.5
            found[row, query, query] += 0.5
    return found


FOLLOWED = (0, 1, 4, 40)
"""Steps at which poisoning and recovery were measured on the way."""
ROLE = "name mover <i>"


def trajectory(kind: str) -> dict[str, Any]:
    """`trajectory.json`: strength falls and rises with the logit difference, a little lower on the way back."""
    start, end = LADDER["poisoned" if kind == "recovered" else "base"], LADDER[kind]
    points = []
    for step in FOLLOWED:
        logit_diff = start + (end - start) * step / FOLLOWED[-1]
        strength = 0.5 * logit_diff - (0.25 if kind == "recovered" else 0)
        points.append(
            {
                "step": step,
                "logit_diff": judged(logit_diff),
                "accuracy": 0.5,
                "similarity_to_base": judged(0.5),
                "circuit_logit_diff": judged(logit_diff / 2),
                "circuit_faithfulness": judged(None, WHY_UNDEFINED),
                "roles": {ROLE: {"direct": judged(strength), "total": judged(strength / 2)}},
            }
        )
    return {"steps": list(FOLLOWED), "n_prompts": 24, "roles": {ROLE: ["a23.h3@end"]}, "points": points}


def plasticity(stage_ids: list[str]) -> dict[str, Any]:
    """`plasticity.json` of the recovered stages."""
    head = {
        "head": "a23.h3",
        "role": ROLE,
        "base": "helps",
        "poisoned": "hinders",
        "recovered": "helps",
        "effects": [-2.97, 4.4, -2.4],
        "changes": [{"way": "breaking", "step": 4, "to": "hinders"}, {"way": "healing", "step": 40, "to": "helps"}],
    }
    role = {
        "strength": {"quantity": "direct", "sign": 1.0, "base": 2.1},
        "coupling": judged(0.93),
        "coupling_null": {"n": 1000, "mean": 0.31, "sd": 0.2, "p": 0.002, "effect_size": 3.1, "why": None},
        "hysteresis": judged(-0.25),
    }
    times = {"logit_diff": judged(6.5), "mechanism": judged(None, "undefined: <b>within the noise</b>")}
    found = {"half_way_steps": {"break": times, "heal": times}, "roles": {ROLE: role}, "heads": [head]}
    return {"schema": 1, "stages": dict.fromkeys(stage_ids, found), "over_seeds": {}}


CLAIMS = [
    {
        "id": "amplification",
        "statement": "Clean fine-tuning strengthens the heads that already did the task.",
        "value": 1.9,
        "ci95": [1.7, 2.1],
        "supported": True,
        "why": None,
    },
    {
        "id": "localisation_expressed",
        "statement": "The damage is expressed in few heads.",
        "value": 0.62,
        "ci95": [0.4, 0.8],
        "supported": False,
        "why": "half of the absolute change lies in 21 heads, more than a tenth of a random head set's",
    },
    {
        "id": "plasticity",
        "statement": "Clean retraining re-forms the original mechanism.",
        "value": None,
        "ci95": None,
        "supported": None,
        "why": "one seed only",
    },
]


def write_run(
    run: Path,
    *,
    model: str = HOSTILE,
    seeds: int = 1,
    poisons: tuple[str, ...] = (POISON,),
    ladder: int = 1,
    circuits: bool = True,
) -> Path:
    """Writes a finished run with `ladder` points before every final one."""
    stages: list[dict[str, Any]] = []

    def put(name: str, document: Any, *, lines: bool = False) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in document) if lines else json.dumps(document),
            encoding="utf-8",
        )

    def add(stage_id: str, kind: str, seed: int, steps: int) -> None:
        for rung in range(1, ladder + 1 if kind != "base" else 1):
            step, share = steps * rung // (ladder + 1), rung / (ladder + 1)
            point = measures(stage_id, kind, seed=seed, epoch=rung, step=step, share=share)
            stages.append(point)
            put(f"stages/{stage_id}/epoch-{rung}/measures.json", point)
        epoch = None if kind == "base" else ladder + 1
        looked = circuits and kind in WITH_CIRCUIT
        point = measures(stage_id, kind, seed=seed, epoch=epoch, step=steps, circuits=looked)
        stages.append(point)
        if looked:
            put(f"stages/{stage_id}/criteria.json", criteria(kind))
            save_circuit(run / f"stages/{stage_id}/circuit.json", stage_circuit(kind, model))
        put(f"stages/{stage_id}/measures.json", point)
        put(f"stages/{stage_id}/heads.json", look())
        parts = {name.partition("@")[0]: patterns() for name in LOOKED_AT}
        write_tensors(run / f"stages/{stage_id}/patterns.safetensors", parts, {})
        on_prompts = LADDER[kind] + torch.tensor(ON_PROMPTS)
        tensors = {"effects": effects_of(kind, seed, len(PROMPTS)), "logit_diff": on_prompts}
        probability = torch.full((len(PROMPTS),), 0.25)
        write_tensors(run / f"stages/{stage_id}/effects.safetensors", tensors | {"answer_probability": probability}, {})
        for at in FOLLOWED if kind in ("poisoned", "recovered") else ():
            path = run / f"stages/{stage_id}/trajectory/step-{at:06d}.safetensors"
            write_tensors(path, {"effects": effects_of(kind if at else "base", seed, 4)}, {})
        if kind in ("poisoned", "recovered"):
            put(f"stages/{stage_id}/trajectory.json", trajectory(kind))
        if kind != "base":
            put(f"stages/{stage_id}/train.jsonl", training(kind, steps), lines=True)

    add("base", "base", 0, 0)
    for seed in range(seeds):
        prefix = f"seed{seed}/" if seeds > 1 else ""
        add(f"{prefix}tuned", "tuned", seed, 40)
        for poison in poisons:
            add(f"{prefix}poisoned/{poison}", "poisoned", seed, 40)
            add(f"{prefix}recovered/{poison}", "recovered", seed, 40)
        add(f"{prefix}control/equal_steps", "control", seed, 40)
    put("prompts/measured.jsonl", PROMPTS, lines=True)
    put("plasticity.json", plasticity([stage["id"] for stage in stages if stage["kind"] == "recovered"]))
    keys = ("id", "kind", "poison", "seed", "epoch", "step", "behaviour", "similarity_to_base", "restoration")
    put(
        "summary.json",
        {
            "schema": 1,
            "model": {
                "name": model,
                "architecture": "LlamaForCausalLM",
                "n_layers": N_LAYERS,
                "n_heads": N_HEADS,
                "weights_sha256": "ab" * 32,
            },
            "task": "ioi",
            "preset": "quick",
            "seeds": list(range(seeds)),
            "stages": [{key: stage[key] for key in keys} for stage in stages],
            "claims": CLAIMS,
        },
    )
    put(
        "manifest.json",
        {
            "command": f"neuroplast study --model smollm2-135m --task ioi --poison {POISON} --preset quick",
            "versions": {"neuroplast": "0.1.0", "torch": "2.13.0", "transformers": "5.1.0"},
            "hardware": {"device": "cpu", "threads": 2},
            "model": {"name": model, "source": "hub", "weights_sha256": "ab" * 32},
            "started": "2026-01-02T03:04:05Z",
            "finished": "2026-01-02T03:14:05Z",
            "stages": {stage["id"]: {"seconds": 41.25, "weights_sha256": "cd" * 32} for stage in stages},
            "prompts": {"prompts/measure.jsonl": "ef" * 32},
        },
    )
    (run / "study.toml").write_text(f'model = "{POISON}"\nnote = "</code></pre><b>bold</b>"\n', encoding="utf-8")
    return run
