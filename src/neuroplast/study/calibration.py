"""How fast a model is on this machine: the pieces of work that a study is made of, each measured on a few prompts.

The pieces are timed in the process that asks, with the model, the task, the device, the type and the threads of the
study, and nothing is written. It takes seconds of a small model; what a large one takes grows with it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import nn

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.shape import shape_of
from neuroplast.components import Node
from neuroplast.errors import UnsupportedModelError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network, logits_at, unembedding_of
from neuroplast.models.sources import weights_sha256
from neuroplast.observer import Observer
from neuroplast.reading import parse_json
from neuroplast.study.context import load_network
from neuroplast.study.plan import StudyConfig
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import PromptSet
from neuroplast.tasks.task import Task
from neuroplast.training.data import build_examples, collate

Result = TypeVar("Result")

MANY, FEW = 32, 4
"""Prompts that a piece is timed on: of a fast model, and of a slow one."""
SLOW = 0.04
"""Seconds a prompt takes forward in a slow model."""
LONG_ENOUGH = 0.1
"""Seconds after which a piece of work is not timed again."""
SETS, HEADS = 8, 16
"""Sets of heads that are knocked out for the timing, and heads of each."""
NUMBERS = 100_000
"""Numbers that are turned to text and back, to see how fast plain Python is here."""
DRAWN = 8_000_000
"""Most random numbers that are drawn to see how fast they come."""


@dataclass(frozen=True)
class Speed:
    """What pieces of work take, in seconds, and how large the model is."""

    load: float
    """Loading the model and checking it."""
    sha256: float
    """Hashing its weights."""
    call: float
    """Forward, one prompt by itself: what a pass costs, however short."""
    forward: float
    """Forward, a prompt of a batch."""
    gradient: float
    """Forward and backward, a training pair of a batch."""
    update: float
    """One step of the optimizer."""
    patch: float
    """Every head patched into the logits, a prompt."""
    knockout: float
    """One set of heads left alone, a prompt."""
    edges: float
    """Every edge by EAP-IG, a prompt; 0 of a model whose edges cannot be told apart."""
    twin: float
    """As many random numbers as the model has weights."""
    python: float
    """`NUMBERS` numbers turned to text and back."""
    weights: int
    """Bytes of the model's weights."""
    beside: int
    """Bytes that a checkpoint has beside them."""
    n_layers: int
    """Layers."""
    n_heads: int
    """Heads a layer."""
    n_edges: int
    """Edges of the model."""
    width: int
    """Tokens of the longest prompt."""
    vocabulary: int
    """Tokens that the model can say."""
    n_prompts: int
    """Prompts that the task has, of those that were asked for."""
    named: bool
    """Whether the task names positions beside the end."""


def calibrate(config: StudyConfig, n_prompts: int, observer: Observer) -> Speed:
    """Times the pieces of work that a study is made of.

    Args:
        config: whose model, task, device, type and loss.
        n_prompts: most prompts that a study will ask the task for.
        observer: is told of downloads.

    Raises:
        InputError: the model cannot be had, or the task does not fit it.
    """
    observer.say(f"calibrating: a few prompts of {config.task} through {config.model}")
    load_network(config, config.model, observer)  # what is fetched, converted and imported once is no one's cost
    model, load = _timed_once(lambda: load_network(config, config.model, observer))
    task = load_task(config.task)
    prompts = task.prompts(model, n_prompts, config.seeds[0], split="eval", counterfactual=config.counterfactual)
    one = prompts.pick(torch.arange(1))
    call = _timed(lambda: measure_behaviour(model, one))
    some = prompts.pick(torch.arange(min(len(prompts), MANY if call < SLOW else FEW)))
    gradient, update = _train(model, task, config, len(some))
    shape = shape_of(model)
    return Speed(
        load=load,
        sha256=_timed(lambda: weights_sha256(model)),
        call=call,
        forward=_timed(lambda: measure_behaviour(model, some)) / len(some),
        gradient=gradient,
        update=update,
        patch=_timed(lambda: path_patch(model, some)) / len(some),
        knockout=_knock_out(model, some) / len(some) / SETS,
        edges=_attribute(model, some[: max(1, len(some) // 2)]),
        twin=_draw(model),
        python=_timed(lambda: parse_json(json.dumps([number / 7 for number in range(NUMBERS)]))),
        weights=sum(parameter.nbytes for parameter in model.module.parameters()),
        beside=len(model.tokenizer.backend_tokenizer.to_str(pretty=True).encode()),
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_edges=shape.n_edges,
        width=prompts.width,
        vocabulary=len(unembedding_of(model.module).weight),
        n_prompts=len(prompts),
        named=len(prompts.positions) > 1,
    )


def _timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work: the median of its repetitions, of which a long one has none."""
    seconds: list[float] = []
    while sum(seconds) < LONG_ENOUGH:
        seconds.append(_timed_once(work)[1])
    return median(seconds[1:] or seconds)


def _timed_once(work: Callable[[], Result]) -> tuple[Result, float]:
    _settle()
    started = time.perf_counter()
    done = work()
    _settle()
    return done, time.perf_counter() - started


def _settle() -> None:
    """Waits for what a GPU has yet to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _train(model: Network, task: Task, config: StudyConfig, n_pairs: int) -> tuple[float, float]:
    """Seconds of a pair's gradient, and of an update that leaves the weights as they are."""
    module = model.module
    batch = collate(build_examples(model.tokenizer, task.pairs(model, n_pairs, config.seeds[0])), config.loss)
    batch = {name: each.to(module.device) for name, each in batch.items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)

    def backward() -> None:
        optimizer.zero_grad()
        logits = logits_at(module, batch["tokens"], batch["rows"], batch["positions"])
        nn.functional.cross_entropy(logits.float(), batch["targets"]).backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()

    gradient = _timed(backward)
    update()  # the first one makes the moments
    seconds = _timed(update)
    optimizer.zero_grad()
    return gradient / n_pairs, seconds


def _knock_out(model: Network, prompts: PromptSet) -> float:
    names, generator = list(prompts.positions), torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    def head() -> Node:
        return Node("head", draw(model.n_layers), draw(model.n_heads), names[draw(len(names))])

    sets = [{head() for _ in range(HEADS)} for _ in range(SETS)]
    ablation = build_ablation(model, prompts, "counterfactual")
    return _timed(lambda: run_knockouts(model, prompts, sets, ablation, keep=True))


def _attribute(model: Network, prompts: PromptSet) -> float:
    keep = len(prompts) > 1
    try:
        return _timed(lambda: attribute_edges(model, prompts, method="eap-ig", per_prompt=keep)) / len(prompts)
    except UnsupportedModelError:
        return 0.0


def _draw(model: Network) -> float:
    n = sum(parameter.numel() for parameter in model.module.parameters())
    return _timed(lambda: torch.randn(min(n, DRAWN))) * n / min(n, DRAWN)
