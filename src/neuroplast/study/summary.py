"""What `summary.json` keeps of `measures.json`, which is read and checked here."""

from pathlib import Path
from typing import Any

from neuroplast.errors import StorageError
from neuroplast.storage import load_json
from neuroplast.study.plan import Stage

KEPT = ("id", "kind", "poison", "seed", "epoch", "step", "behaviour")
TO_EQUAL_STEPS = "similarity_to_equal_steps"
"""Only a reseeded control has it."""


def load_measures(stage: Stage, folder: Path) -> dict[str, Any]:
    """Reads what was measured of a stage at a point.

    Args:
        stage: the stage.
        folder: the point's.

    Raises:
        StorageError: the file is damaged, or of a version that measured less.
    """
    path = folder / "measures.json"
    measures = load_json(path)
    if not isinstance(measures, dict) or measures.get("id") != stage.id:
        raise StorageError(f"{path} is damaged; remove it, then run the same command again")
    needed = {*KEPT, "heads_to_logits", "circuit", "base_circuit", "similarity_to_base", "restoration"}
    missing = {name for name in needed if name not in measures}
    if stage.kind == "recovered" and not measures.get("restoration"):
        missing.add("restoration")
    if missing:
        raise StorageError(
            f"{path} is damaged or of an older version, it has no {min(missing)}; remove it, then run the same command "
            "again"
        )
    return measures


def summary_entry(stage: Stage, folder: Path) -> dict[str, Any]:
    """A measured point as `summary.json` has it; arguments and errors as for `load_measures`."""
    measures = load_measures(stage, folder)
    return {
        **{name: measures[name] for name in KEPT},
        "heads_to_logits": {"top": measures["heads_to_logits"]["top"]},
        "circuit": measures["circuit"],
        "base_circuit": measures["base_circuit"],
        "similarity_to_base": measures["similarity_to_base"],
        **({TO_EQUAL_STEPS: measures[TO_EQUAL_STEPS]} if TO_EQUAL_STEPS in measures else {}),
        "restoration": measures["restoration"],
        "why": measures.get("why", {})
        | ({} if measures["restoration"] else {"restoration": "only a recovered stage has one"}),
    }
