"""Finding a circuit and naming its parts, by any method: the front door."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.edge_discovery import METHODS as EDGE_METHODS
from neuroplast.circuits.edge_discovery import discover_edges, require_edge_settings
from neuroplast.circuits.path_discovery import PathSettings, discover_paths
from neuroplast.circuits.roles import name_roles
from neuroplast.circuits.stability import RESAMPLES, path_stability
from neuroplast.errors import unknown_name
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

METHODS = ("path", *EDGE_METHODS)
_EDGES = ("select", "n", "threshold", "prune")
_MORE: Mapping[str, tuple[str, ...]] = {"eap-ig": ("steps",), "ceap": ("steps",), "exact": ("candidates",)}
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "path": tuple(PathSettings.__dataclass_fields__),
    **{name: (*_EDGES, *_MORE.get(name, ())) for name in EDGE_METHODS},
}
"""The settings of each method."""


def discover(
    model: Network,
    prompts: PromptSet,
    *,
    method: str = "path",
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Circuit:
    """Finds the circuit that does a task and, by path patching, names what its heads do.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        method: `path` (heads at positions, by path patching), or by edges: `eap`, `eap-ig`, `ceap` (estimated) and
            `exact`.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted discovery goes on.
        progress: called with (activity, done, total).
        say: told of each step's candidates and cuts.
        settings: of `path`, the fields of `PathSettings`; else what `discover_edges` takes.

    Returns:
        The circuit; its provenance holds the settings, the log of steps and the stability.

    Raises:
        NothingFoundError: when nothing passes.
        InputError: for an unknown method or setting.
    """
    require_settings(method, settings)
    if method != "path":
        return discover_edges(
            model, prompts, method=method, memory=memory, parts=parts, progress=progress, say=say, **settings
        )
    found = discover_paths(
        model, prompts, settings=PathSettings(**settings), memory=memory, parts=parts, progress=progress, say=say
    )
    circuit = found.circuit
    provenance = {
        **circuit.provenance,
        "steps": [step.document() for step in found.steps],
        "stability": path_stability(found, RESAMPLES).document(),
    }
    named = name_roles(model, prompts, circuit, backups=found.backups, memory=memory, progress=about(progress, "roles"))
    return replace(named, provenance=provenance)


def require_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Checks settings before anything is measured.

    Args:
        method: as `discover` takes it.
        settings: those that were given.

    Raises:
        InputError: for an unknown method or setting, or a value that cannot be.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    for name in settings:
        if name not in SETTINGS[method]:
            raise unknown_name("setting", name, SETTINGS[method])
    if method == "path":
        PathSettings(**settings)
    else:
        require_edge_settings(method, **{name: value for name, value in settings.items() if name != "steps"})
