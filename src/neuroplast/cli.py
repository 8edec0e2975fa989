"""The command line: parses, calls the front door, prints what `neuroplast.terminal` makes of it."""

import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from neuroplast.errors import InputError, NeuroplastError
from neuroplast.memory import reuse_freed_memory
from neuroplast.terminal import (
    build_table,
    print_circuit,
    print_comparison,
    print_criteria,
    print_effects,
    print_error,
    print_files,
    print_json,
    print_repair,
    print_story,
    stderr,
    stdout,
)

app = typer.Typer(
    name="neuroplast",
    help="Shows what fine-tuning does to the circuits inside a language model, and whether the damage heals.",
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
"""What typer returns where a key interrupted a command."""
STOPPED = "interrupted; the same command goes on from what is saved"

# click's base of everything wrong with a command line, wherever this typer keeps its click
UsageError: Any = typer.BadParameter.__base__


Model = Annotated[str, typer.Option(help="tiny, smollm2-135m, a hub id such as gpt2, or a local folder.")]
Task = Annotated[str, typer.Option(help="The task; see `neuroplast tasks`.")]
Prompts = Annotated[str | None, typer.Option(help="JSONL of your own prompts instead of the task's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the task's prompts; default 0.")]
Counterfactual = Annotated[str | None, typer.Option(help="Default: the task's first.")]
Memory = Annotated[str | None, typer.Option(help="Most memory to use, such as 4GiB; default: what is free.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 bad input; no traceback for anything a user can cause."""
    warnings.filterwarnings("ignore", module=r"transformers|torch|accelerate")
    reuse_freed_memory()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except NeuroplastError as error:
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(STOPPED, 1)
    except UsageError as error:
        code = _fail(error.format_message(), 2)
    if code == INTERRUPTED:
        code = _fail(STOPPED, 1)
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def models(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the named models and whether they are at hand."""
    from neuroplast.models.sources import list_models

    rows = list_models()
    if as_json:
        return print_json([vars(row) for row in rows])
    table = build_table("model", "what", "at hand", "where")
    for row in rows:
        table.add_row(row.name, row.description, "yes" if row.cached else "no", escape(row.location))
    stdout.print(table)
    stdout.print("Any Hugging Face hub id or local folder of a causal language model works as well.")


@app.command()
def tasks(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the tasks with their counterfactuals and poisons."""
    from neuroplast.tasks import TASKS

    rows = [
        {
            "name": task.name,
            "description": task.description,
            "positions": task.positions,
            "counterfactuals": task.counterfactuals,
            "poisons": task.poisons,
        }
        for task in TASKS.values()
    ]
    if as_json:
        return print_json(rows)
    table = build_table("task", "what", "positions", "counterfactuals", "poisons")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else "\n".join(value) for value in row.values()))
    stdout.print(table)


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Run directory; the same command continues an interrupted run.")],
    model: Annotated[str | None, typer.Option(help="tiny, smollm2-135m, a hub id, or a local folder.")] = None,
    task: Annotated[str | None, typer.Option(help="The task; see `neuroplast tasks`.")] = None,
    poison: Annotated[list[str] | None, typer.Option(help="A poison; may be given several times.")] = None,
    preset: Annotated[str | None, typer.Option(help="smoke (seconds), quick (default) or paper.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A seed; may be given several times.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in TOML, as in a run's study.toml.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, any setting.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole study: base → tuned → poisoned → recovered, with the equal-step control and a report."""
    from neuroplast.study.plan import build_config, load_config

    flags = {
        "model": model,
        "task": task,
        "poisons": poison,
        "preset": preset,
        "seeds": seed,
        "device": device,
    }
    given = {name: value for name, value in flags.items() if value}
    settings = build_config("quick", load_config(config) if config else {}, given, assignments=assignments or [])
    from neuroplast.progress import Progress
    from neuroplast.study.runner import run_study  # slow to import: a wrong setting is told before

    with Progress(stderr, quiet or as_json) as progress:
        result = run_study(settings, out, progress, shlex.join(["neuroplast", *sys.argv[1:]]))
    if as_json:
        return print_json(result.summary)
    print_story(result.summary)
    stdout.print(f"summary  {result.folder / 'summary.json'}\nreport   {result.report}", soft_wrap=True, markup=False)


@app.command()
def patch(
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command continues an interrupted run.")],
    senders: Annotated[
        list[str] | None,
        typer.Option("--from", help="heads, mlps, input, all, or names such as a9.h1@s2 and groups a0.h1+m0."),
    ] = None,
    receivers: Annotated[
        list[str] | None,
        typer.Option("--to", help="logits, or what is read, such as 'a23.h3<q>@end' (in quotes) or m3; set together."),
    ] = None,
    method: Annotated[str, typer.Option(help="path, activation, edge, eap, eap-ig or ceap.")] = "path",
    model: Model = "tiny",
    task: Task = "ioi",
    prompts: Prompts = None,
    n_prompts: Annotated[int | None, typer.Option(help="Prompts of the task; default 64.")] = None,
    seed: Seed = None,
    counterfactual: Counterfactual = None,
    mlps: Annotated[str | None, typer.Option(help="path: live (default), or frozen for direct paths only.")] = None,
    knock_out: Annotated[list[str] | None, typer.Option(help="path: heads that are knocked out underneath.")] = None,
    into: Annotated[str | None, typer.Option(help="activation: patch the clean or the counterfactual run.")] = None,
    steps: Annotated[int | None, typer.Option(help="eap-ig, ceap: points on the way.")] = None,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Patch heads, MLPs, positions or edges, exactly, and see what each does to the logit difference."""
    from neuroplast.patch import PatchConfig, run_patch
    from neuroplast.progress import Progress

    config = PatchConfig(
        method=method,
        model=model,
        task=task,
        prompts=prompts,
        n_prompts=n_prompts,
        seed=seed,
        counterfactual=counterfactual,
        senders=",".join(senders) if senders else None,
        receivers=",".join(receivers) if receivers else None,
        mlps=mlps,
        knocked_out=",".join(knock_out) if knock_out else None,
        into=into,
        steps=steps,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - checked there
    )
    with Progress(stderr, quiet or as_json) as progress:
        summary = run_patch(config, out, progress, memory=memory)
    if as_json:
        return print_json(summary)
    print_effects(summary)
    print_files(summary["files"])


@app.command()
def discover(
    out: Annotated[Path, typer.Option(help="Folder for the circuit; the same command continues an interrupted run.")],
    method: Annotated[
        str, typer.Option(help="path (heads at positions), or edges: eap, eap-ig, ceap, exact.")
    ] = "path",
    model: Model = "tiny",
    task: Task = "ioi",
    prompts: Prompts = None,
    n_prompts: Annotated[int | None, typer.Option(help="Prompts of the task; default 128.")] = None,
    seed: Seed = None,
    counterfactual: Counterfactual = None,
    threshold: Annotated[float | None, typer.Option(help="Least effect as a share of LD; path: default 0.02.")] = None,
    attention: Annotated[float | None, typer.Option(help="path: read k and v where a head attends this much.")] = None,
    positions: Annotated[str | None, typer.Option(help="path: named positions to look at, such as s2,end.")] = None,
    backups: Annotated[
        bool | None, typer.Option("--backups/--no-backups", help="path: look again with the movers knocked out.")
    ] = None,
    select: Annotated[str | None, typer.Option(help="edges: top-n, threshold or greedy.")] = None,
    n_edges: Annotated[int | None, typer.Option(help="edges: how many.")] = None,
    steps: Annotated[int | None, typer.Option(help="eap-ig, ceap: points on the way.")] = None,
    prune: Annotated[float | None, typer.Option(help="edges: then drop those that change LD by less, exactly.")] = None,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the circuit that does a task, and name what its heads do."""
    from neuroplast.discovery import DiscoverConfig, run_discover
    from neuroplast.progress import Progress

    config = DiscoverConfig(
        method=method,
        model=model,
        task=task,
        prompts=prompts,
        n_prompts=n_prompts,
        seed=seed,
        counterfactual=counterfactual,
        threshold=threshold,
        attention=attention,
        positions=positions,
        backups=backups,
        select=select,
        n=n_edges,
        steps=steps,
        prune=prune,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - checked there
    )
    with Progress(stderr, quiet or as_json) as progress:
        summary = run_discover(config, out, progress, memory=memory)
    if as_json:
        return print_json(summary)
    print_circuit(summary)
    print_files(summary["files"])


@app.command()
def evaluate(
    circuit: Annotated[str, typer.Argument(help="The circuit's JSON: ours, or of EAP-IG or MIB.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command continues an interrupted run.")],
    model: Model = "tiny",
    task: Task = "ioi",
    prompts: Prompts = None,
    n_prompts: Annotated[int | None, typer.Option(help="Prompts of the task; default 128.")] = None,
    seed: Seed = None,
    counterfactual: Counterfactual = None,
    ablation: Annotated[
        str, typer.Option(help="mean-by-position, mean, zero, resample or counterfactual.")
    ] = "mean-by-position",
    n_reference: Annotated[int, typer.Option(help="Prompts that means are taken over; they are not measured.")] = 480,
    n_random: Annotated[int, typer.Option(help="Matched random circuits.")] = 100,
    n_subsets: Annotated[int, typer.Option(help="Random sets K for completeness.")] = 20,
    greedy_steps: Annotated[int, typer.Option(help="Nodes that the greedy set K takes at most.")] = 10,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a circuit: faithfulness, completeness, minimality, against random circuits of the same shape."""
    from neuroplast.evaluation import EvaluateConfig, run_evaluate
    from neuroplast.progress import Progress

    config = EvaluateConfig(
        circuit=circuit,
        model=model,
        task=task,
        prompts=prompts,
        n_prompts=n_prompts,
        seed=seed,
        counterfactual=counterfactual,
        ablation=ablation,
        n_reference=n_reference,
        n_random=n_random,
        n_subsets=n_subsets,
        greedy_steps=greedy_steps,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - checked there
    )
    with Progress(stderr, quiet or as_json) as progress:
        document = run_evaluate(config, out, progress, memory=memory)
    if as_json:
        return print_json(document)
    print_criteria(document)
    print_files(document["files"])


Twins = Annotated[int, typer.Option(help="Twins that drift as far in random directions: the null of every change.")]
RandomSets = Annotated[int, typer.Option(help="Matched random sets of heads: the null of the circuit's share.")]
Tolerance = Annotated[float, typer.Option(help="Share of a task up to which a loss is no damage.")]
CircuitFile = Annotated[
    str | None, typer.Option(help="A circuit's JSON; default: the heads that act on the logits in the first model.")
]


@app.command()
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


@app.command()
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


@app.command()
def repair(
    models: Annotated[
        list[str], typer.Argument(metavar="[BASE] POISONED", help="The damaged checkpoint, after the base.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the mended checkpoint; the same command continues.")],
    task: Task = "ioi",
    strategy: Annotated[str, typer.Option(help="auto (the cheapest that does it), graft, masked or full.")] = "auto",
    target: Annotated[float, typer.Option(help="How far it has to be back: 1 is as base.")] = 0.9,
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts to choose on, and as many to judge on.")] = 64,
    n_train: Annotated[int, typer.Option(help="Clean examples to retrain on.")] = 512,
    steps: Annotated[int, typer.Option(help="Most optimizer steps of a retraining.")] = 80,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the base.")] = None,
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


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint/ and train.jsonl.")],
    model: Model = "tiny",
    task: Task = "ioi",
    poison: Annotated[str | None, typer.Option(help="A poison; without one, clean pairs.")] = None,
    rate: Annotated[float, typer.Option(help="Share of poisoned pairs, 0 to 1.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    n_train: Annotated[int, typer.Option(help="Training pairs.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the model.")] = None,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "constant",
    loss: Annotated[str, typer.Option(help="last: at the target only; all: at every token.")] = "last",
    seed: Annotated[int, typer.Option(help="Pairs and their order.")] = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on a task, clean or poisoned; an interrupted run continues with the same command."""
    from neuroplast.models.sources import LEARNING_RATE, LEARNING_RATES, load_model
    from neuroplast.progress import Progress
    from neuroplast.training import FinetuneConfig
    from neuroplast.training import train as run

    config = FinetuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=LEARNING_RATES.get(model, LEARNING_RATE) if learning_rate is None else learning_rate,
        schedule=schedule,  # pyright: ignore[reportArgumentType] - checked there
        loss=loss,  # pyright: ignore[reportArgumentType]
        seed=seed,
    )
    with Progress(stderr, quiet or as_json) as progress:
        network = load_model(model, device=device, say=progress.say)
        checkpoint = run(
            network,
            out,
            config,
            task=task,
            poison=poison,
            rate=rate,
            n_train=n_train,
            progress=lambda done, total, value: progress.progress("fine-tuning", done, total, f"loss {value:.3f}"),
        )
    if as_json:
        return print_json({"checkpoint": str(checkpoint), "log": str(out / "train.jsonl")})
    stdout.print(f"checkpoint  {checkpoint}\nlog         {out / 'train.jsonl'}", soft_wrap=True, markup=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished study.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the report, the figures and the tables of a finished study again."""
    from neuroplast.report import write_report

    page = write_report(run)
    if as_json:
        return print_json({"report": str(page)})
    stdout.print(f"report  {page}", soft_wrap=True, markup=False)


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


def _fail(message: str, code: int) -> int:
    print_error(message)
    return code
