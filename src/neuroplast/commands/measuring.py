"""One question at a time: what heads and edges do, which circuit does the task, and whether it is the circuit."""

from pathlib import Path
from typing import Annotated

import typer

from neuroplast.commands.names import ABLATIONS, DISCOVERIES, INTERVENTIONS, completing
from neuroplast.commands.options import Counterfactual, Device, Dtype, Json, Memory, Model, Prompts, Quiet, Seed, Task
from neuroplast.terminal import print_circuit, print_criteria, print_effects, print_files, print_json, stderr


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
    method: Annotated[
        str,
        typer.Option(help="path, activation, edge, eap, eap-ig or ceap.", autocompletion=completing(INTERVENTIONS)),
    ] = "path",
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


def discover(
    out: Annotated[Path, typer.Option(help="Folder for the circuit; the same command continues an interrupted run.")],
    method: Annotated[
        str,
        typer.Option(
            help="path (heads at positions), or edges: eap, eap-ig, ceap, exact.",
            autocompletion=completing(DISCOVERIES),
        ),
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
        str,
        typer.Option(
            help="mean-by-position, mean, zero, resample or counterfactual.", autocompletion=completing(ABLATIONS)
        ),
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
