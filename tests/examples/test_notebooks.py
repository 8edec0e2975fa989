"""The notebooks run from top to bottom, show what they promise, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHOWN = {
    "study_on_tiny": ("recovered/subject_duplication", "like base", "edges", "supported", "report.html"),
    "audit_and_repair": (
        "the gate fails on: ['damaged:ioi']",
        "base is back",
        "of the weights",
        "gate fails on: nothing",
    ),
}
PICTURES = {"study_on_tiny": 2, "audit_and_repair": 2}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the notebook's client, about event loops


def test_both_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_promises(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    before = set(EXAMPLES.iterdir())
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert all(words in printed for words in SHOWN[path.stem]), printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[path.stem]
    assert set(EXAMPLES.iterdir()) == before and any((tmp_path / "TMPDIR").iterdir())
