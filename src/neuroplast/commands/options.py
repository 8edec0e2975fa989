"""Options that several commands share."""

from typing import Annotated

import typer

from neuroplast.commands.names import MODELS, TASKS, completing

Model = Annotated[
    str,
    typer.Option(
        help="tiny, smollm2-135m, a hub id such as gpt2, or a local folder.", autocompletion=completing(MODELS)
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="The task, or a JSONL file of your own; see `neuroplast tasks`.", autocompletion=completing(TASKS)
    ),
]
Prompts = Annotated[str | None, typer.Option(help="JSONL of your own prompts instead of the task's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the task's prompts; default 0.")]
Counterfactual = Annotated[str | None, typer.Option(help="Default: the task's first.")]
Memory = Annotated[str | None, typer.Option(help="Most memory to use, such as 4GiB; default: what is free.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
