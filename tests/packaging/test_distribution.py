"""What is published: a wheel and a source archive that hold what is needed and nothing else, and work elsewhere."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

import pytest

import neuroplast

ROOT = Path(__file__).parents[2]
MOST_BYTES = 12 * 2**20
SOURCES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "neuroplast").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
SMOKE = ["--preset", "smoke", "--set", "n_prompts=6", "--set", 'circuit_stages=["base"]', "--set", "follow_points=2"]
SMOKE += ["--set", "circuit_edges=0", "--set", "compare_battery=2", "--set", "compare_drift=1"]


def run(*words: str | Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was made from it."""
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a folder of its own; what it depends on is this environment's."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def elsewhere(installed: Path, folder: Path, *words: str | Path) -> str:
    """What a process prints that sees the installed package, far from the source tree."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return run(*words, cwd=folder, env=environment).stdout


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == SOURCES
    assert {"neuroplast/py.typed", "neuroplast/models/tiny/model.safetensors"} <= names
    assert len({name for name in names if name.endswith(".html.j2")}) >= 2
    licence = f"neuroplast-{neuroplast.__version__}.dist-info/licenses/LICENSE"
    assert licence in names and wheel.stat().st_size < MOST_BYTES


def test_the_source_archive_holds_the_package_and_no_tests_or_runs(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    assert {f"src/{name}" for name in SOURCES} | {"LICENSE", "README.md", "pyproject.toml"} <= names
    folders = {PurePosixPath(name).parts[0] for name in names if "/" in name}
    assert folders == {"src", "examples"} and path.stat().st_size < MOST_BYTES


def test_the_metadata_names_version_licence_and_extras(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = HeaderParser().parsestr(archive.read(name).decode())
    assert said["Version"] == neuroplast.__version__ and said["License-Expression"] == "MIT"
    assert {"lora", "smollm2", "peers", "dev"} <= set(said.get_all("Provides-Extra", []))
    needed = [each for each in said.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert any(each.startswith("torch") for each in needed)
    assert not any(each.startswith(("peft", "gguf", "transformer-lens", "nnsight", "pytest")) for each in needed)


def test_the_installed_package_runs_elsewhere(installed: Path, tmp_path: Path):
    where = elsewhere(installed, tmp_path, "-c", "import neuroplast; print(neuroplast.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert elsewhere(installed, tmp_path, "-m", "neuroplast", "--version") == f"neuroplast {neuroplast.__version__}\n"
    models = {
        row["name"]: row for row in json.loads(elsewhere(installed, tmp_path, "-m", "neuroplast", "models", "--json"))
    }
    assert models["tiny"]["cached"] and Path(models["tiny"]["location"]).is_relative_to(installed)


def test_the_installed_package_runs_a_study_to_the_end(installed: Path, tmp_path: Path):
    words = ["-m", "neuroplast", "study", "--model", "tiny", *SMOKE, "--out", tmp_path / "run", "--json"]
    summary = json.loads(elsewhere(installed, tmp_path, *words))
    assert [stage["kind"] for stage in summary["stages"]][-1] == "recovered"
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
