"""Fine-tuning on `transformers.Trainer`, resumable to the same bits.

What the Trainer gives: the loop, devices, mixed precision, gradient clipping. What is ours: the loss at chosen
places only, and resuming without unpickling. A run is a function of its settings: the order of examples and the
random state of every step follow from the seed, so a resumed run needs only weights, moments and the step.

Several processes, launched together, train the same model as one, up to rounding: each takes its share of every
batch and weighs its loss by the places that it has of the batch's.

A stage folder while training: `training.json` and `resume/` (`saves.py`); at the end `train.jsonl` and `checkpoint/`,
and `resume/` is gone.
"""

import math
import random
import shutil
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_callback import PrinterCallback

from neuroplast.components import Component
from neuroplast.errors import InputError, StorageError, TrainingDivergedError, unknown_name
from neuroplast.models.network import Network, logits_at
from neuroplast.models.weights import WeightMap, choose_pieces
from neuroplast.processes import Processes, join
from neuroplast.statistics import MOST_SEED
from neuroplast.storage import write_jsonl
from neuroplast.training.data import Example, Loss, collate_share, schedule_examples
from neuroplast.training.saves import claim, last_save, restore, save_checkpoint, write_save

Schedule = Literal["constant", "linear", "cosine"]
Probe = Callable[[Network], Mapping[str, float]]
"""Measures the model during training; its numbers go into `train.jsonl`."""


@dataclass(frozen=True)
class Visit:
    """Something to be done with the model at some steps of its training, such as a long measurement."""

    steps: frozenset[int]
    """After which steps; 0 is before the first."""
    do: Callable[[Network, int], bool | None]
    """Called with the model, ready to be measured, and the step; of a run that is continued, again from its last save
    on, so it keeps what it finds itself. True ends the training there."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int = 16
    """Pairs a step."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, or falling to 0."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    loss: Loss = "last"
    """`last`: the loss at the target only; `all`: at every token of the sequence."""
    seed: int = 0
    """Order of the pairs, and dropout where the model has any."""
    save_every: int = 10
    """Steps between saves that a killed run continues from."""
    probe_every: int = 5
    """Steps between measurements during training."""

    def __post_init__(self) -> None:
        for name, known in (("schedule", get_args(Schedule)), ("loss", get_args(Loss))):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        for name in ("steps", "batch_size", "save_every", "probe_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")
        if self.seed > MOST_SEED:
            raise InputError(f"seed must be at most {MOST_SEED}, got {self.seed}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}")


def finetune(
    model: Network,
    examples: Sequence[Example],
    config: FinetuneConfig,
    folder: Path,
    *,
    only: Collection[Component] | None = None,
    keep: Mapping[int, Path] | None = None,
    probe: Probe | None = None,
    visit: Visit | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Trains a model in place and leaves its final weights in `folder/checkpoint`.

    The same call on a folder that holds an interrupted run continues it, to the same weights on the same machine.

    Args:
        model: the model to train.
        examples: what to train on.
        config: how.
        folder: the stage's folder.
        only: the parts of the weights that may change; None lets all of them.
        keep: further folders to save a checkpoint to, by step.
        probe: measures the model before the first step, every `probe_every` steps and after the last.
        visit: what else is done with the model on the way.
        progress: called with (steps done, steps in all, loss) after each step.
        say: is told of a save that is damaged: the training begins anew then, to the same weights.

    Raises:
        TrainingDivergedError: the loss stopped being a number; the last save, a good
            checkpoint, stays in `folder/resume`.
        InputError: `folder` holds a run with other settings, examples or starting weights; a part of the weights that
            is not there; weight decay where only some weights may change; a GPU that is not the first.
    """
    settings = asdict(config) | ({} if only is None else {"only": sorted(map(str, only))})
    with _freed(model, config, only):
        _finetune(model, examples, config, settings, folder, keep, probe, visit, progress, say)


def _finetune(
    model: Network,
    examples: Sequence[Example],
    config: FinetuneConfig,
    settings: Mapping[str, Any],
    folder: Path,
    keep: Mapping[int, Path] | None,
    probe: Probe | None,
    visit: Visit | None,
    progress: Callable[[int, int, float], None] | None,
    say: Callable[[str], None] | None,
) -> None:
    module = model.module
    processes = join(str(module.device))
    if processes.count == 1 and (module.device.index or 0) > 0:
        raise InputError(
            f"training takes the first GPU that it sees, not {module.device}: give --device cuda, with "
            f"CUDA_VISIBLE_DEVICES={module.device.index} in the environment"
        )
    if config.batch_size < processes.count:
        raise InputError(
            f"batch_size {config.batch_size} is less than the {processes.count} processes, which share a batch; "
            "give a larger one, or launch fewer"
        )
    processes.by_main(partial(claim, folder, settings, examples, module))
    if (folder / "checkpoint").is_dir():
        processes.by_main(partial(shutil.rmtree, folder / "resume", ignore_errors=True))
        return
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    history: list[dict[str, Any]] = []
    if saved := last_save(folder):
        try:
            with processes.agreed():
                history = restore(module, optimizer, saved)
        except StorageError as error:
            if say is not None:
                say(f"{error}; the training begins anew")
            processes.by_main(partial(shutil.rmtree, folder / "resume"))
            return _finetune(model, examples, config, settings, folder, keep, probe, visit, progress, say)
    done = int(history[-1]["step"]) if history else 0
    processes.require_same(done, f"{folder} is not the same to all processes; give one that they share")
    follower = _Follower(
        model, config, examples, folder, done, history, optimizer, keep or {}, probe, visit, progress, processes
    )
    if done == 0:
        follower.begin()
    if done < config.steps:
        order = schedule_examples(examples, config.batch_size, config.steps, config.seed)
        _train(module, optimizer, config, order, done, follower)
    module.eval()
    processes.by_main(partial(_finish, model, folder, history))


def _finish(model: Network, folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    write_jsonl(folder / "train.jsonl", history)
    save_checkpoint(model, folder / "checkpoint")
    shutil.rmtree(folder / "resume", ignore_errors=True)


@contextmanager
def _freed(model: Network, config: FinetuneConfig, only: Collection[Component] | None) -> Generator[None]:
    """Lets only some of the weights change inside the block: the others have no gradient, so AdamW leaves them."""
    if only is None:
        yield
        return
    if config.weight_decay:
        raise InputError(
            f"weight_decay is {config.weight_decay:g}: it would move the weights that may not change; use 0"
        )
    if not only:
        raise InputError("no part of the weights may change: name some, or leave `only` out")
    masks: dict[str, Tensor] = {}
    for piece in choose_pieces(WeightMap(model).pieces(), only):
        weight = model.module.get_parameter(piece.name)
        masks.setdefault(piece.name, torch.zeros_like(weight))[piece.index] = 1
    with ExitStack() as stack:
        for name, weight in model.module.named_parameters():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(name in masks)
            if name in masks:
                stack.callback(weight.register_hook(partial(torch.mul, masks[name])).remove)
        yield


def _train(
    module: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    order: Sequence[Example],
    done: int,
    follower: "_Follower",
) -> None:
    shape = _schedule(config, optimizer).lr_lambdas[0]
    scheduler = LambdaLR(optimizer, lambda step: shape(step + done))
    with TemporaryDirectory(prefix="neuroplast-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=config.steps - done,
            per_device_train_batch_size=config.batch_size,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=module.device.type == "cpu",
            use_cache=bool(module.config.use_cache),  # else the Trainer changes it in the saved config
            max_grad_norm=config.max_grad_norm,
            seed=config.seed % 2**32,
        )
        # Else the Trainer spreads a batch over all GPUs, and its places not.
        arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
        trainer = _PlacesTrainer(model=module, args=arguments, optimizers=(optimizer, scheduler), callbacks=[follower])
        trainer.remove_callback(PrinterCallback)
        trainer.loader = DataLoader(
            order[done * config.batch_size :],  # pyright: ignore[reportArgumentType]
            batch_size=config.batch_size,
            collate_fn=partial(collate_share, loss=config.loss, processes=follower.processes),
        )
        trainer.on_loss = follower.check
        trainer.train()


def _schedule(config: FinetuneConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    if config.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, config.warmup_steps)
    falling = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    return falling[config.schedule](optimizer, config.warmup_steps, config.steps)


class _PlacesTrainer(Trainer):
    """A Trainer whose unembedding and loss see only the places where the loss is taken."""

    loader: DataLoader[Any]
    on_loss: Callable[[float], None]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order that was laid down."""
        return self.loader

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Mean cross-entropy over the places of the batch, or this process's part: their mean is that of the batch."""
        module = self.accelerator.unwrap_model(model)
        # Through the model as it is wrapped: the wrapper takes the mean of the processes' gradients.
        logits = logits_at(module, inputs["tokens"], inputs["rows"], inputs["positions"], through=model)
        loss = nn.functional.cross_entropy(logits.float(), inputs["targets"]) * inputs["weight"]
        of_all: Any = self.accelerator.reduce(loss.detach(), "mean")
        self.on_loss(of_all.item())
        return loss


class _Follower(TrainerCallback):
    """Seeds each step, writes the history, probes, saves, and stops a run whose loss is no number."""

    def __init__(
        self,
        model: Network,
        config: FinetuneConfig,
        examples: Sequence[Example],
        folder: Path,
        done: int,
        history: list[dict[str, Any]],
        optimizer: torch.optim.Optimizer,
        keep: Mapping[int, Path],
        probe: Probe | None,
        visit: Visit | None,
        progress: Callable[[int, int, float], None] | None,
        processes: Processes,
    ) -> None:
        self.model, self.config, self.folder, self.done = model, config, folder, done
        self.steps_an_epoch = len(examples) / config.batch_size
        self.history, self.optimizer, self.keep = history, optimizer, keep
        self.probe, self.visit, self.progress, self.processes = probe, visit, progress, processes
        self.loss = self.rate = math.nan

    def begin(self) -> None:
        """What is done with the model before the first step."""
        if (probe := self.probe) is not None:
            row: dict[str, Any] = {"step": 0, "epoch": 0.0, "loss": None, "learning_rate": None}
            self.processes.by_main(lambda: row.update(probe(self.model)))
            self.history.append(row)
        if self.visit is not None and 0 in self.visit.steps:
            self.processes.by_main(partial(self.visit.do, self.model, 0))

    def check(self, loss: float) -> None:
        """Takes the loss of the running step, which all processes have found together."""
        self.loss = loss
        if not math.isfinite(loss):
            with self.processes.agreed():
                raise self._diverged(f"the loss became {loss}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes what is random in a step (dropout) a function of the seed, the step and the process."""
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        own = "" if self.processes.is_main else f"/{self.processes.index}"
        step = self.done + state.global_step
        torch.manual_seed(random.Random(f"step/{self.config.seed}/{step}{own}").getrandbits(63))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the step down; probes and saves when it is time."""
        step, config, by_main = self.done + state.global_step, self.config, self.processes.by_main
        row: dict[str, Any] = {"step": step, "epoch": step / self.steps_an_epoch}
        row |= {"loss": self.loss, "learning_rate": self.rate}
        if self.probe is not None and (step % config.probe_every == 0 or step == config.steps):
            by_main(partial(self._probe, self.probe, row))
        self.history.append(row)
        if self.visit is not None and step in self.visit.steps:
            control.should_training_stop |= by_main(partial(self._visit, self.visit, step))
        if step in self.keep:
            by_main(partial(self._keep, self.keep[step]))
        # A save where a visit ended the training would be gone on from.
        if step % config.save_every == 0 and step < config.steps and not control.should_training_stop:
            by_main(partial(self._save, step))
        if step == config.steps:
            by_main(self._require_finite)
        if self.progress is not None and self.processes.is_main:
            self.progress(step, config.steps, self.loss)

    @contextmanager
    def _measured(self) -> Generator[None]:
        """A model that is measured has no dropout."""
        self.model.module.eval()
        yield
        self.model.module.train()

    def _probe(self, probe: Probe, row: dict[str, Any]) -> None:
        with self._measured():
            row.update(probe(self.model))
        if not all(map(math.isfinite, row.values())):
            raise self._diverged("the model's logits are no longer numbers")

    def _visit(self, visit: Visit, step: int) -> bool:
        self._require_finite()
        with self._measured():
            return bool(visit.do(self.model, step))

    def _keep(self, folder: Path) -> None:
        self._require_finite()
        save_checkpoint(self.model, folder)

    def _save(self, step: int) -> None:
        self._require_finite()
        write_save(self.folder, step, self.model, self.optimizer, self.history)

    def _require_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.module.parameters()):
            raise self._diverged("the weights are no longer numbers")

    def _diverged(self, what: str) -> TrainingDivergedError:
        kept = last_save(self.folder)
        saved = f"the last good checkpoint is {kept}" if kept else "no step had been saved yet"
        return TrainingDivergedError(
            f"training diverged after step {self.history[-1]['step'] if self.history else 0}: {what}; {saved}. "
            f"Lower learning_rate (now {self.config.learning_rate:g}) and choose another --out"
        )
