"""Two checkpoints of one model: comparing, auditing, mending."""

from pathlib import Path
from typing import Annotated, Any

import typer

from neuroplast.commands.names import STRATEGIES, completing
from neuroplast.commands.options import Counterfactual, Device, Dtype, Json, Memory, Prompts, Quiet, Seed, Task
from neuroplast.errors import InputError
from neuroplast.terminal import print_comparison, print_files, print_json, print_repair, stderr

Twins = Annotated[int, typer.Option(help="Twins that drift as far in random directions: the null of every change.")]
RandomSets = Annotated[int, typer.Option(help="Matched random sets of heads: the null of the circuit's share.")]
Tolerance = Annotated[float, typer.Option(help="Share of a task up to which a loss is no damage.")]
CircuitFile = Annotated[
    str | None, typer.Option(help="A circuit's JSON; default: the heads that act on the logits in the first model.")
]


def compare(
    first: Annotated[str, typer.Argument(help="A checkpoint: a named model, a hub id, a folder.", metavar="A")],
    second: Annotated[str, typer.Argument(help="Another of the same model; an adapter's folder too.", metavar="B")],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command continues an interrupted run.")],
    task: Task = "ioi",
    prompts: Prompts = None,
    n_prompts: Annotated[int | None, typer.Option(help="Prompts of the task; default 64.")] = None,
    seed: Seed = None,
    counterfactual: Counterfactual = None,
    circuit: CircuitFile = None,
    n_drift: Twins = 19,
    n_random: RandomSets = 1000,
    tolerance: Tolerance = 0.1,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two checkpoints on a task: what changed, where it is expressed, and where it is stored."""
    _compare(
        out,
        [],
        memory,
        as_json,
        quiet,
        model=first,
        tuned=second,
        task=task,
        prompts=prompts,
        n_prompts=n_prompts,
        seed=seed,
        counterfactual=counterfactual,
        circuit=circuit,
        battery=False,
        device=device,
        dtype=dtype,
        n_drift=n_drift,
        n_random=n_random,
        tolerance=tolerance,
    )


def audit(
    base: Annotated[str, typer.Argument(help="The checkpoint before: a named model, a hub id, a folder.")],
    tuned: Annotated[str, typer.Argument(help="The checkpoint after; an adapter's folder too.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command continues an interrupted run.")],
    task: Task = "ioi",
    prompts: Prompts = None,
    n_prompts: Annotated[int | None, typer.Option(help="Prompts of the task; default 64.")] = None,
    n_battery: Annotated[int, typer.Option(help="Prompts of each other task.")] = 32,
    seed: Seed = None,
    counterfactual: Counterfactual = None,
    circuit: CircuitFile = None,
    n_drift: Twins = 19,
    n_random: RandomSets = 1000,
    tolerance: Tolerance = 0.1,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit 3 on this: a verdict such as corrupted, or damaged, or damaged:TASK; several times."),
    ] = None,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell whether a fine-tuning damaged a model: the verdict, where it lies, and what was spared; a gate for CI."""
    _compare(
        out,
        fail_on or [],
        memory,
        as_json,
        quiet,
        model=base,
        tuned=tuned,
        task=task,
        prompts=prompts,
        n_prompts=n_prompts,
        n_battery=n_battery,
        seed=seed,
        counterfactual=counterfactual,
        circuit=circuit,
        device=device,
        dtype=dtype,
        n_drift=n_drift,
        n_random=n_random,
        tolerance=tolerance,
    )


def repair(
    models: Annotated[
        list[str], typer.Argument(metavar="[BASE] POISONED", help="The damaged checkpoint, after the base.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the mended checkpoint; the same command continues.")],
    task: Task = "ioi",
    strategy: Annotated[
        str,
        typer.Option(
            help="auto (the cheapest that does it), graft, masked or full.", autocompletion=completing(STRATEGIES)
        ),
    ] = "auto",
    target: Annotated[float, typer.Option(help="How far it has to be back: 1 is as base.")] = 0.9,
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts to choose on, and as many to judge on.")] = 64,
    n_train: Annotated[int, typer.Option(help="Clean examples to retrain on.")] = 512,
    steps: Annotated[int, typer.Option(help="Most optimizer steps of a retraining.")] = 80,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the base.")] = None,
    circuit: Annotated[str | None, typer.Option(help="The base's circuit, to be tried in the mended model.")] = None,
    n_battery: Annotated[int, typer.Option(help="Prompts of each other task checked for new damage.")] = 32,
    seed: Annotated[int, typer.Option(help="Prompts, examples and their order.")] = 0,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Mend a damaged checkpoint at the least cost; exit 3 where the target was not reached.

    Without BASE there is clean retraining only, and what was lost is unknown: the target is then the share of held-out
    prompts that are right.
    """
    from neuroplast.progress import Progress
    from neuroplast.repair import RepairConfig, require_reached, run_repair

    if len(models) > 2:
        raise InputError(
            f"repair takes the damaged checkpoint, after the base where there is one; got {len(models)} models"
        )
    config = RepairConfig(
        poisoned=models[-1],
        base=models[0] if len(models) > 1 else None,
        task=task,
        strategy=strategy,  # pyright: ignore[reportArgumentType] - checked there
        target=target,
        n_prompts=n_prompts,
        n_train=n_train,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        circuit=circuit,
        n_battery=n_battery,
        seed=seed,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
    )
    with Progress(stderr, quiet or as_json) as progress:
        document = run_repair(config, out, progress, memory=memory)
    if as_json:
        print_json(document)
    else:
        print_repair(document)
        print_files(document["files"])
    require_reached(document)


def _compare(out: Path, fail_on: list[str], memory: str | None, as_json: bool, quiet: bool, **settings: Any) -> None:
    from neuroplast.audit import AuditConfig, require_gate, run_audit
    from neuroplast.progress import Progress

    config = AuditConfig(**settings)
    with Progress(stderr, quiet or as_json) as progress:
        document = run_audit(config, out, progress, fail_on=fail_on, memory=memory)
    if as_json:
        print_json(document)
    else:
        print_comparison(document)
        print_files(document["files"])
    require_gate(document)
