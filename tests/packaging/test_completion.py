"""A shell completes commands, options and names, and what it offers is what there is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neuroplast import patch
from neuroplast.bench.rows import ROWS
from neuroplast.circuits import discover
from neuroplast.commands import names
from neuroplast.interventions import ablation
from neuroplast.models import sources
from neuroplast.repair import repair
from neuroplast.study import PRESETS
from neuroplast.tasks import TASKS, poisons

COMMAND = shutil.which("neuroplast", path=Path(sys.executable).parent)

# Sources what `--show-completion` prints, then completes the last word, as bash does on the tab key.
BASH = """
PATH="{folder}:$PATH"
source <(neuroplast --show-completion)
COMP_WORDS=({words})
COMP_CWORD={last}
_neuroplast_completion neuroplast
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

# Completes in a process that then says what it has loaded.
PROBE = """
import json, sys
sys.argv = ["neuroplast"]
from neuroplast.cli import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def complete(*words: str) -> list[str]:
    """What bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in ("neuroplast", *words))
    script = BASH.format(folder=Path(sys.executable).parent, words=quoted, last=len(words))
    # Which shell is asked for is found by looking at the parent process, so it is a bash that asks.
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["di"], ["discover"]),
        (["study", "--pre"], ["--preset"]),
        (["study", "--preset", ""], list(names.PRESETS)),
        (["study", "--model", "s"], ["smollm2-135m"]),
        (["train", "--poison", "n"], ["name_moving", "not_greater"]),
        (["patch", "--task", "i"], ["ioi", "induction"]),
        (["repair", "a", "b", "--strategy", "m"], ["masked"]),
        (["evaluate", "c.json", "--ablation", "mean"], ["mean-by-position", "mean"]),
        (["study", "--model", "runs/"], []),
    ],
)
def test_bash_completes(words: list[str], offered: list[str]):
    assert complete(*words) == offered


def test_completion_is_installed_for_bash(tmp_path: Path):
    script = f"'{COMMAND}' --install-completion"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", f"{script}; true"], capture_output=True, text=True, env=environment)
    assert "bash completion installed" in done.stdout
    (installed,) = (tmp_path / ".bash_completions").iterdir()
    assert "_NEUROPLAST_COMPLETE" in installed.read_text() and str(installed) in (tmp_path / ".bashrc").read_text()


def test_completing_a_name_loads_nothing_heavy():
    environment = {
        **os.environ,
        "_NEUROPLAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "neuroplast study --poison ",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == list(names.POISONS)
    assert not {"torch", "transformers", "numpy"} & set(json.loads(done.stderr))


def test_the_names_that_are_offered_are_those_there_are():
    assert tuple(model.name for model in sources.list_models()) == names.MODELS
    assert tuple(TASKS) == names.TASKS
    assert tuple(poisons.POISONS) == names.POISONS
    assert tuple(PRESETS) == names.PRESETS
    assert repair.STRATEGIES == names.STRATEGIES
    assert patch.METHODS == names.INTERVENTIONS
    assert discover.METHODS == names.DISCOVERIES
    assert ablation.ABLATIONS == names.ABLATIONS
    assert tuple(ROWS) == names.ROWS
