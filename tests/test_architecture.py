"""The house keeps its floors: imports point one way."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "neuroplast"

# Lowest floor first; a part may import parts of its own floor only where ALLOWED says so, and any floor below.
FLOORS = (
    {"errors", "components", "storage", "memory", "observer", "hub", "locks", "processes"},
    {"tasks", "models", "statistics"},
    {"behaviour"},
    {"interventions"},
    {"circuits"},
    {"training", "plasticity", "localisation", "report", "subject"},
    {"comparison"},
    {"study", "patch", "discovery", "evaluation", "audit", "repair", "progress", "terminal", "watch"},
    {"dose"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
)
ALLOWED_BESIDE = {
    ("models", "tasks"),
    ("storage", "errors"),
    ("locks", "errors"),
    ("locks", "storage"),
    ("components", "errors"),
    ("memory", "errors"),
    ("processes", "errors"),
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_unpickles_runs_remote_code_or_prints(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "print", "eval", "exec"}, f"{path} calls {called}"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    assert ast.unparse(value) == "False"


def test_everything_from_the_library_that_loads_a_model_refuses_remote_code():
    text = (SOURCE / "models" / "sources.py").read_text()
    assert text.count('"trust_remote_code": False') == 1 and "trust_remote_code=True" not in text
