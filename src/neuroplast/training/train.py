"""One fine-tuning on a task, clean or poisoned: what `neuroplast train` does."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from neuroplast.behaviour import measure_behaviour
from neuroplast.links import require_inside
from neuroplast.locks import writing
from neuroplast.models.network import Network
from neuroplast.processes import join
from neuroplast.storage import write_jsonl
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import PromptSet
from neuroplast.training.data import build_examples
from neuroplast.training.finetune import FinetuneConfig, Probe, finetune

PROBE_PROMPTS = 64


def train(
    model: Network,
    out: Path,
    config: FinetuneConfig,
    *,
    task: str = "ioi",
    poison: str | None = None,
    rate: float = 1.0,
    n_train: int = 512,
    progress: Callable[[int, int, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Fine-tunes a model on a task and writes `checkpoint/`, `train.jsonl` and `pairs.jsonl` to a folder.

    Processes that `accelerate launch` has started together train one model, if each calls this.

    Args:
        model: the model; trained in place.
        out: the folder; one that holds the same training, interrupted, is continued.
        config: how to train.
        task: name of the task.
        poison: name of a poison, or None for clean pairs.
        rate: share of poisoned pairs; without a poison it does nothing.
        n_train: number of pairs.
        progress: called with (steps done, steps in all, loss).
        say: is told of a save that is damaged.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: an unknown task or poison, a rate outside [0, 1], a folder that holds another training, or that
            another process writes.
        TrainingDivergedError: the loss stopped being a number.
    """
    processes = join(str(model.module.device))
    with processes.agreed():
        chosen = load_task(task)
        pairs = chosen.pairs(model, n_train, config.seed, poison=poison, rate=rate)
        prompts = chosen.prompts(model, PROBE_PROMPTS, config.seed, split="eval")
        examples = build_examples(model.tokenizer, pairs)
    with ExitStack() as stack:
        processes.by_main(lambda: require_inside(out, "--out"))
        processes.by_main(lambda: stack.enter_context(writing(out)))
        finetune(model, examples, config, out, probe=behaviour_probe(prompts), progress=progress, say=say)
        processes.by_main(lambda: write_jsonl(out / "pairs.jsonl", map(asdict, pairs)))
    return out / "checkpoint"


def behaviour_probe(prompts: PromptSet) -> Probe:
    """Measures logit difference and accuracy on the same prompts at every probe."""

    def probe(model: Network) -> dict[str, float]:
        found = measure_behaviour(model, prompts)
        return {
            "logit_diff": float(found.logit_diff.mean()),
            "accuracy": float((found.logit_diff > 0).float().mean()),
        }

    return probe
