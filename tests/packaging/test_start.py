"""Starting is quick because nothing heavy is loaded before it is needed: modules are counted, not seconds."""

import json
import subprocess
import sys

import pytest

import neuroplast

HEAVY = {"torch", "transformers", "numpy", "scipy", "matplotlib", "plotly", "accelerate", "jinja2", "pydantic"}
TYPERS = {"pydantic"}
"""What typer may load for itself where a command has options."""

# Runs the command line, then says on stderr which modules are there.
COMMAND = """
import json, sys
from neuroplast.cli import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


def loaded(modules: str) -> set[str]:
    return HEAVY & set(json.loads(modules))


def test_importing_the_package_loads_nothing_but_itself():
    done = run("-c", "import json, sys, neuroplast; dir(neuroplast); print(json.dumps(sorted(sys.modules)))")
    assert not loaded(done.stdout)
    assert [name for name in json.loads(done.stdout) if name.startswith("neuroplast.")] == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_load_nothing_heavy(words: list[str]):
    done = run("-c", COMMAND, *words)
    assert done.returncode == 0 and done.stdout and not loaded(done.stderr)


@pytest.mark.parametrize("command", ["study", "patch", "repair"])
def test_a_commands_help_loads_nothing_heavy(command: str):
    done = run("-c", COMMAND, command, "--help")
    assert done.returncode == 0 and "--out" in done.stdout and not loaded(done.stderr) - TYPERS


def test_a_wrong_word_is_told_before_anything_heavy_is_loaded():
    done = run("-c", COMMAND, "study", "--no-such-option")
    error, modules = done.stderr.splitlines()
    assert done.returncode == 2 and "No such option" in error and not loaded(modules) - TYPERS


def test_the_probe_sees_what_is_heavy():
    assert loaded(run("-c", COMMAND, "tasks", "--json").stderr)


def test_the_version_is_printed():
    done = run("-m", "neuroplast", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"neuroplast {neuroplast.__version__}\n", "")
