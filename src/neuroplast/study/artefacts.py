"""What a stage has finished: every file with its hash, and what it was made from.

`artefacts.json` in a stage's folder is written after every step of its making. When a study is continued, files are
held against it:

- a file that changed since is damaged: it is removed, and made again, and so is one that is gone;
- where a file that was made again is not what it was (other threads round otherwise), the rest of the stage was made
  from another one, so the whole stage is made anew;
- so is a stage that was made from other files of its parent, its control or base than there are now.

Checkpoints that were removed on purpose are kept in mind as removed (`neuroplast.study.pruning`).
"""

import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from neuroplast.errors import StorageError
from neuroplast.storage import FORMER, LOCK, PARTIAL, disk_errors, hash_file, hash_text, load_json, write_json
from neuroplast.study.following import RAW

ARTEFACTS = "artefacts.json"
SCHEMA = 1
CHECKPOINT = "checkpoint"
UNFINISHED = ("resume", "parts", "comparing")
"""Folders of what is under way."""
MADE_WITH = {
    "effects.safetensors": ("measures.json",),
    "circuit.json": ("criteria.json", "measures.json"),
    "edges.json": ("criteria.json", "measures.json"),
    "criteria.json": ("measures.json",),
    "train.jsonl": (CHECKPOINT,),
    "training.json": (CHECKPOINT,),
}
"""What has to go beside a file so that it is made again; for a step of a trajectory, the checkpoint too."""
READ_BY_OTHERS = ("model", "effects.safetensors", "circuit.json", "edges.json", "criteria.json", "step-")
"""Beginnings of the names of files that other stages are made from."""


def pairs_file(out: Path, stage_id: str) -> Path:
    """The file of what a stage is trained on."""
    return out / "prompts" / f"{stage_id.replace('/', '-')}.jsonl"


class Artefacts:
    """The finished files of one stage, as they are written down."""

    def __init__(self, out: Path, stage_id: str) -> None:
        """Reads what is noted of a stage.

        Raises:
            StorageError: when the note is damaged.
        """
        self._out, self.folder = out, out / "stages" / stage_id
        self._pairs = pairs_file(out, stage_id)
        self._path = self.folder / ARTEFACTS
        self._document: dict[str, Any] = self._load(stage_id)
        self._again: set[str] = set()

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 by path, relative to the run, in the order in which they were made."""
        return self._document["files"]

    @property
    def is_noted(self) -> bool:
        """Whether anything is known of the stage's making."""
        return self._path.is_file()

    @property
    def removed(self) -> frozenset[str]:
        """Checkpoints, by their folder relative to the run, that were removed on purpose."""
        return frozenset(self._document["removed"])

    @property
    def seconds(self) -> tuple[float, float]:
        """Time spent on the stage, and, of that, on measuring on the way of its training."""
        return self._document["seconds"], self._document["following_seconds"]

    @property
    def digest(self) -> str:
        """One hash of all that other stages are made from."""
        read = {path: sha256 for path, sha256 in self.files.items() if Path(path).name.startswith(READ_BY_OTHERS)}
        return hash_text(repr(sorted(read.items())))

    def check(self, made_from: Mapping[str, str]) -> str | None:
        """Removes what is damaged, or the whole stage where it was made from something else.

        Args:
            made_from: digests of the stages that it is made from now.

        Returns:
            What was found, in a sentence; None where all is well.
        """
        former, self._document["made_from"] = self._document["made_from"], dict(made_from)
        if self._document["forgotten"]:
            self.forget()  # a kill came in between
        if any(former.get(each, now) != now for each, now in made_from.items()):
            self.forget()
            return f"{self.folder} was made from files that are no longer there: the whole stage is made again"
        found: dict[str, list[str]] = {"damaged": [], "gone": []}
        for name, sha256 in self.files.items():
            path = self._out / name
            if path.is_file() and hash_file(path) != sha256:
                found["damaged"].append(name)
            elif not path.is_file():
                self._again.add(name)
                # Who needs the room may remove checkpoints: nothing is made from them any more, or they are made again.
                found["gone"] += [] if CHECKPOINT in Path(name).parts and not path.parent.is_dir() else [name]
        for name in (*found["damaged"], *found["gone"]):
            self._remove(name)
        self._write()  # whatever is made from now on is made from these
        said = [
            f"{what}: {', '.join(str(self._out / name) for name in names)}" for what, names in found.items() if names
        ]
        return f"{'; '.join(said)}; made again" if said else None

    def note(self, seconds: float = 0.0, following_seconds: float = 0.0) -> bool:
        """Writes down what is new in the folder.

        Args:
            seconds: time spent on the stage since the last note.
            following_seconds: of that, on measuring on the way of its training.

        Returns:
            False where a file that was made again is not what it was; nothing is written down then.
        """
        files = dict(self.files)
        for path in self._finished():
            name = path.relative_to(self._out).as_posix()
            if name not in files or name in self._again:
                sha256 = hash_file(path)
                if files.setdefault(name, sha256) != sha256:
                    return False
                self._again.discard(name)
        self._document |= {
            "files": files,
            "removed": [name for name in self._document["removed"] if not (self._out / name).is_dir()],
            "seconds": round(self._document["seconds"] + seconds, 1),
            "following_seconds": round(self._document["following_seconds"] + following_seconds, 1),
        }
        self._write()
        return True

    def forget(self) -> None:
        """Removes the whole stage but for the note, which says so until all is gone."""
        kept = {name: self._document[name] for name in ("made_from", "seconds", "following_seconds")}
        self._document, self._again = _empty(self._document["stage"]) | kept | {"forgotten": True}, set()
        self._write()
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (LOCK, ARTEFACTS):
                entry.unlink()
        self._document["forgotten"] = False
        self._write()

    def adopt(self, other: "Artefacts") -> None:
        """Takes over a stage of another run, as links where the disk can, unless something of this one is there.

        Args:
            other: the same stage, made from the same; nobody removes anything of it meanwhile.

        Raises:
            StorageError: when the disk refuses.
        """
        if self._document["forgotten"]:
            self.forget()  # a kill came in between
        if not other.files or self.files or any(entry.name not in (LOCK, ARTEFACTS) for entry in self.folder.iterdir()):
            return
        self._document["forgotten"] = True  # until all of it is here
        self._write()
        with disk_errors(self.folder):
            if other._pairs.is_file():
                self._pairs.parent.mkdir(exist_ok=True)
                _take_over(other._pairs, self._pairs)
            for entry in sorted(other.folder.iterdir()):
                if entry.name not in (LOCK, ARTEFACTS, *UNFINISHED) and not entry.name.endswith((PARTIAL, FORMER)):
                    _take_over(entry, self.folder / entry.name)
        self._document = other._document | {"seconds": 0.0, "following_seconds": 0.0}
        self._write()

    def remove_checkpoints(self, names: Iterable[str]) -> None:
        """Removes checkpoints on purpose.

        Args:
            names: their folders, relative to the run.
        """
        there = [name for name in names if (self._out / name).is_dir()]
        if there:
            self._document["removed"] = sorted({*self.removed, *there})
            self._write()  # first: a kill in between leaves something that is removed the next time
            for name in there:
                shutil.rmtree(self._out / name)

    def _finished(self) -> Generator[Path]:
        """The stage's whole files, in an order that does not change."""
        if self._pairs.is_file():
            yield self._pairs
        for path in sorted(self.folder.rglob("*")):
            places = path.relative_to(self.folder).parts
            unfinished = any(place.endswith((PARTIAL, FORMER)) or place in UNFINISHED for place in places)
            if path.is_file() and not unfinished and path.name not in (ARTEFACTS, LOCK):
                yield path

    def _remove(self, name: str) -> None:
        """Removes a file that is damaged or gone, with all that stands in the way of making it again."""
        place = Path(name)
        if CHECKPOINT in place.parts:
            gone = [Path(*place.parts[: place.parts.index(CHECKPOINT) + 1])]
        else:
            of_training = (CHECKPOINT,) if place.parent.name == RAW else ()
            beside = place.parents[1] if of_training else place.parent
            gone = [place, *(beside / other for other in MADE_WITH.get(place.name, of_training))]
        for each in gone:
            path = self._out / each
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self._again |= {other for other in self.files if Path(other).is_relative_to(each)}

    def _load(self, stage_id: str) -> dict[str, Any]:
        known: dict[str, Any] = _empty(stage_id)
        if not self._path.is_file():
            return known
        try:
            found = load_json(self._path)
        except StorageError:
            found = {}
        fits = isinstance(found, dict) and all(type(found.get(name)) is type(value) for name, value in known.items())
        if not (fits and found["stage"] == stage_id and all(map(self._is_ours, (*found["files"], *found["removed"])))):
            raise StorageError(f"{self._path} is damaged; remove it, then run the same command again")
        return found

    def _is_ours(self, name: object) -> bool:
        """Whether a path is one of the stage's own: what is noted there may be removed."""
        path = self._out / str(name)
        return ".." not in Path(str(name)).parts and (path == self._pairs or path.is_relative_to(self.folder))

    def _write(self) -> None:
        write_json(self._path, self._document)


def _take_over(source: Path, target: Path) -> None:
    """A file or a folder under a second name, whole or not at all; files are not changed in place."""
    temporary = target.with_name(target.name + PARTIAL)
    if source.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary, copy_function=_link, ignore=shutil.ignore_patterns(*UNFINISHED))
    else:
        temporary.unlink(missing_ok=True)
        _link(source, temporary)
    temporary.rename(target)


def _link(source: str | Path, target: str | Path) -> None:
    """A link, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _empty(stage_id: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "stage": stage_id,
        "made_from": {},
        "forgotten": False,
        "files": {},
        "removed": [],
        "seconds": 0.0,
        "following_seconds": 0.0,
    }
