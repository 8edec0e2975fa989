"""Time and peak memory for 32 to 512 prompts under budgets of 2 and 6 GiB.

    python benchmarks/scaling.py --model smollm2-135m

Each cell is measured in a process of its own, whose peak includes loading the model. It ends with exit code 1 where a
peak is above its budget, or a prompt takes a tenth more time than at 32. The last line is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import neuroplast as npl
from neuroplast.bench.rate import timed
from neuroplast.bench.sweeps import late_queries
from neuroplast.memory import parse_size, reuse_freed_memory, show_size

BUDGETS = ("2GiB", "6GiB")
SIZES = (32, 64, 128, 256, 512)
WORK: dict[str, Callable[..., Any]] = {
    "heads-to-logits": npl.path_patch,
    "heads-to-queries": lambda model, prompts, **more: npl.path_patch(
        model, prompts, receivers=late_queries(model), **more
    ),
    "edges": lambda model, prompts, **more: npl.attribute_edges(model, prompts, method="eap", **more),
}


def run_alone(options: argparse.Namespace) -> None:
    """One cell of the table, in this process."""
    name, n, memory = options.alone
    model = npl.load_model(options.model, say=lambda line: print(line, file=sys.stderr))
    prompts = npl.tasks.ioi.prompts(model, n=int(n), seed=0)
    WORK[name](model, prompts[:64], memory=memory)  # memory's first use costs as much as the work in it
    seconds = timed(lambda: WORK[name](model, prompts, memory=memory), model)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell and prints the table."""
    document: dict[str, Any] = {"kept": True}
    print(f"{'':<18}{'budget':<8}{'prompts':>8}{'seconds':>10}{'a prompt':>10}{'÷ at 32':>9}{'peak':>11}")
    for name in options.row or WORK:
        for memory in BUDGETS:
            first = 0.0
            for n in SIZES:
                command = [sys.executable, __file__, "--model", options.model, "--alone", name, str(n), memory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                first = first or seconds / n
                document[f"{name} {memory} {n}"] = {"seconds": seconds, "peak_bytes": peak}
                row = f"{name:<18}{memory:<8}{n:>8}{seconds:>10.1f}{seconds / n:>10.3f}{seconds / n / first:>9.2f}"
                print(row + f"{show_size(peak):>11}", flush=True)
                document["kept"] &= peak <= parse_size(memory) and seconds / n <= 1.1 * first
    return document


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--row", choices=WORK, action="append", help="one of these; several times; default: all")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reuse_freed_memory()
    if options.alone:
        return run_alone(options)
    document = measure(options)
    print(json.dumps(document))
    sys.exit(not document["kept"])


if __name__ == "__main__":
    main()
