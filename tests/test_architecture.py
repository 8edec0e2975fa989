"""The house keeps its floors: imports point one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "neuroplast"

# Lowest floor first; a part may import parts of its own floor only where ALLOWED says so, and any floor below.
FLOORS = (
    {
        *("errors", "components", "storage", "reading", "links", "memory", "observer", "hub"),
        *("locks", "machine", "processes"),
    },
    {"tasks", "models", "statistics"},
    {"behaviour"},
    {"interventions"},
    {"circuits"},
    {"training", "plasticity", "localisation", "report", "subject"},
    {"comparison"},
    {"study", "patch", "discovery", "evaluation", "audit", "repair", "progress", "terminal", "watch"},
    {"dose", "bench"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
)
ALLOWED_BESIDE = {
    ("models", "tasks"),
    ("storage", "errors"),
    ("locks", "errors"),
    ("locks", "storage"),
    ("locks", "reading"),
    ("storage", "reading"),
    ("storage", "links"),
    ("links", "errors"),
    ("reading", "memory"),
    ("components", "errors"),
    ("memory", "errors"),
    ("processes", "errors"),
    ("processes", "reading"),
    ("machine", "reading"),
    ("plasticity", "localisation"),
}
FORBIDDEN = {("report", part) for part in ("models", "tasks", "interventions", "behaviour", "plasticity")}
FLOOR_OF = {part: index for index, floor in enumerate(FLOORS) for part in floor}

FILES = sorted(path for path in SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("neuroplast"):
            below = node.module.split(".")[1:]
            parts |= {below[0]} if below else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("neuroplast.")}
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path):
    part = part_of(path)
    assert part in FLOOR_OF, f"{part} has no floor: give it one in FLOORS"
    for target in imported_parts(path) - {part}:
        downward = FLOOR_OF[target] < FLOOR_OF[part] or (part, target) in ALLOWED_BESIDE
        assert downward and (part, target) not in FORBIDDEN, f"{path} imports {target}"


def test_the_test_sees_an_import_that_points_up(tmp_path: Path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from neuroplast.study.plan import Stage\nimport neuroplast.cli\nfrom neuroplast import tasks\n")
    assert imported_parts(wrong) == {"study", "cli", "tasks"}


UNPICKLING = {
    "pickle",
    "_pickle",
    "pickletools",
    "cPickle",
    "dill",
    "joblib",
    "cloudpickle",
    "marshal",
    "shelve",
    "yaml",
}
RUNNING = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "importlib.import_module",
    "os.system",
    "os.popen",
    "runpy.run_path",
}
RUNNING |= {"torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load", "pd.read_pickle", "print"}
READING = {"read_text", "read_bytes", "open", "fdopen", "safe_open", "load_file", "ZipFile", "urlopen"}
READING |= {"json.loads", "json.load", "tomllib.loads", "tomllib.load"}
"""What opens a file, or takes a text apart, by the last part of its name or all of it."""
OURS = {"read_text", "read_bytes"}
"""Functions of `reading.py`; the methods of a path are called on one."""
READERS = {"reading.py", "storage.py", "models/wheel.py"}
"""Who may: everything goes through their limits."""


def wrongs_of(source: str, name: str) -> set[str]:
    """What a file of the package may not do."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found |= {each.split(".")[0] for each in names} & UNPICKLING
            if "subprocess" in names and name != "models/wheel.py":
                found.add("subprocess")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rsplit(".", 1)[-1]
        if called in RUNNING or ({last, called} & READING and name not in READERS and called not in OURS):
            found.add(called)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if given.get("shell", "False") != "False" or given.get("weights_only", "True") != "True":
            found.add(f"{called} with {given}")
        if last == "from_pretrained" and given.get("trust_remote_code") != "False":
            found.add(f"{called} without trust_remote_code=False")
        if last == "from_pretrained" and "Model" in called and not {"use_safetensors", "gguf_file"} & set(given):
            found.add(f"{called} without use_safetensors")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_unpickles_runs_remote_code_prints_or_reads_without_limits(path: Path):
    assert not wrongs_of(path.read_text(), path.relative_to(SOURCE).as_posix())


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from marshal import loads", "import shelve as s", "import yaml", "import subprocess"),
        *("eval(x)", "exec(x)", "compile(x, y, z)", "__import__(x)", "importlib.import_module(x)", "os.system(x)"),
        *("torch.load(x)", "torch.save(x)", "run(x, shell=True)", "open(x)", "path.open()", "path.read_text()"),
        *("json.loads(x)", "json.load(x)", "tomllib.loads(x)", "np.load(x)", "load_file(x)", "zipfile.ZipFile(x)"),
        *("AutoTokenizer.from_pretrained(x)", "AutoTokenizer.from_pretrained(x, trust_remote_code=True)"),
        "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)",
    ],
)
def test_the_test_sees_what_may_not_be(line: str):
    assert wrongs_of(line, "report/page.py")
