"""Rows of checkpoints: the ledger of a change, a training, a whole study."""

import copy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from neuroplast.bench.job import TASK, Alternating, Counted, Job, Missing, Peer, PeerTime, Setting
from neuroplast.bench.operations import training_operations
from neuroplast.bench.plain import PlainPasses, plain_attention
from neuroplast.bench.rate import timed
from neuroplast.interventions.ledger import Ledger, build_ledger
from neuroplast.models.network import Network, logits_at
from neuroplast.models.sources import suited_learning_rate
from neuroplast.study import build_config, run_study
from neuroplast.tasks import load_task
from neuroplast.training.data import Example, build_examples, collate, schedule_examples
from neuroplast.training.finetune import FinetuneConfig, finetune

LEDGER_PROMPTS = 8
"""Prompts of the ledger, at most."""
FAR = 0.01
"""How far the other checkpoint of the ledger lies: noise on every weight, as a share of its standard deviation."""
STEPS, BATCH = 6, 16
"""Steps of the training, and examples a step."""
STUDY: dict[str, Any] = {"circuit_stages": [], "compare_stages": [], "save_every": 10}
"""Settings of the study beside the preset: no circuits and no comparisons, which take far longer than the
rest, and no saves to continue from."""


def copy_of(model: Network) -> Network:
    """The same model with weights of its own."""
    return copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})


def ledger(setting: Setting) -> Job:
    """The change between two checkpoints split over all weights."""
    model, prompts = setting.model, setting.prompts(LEDGER_PROMPTS)
    plain = PlainPasses(model, prompts)

    def passes(found: Ledger) -> None:
        for _ in range(found.points):
            plain.backward()
        for _ in range(2):
            plain.forward()

    return Job(
        f"a change split over all weights (ledger), {len(prompts)} prompts",
        partial(build_ledger, model, _beside(model), prompts),
        Alternating(passes),
        Missing("no peer splits a change over the weights"),
    )


def training(setting: Setting) -> Job:
    """A fine-tuning, with the checkpoint that it leaves."""
    model = copy_of(setting.model)
    pairs = load_task(TASK).pairs(model, STEPS * BATCH, 0)
    examples = build_examples(model.tokenizer, pairs)
    config = FinetuneConfig(STEPS, BATCH, learning_rate=suited_learning_rate(model), save_every=STEPS)
    order = schedule_examples(examples, BATCH, STEPS, config.seed)
    operations = training_operations(model, order)

    def run() -> None:
        with TemporaryDirectory(dir=setting.folder) as folder:
            finetune(model, examples, config, Path(folder))

    def plainly(_: Any) -> PeerTime:
        return PeerTime(timed(lambda: train_plainly(model, order, config), model), "all steps, no checkpoint")

    return Job(
        f"training, {STEPS} steps of {BATCH} examples, and its checkpoint",
        run,
        Counted(lambda _: operations),
        Peer("a loop in torch, without a checkpoint", plainly),
    )


def train_plainly(model: Network, order: list[Example], config: FinetuneConfig) -> None:
    """The same steps as the shortest loop that takes them, with the library's default attention."""
    module = model.module
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    module.train()
    with plain_attention(model), torch.enable_grad():
        for start in range(0, len(order), config.batch_size):
            batch = collate(order[start : start + config.batch_size], config.loss)
            tokens, rows, positions, targets = (each.to(model.device) for each in batch.values())
            logits = logits_at(module, tokens, rows, positions)
            nn.functional.cross_entropy(logits.float(), targets).backward()
            nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    module.eval()


def study(setting: Setting) -> Job:
    """A whole study: five stages trained, measured and followed, and its report."""
    config = build_config("smoke", STUDY, {"model": setting.name, "device": setting.device})

    def run() -> None:
        with TemporaryDirectory(dir=setting.folder) as folder:
            run_study(config, Path(folder) / "study")

    return Job(
        "a small study: four trainings, five stages, its report",
        run,
        Missing("most of a small study is loading, saving, resampling and drawing, which no count of products bounds"),
        Missing("no peer runs such a study"),
        is_long=True,
    )


def _beside(model: Network) -> Network:
    """A checkpoint near by."""
    other = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.module.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * weight.std() * FAR)
    return other
