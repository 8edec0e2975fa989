"""The command line: which commands there are, and how each may end."""

import os
import shlex
import sys
import warnings
from typing import Annotated, Any

import typer

import neuroplast
from neuroplast.commands.checkpoints import audit, compare, repair
from neuroplast.commands.listing import models, tasks
from neuroplast.commands.measuring import discover, evaluate, patch
from neuroplast.commands.study import study
from neuroplast.commands.timing import bench
from neuroplast.commands.training import dose, report, train
from neuroplast.errors import InputError, NeuroplastError
from neuroplast.memory import reuse_freed_memory
from neuroplast.processes import is_main, launched, wait_for_all
from neuroplast.terminal import print_error, stderr, stdout

app = typer.Typer(
    name="neuroplast",
    help="Shows what fine-tuning does to the circuits inside a language model, and whether the damage heals.",
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
"""What typer returns where a key interrupted a command."""

# click's base of everything wrong with a command line, wherever this typer keeps its click
UsageError: Any = typer.BadParameter.__base__


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"neuroplast {neuroplast.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What can be given before a command."""
    if (count := launched()) > 1 and context.invoked_subcommand != train.__name__:
        many = "; a study runs on many machines with --backend ray" if context.invoked_subcommand == "study" else ""
        raise InputError(
            f"{count} processes were launched for `{context.invoked_subcommand}`, and only `train` runs in several: "
            f"start it without a launcher{many}"
        )


for command in (models, tasks, study, patch, discover, evaluate, compare, audit, repair, dose, train, report, bench):
    app.command()(command)


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 bad input; no traceback for anything a user can cause."""
    warnings.filterwarnings("ignore", module=r"transformers|torch|accelerate")
    reuse_freed_memory()
    stdout.quiet = stderr.quiet = not is_main()
    if launched() > 1:
        # Else every process warns that torch looks for weights without a gradient; some models have them.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except NeuroplastError as error:
        code = _fail_all(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(_stopped(), 1)
    except UsageError as error:
        code = _fail_all(error.format_message(), 2)
    if code == INTERRUPTED:
        code = _fail(_stopped(), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> str:
    """What to do after a key interrupted a command."""
    if any(word.startswith("--out") for word in sys.argv) and "bench" not in sys.argv:
        return f"interrupted; what is finished is kept. Go on with: {shlex.join(['neuroplast', *sys.argv[1:]])}"
    return "interrupted"


def _fail(message: str, code: int) -> int:
    print_error(message)
    return code


def _fail_all(message: str, code: int) -> int:
    """Tells what ends every process, before any of them ends."""
    _fail(message, code)
    wait_for_all()
    return code
