"""What is measured of a mechanism at one step of a model's training, and the steps of a training put together.

At every step, prompt by prompt: LD; the direct effect of every head on the logits (path patching at END); and of
the circuit that was found in base, whose heads and roles are held fixed,

- **total**, by role: how much of LD is lost when all heads of the role give what they give in the counterfactual run,
  with everything after them free. Every role has it, also those that act on other heads.
- **attention**, by role: that of its heads, averaged, to what the role is defined by (`TARGETS`): of movers, the name.
- **copying**, by role that acts on the logits: the share of the names that its heads copy (of roles that hinder, copy
  negatively).
- **circuit**: LD with every other head giving its counterfactual output: what base's circuit does alone.

The last takes counterfactual values, and not the means over many other prompts by which a circuit is judged at the end
of a stage: those would have to be computed anew at each step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.copying import copy_shares
from neuroplast.circuits.head_measures import measure_on_task
from neuroplast.circuits.roles import (
    DUPLICATE,
    HINDERING,
    INDUCTION,
    INHIBITION,
    MOVERS,
    PREVIOUS,
    UNCLASSIFIED,
)
from neuroplast.components import Node
from neuroplast.errors import StorageError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.storage import load_tensors, write_tensors
from neuroplast.tasks.prompts import PromptSet

TARGETS = {
    **dict.fromkeys(MOVERS, "io"),
    INHIBITION: "s2",
    INDUCTION: "s1+1",
    DUPLICATE: "s1",
    PREVIOUS: "s1",
}
"""By role, the position that its heads attend to."""
TOTAL, ATTENTION, COPYING, CIRCUIT = "total", "attention", "copying", "circuit"
QUANTITIES = (TOTAL, ATTENTION, COPYING)
"""What is measured by role, beside the direct effects of its heads."""


def build_schedule(steps: int, points: int) -> tuple[int, ...]:
    """The steps to measure at: dense early, then at equal ratios, with the first (0) and the last.

    Args:
        steps: optimizer steps in all.
        points: how many steps are wanted, 2 at least; there are fewer where there are no more.
    """
    if points > steps:
        return tuple(range(steps + 1))
    chosen = [0]
    for rung in np.geomspace(1, steps, points - 1)[:-1]:  # where ratios fall on a step again, the next one is taken
        chosen.append(max(chosen[-1] + 1, round(float(rung))))
    return (*chosen, steps)


def classes_of(circuit: Circuit) -> dict[str, tuple[Node, ...]]:
    """The heads of a circuit by role, in the order of the forward pass; those without a role are left out."""
    found: dict[str, list[Node]] = {}
    for node in circuit.heads:
        if node in circuit.roles and (name := circuit.roles[node].name) != UNCLASSIFIED:
            found.setdefault(name, []).append(node)
    return {name: tuple(nodes) for name, nodes in found.items()}


def measure_point(
    model: Network, prompts: PromptSet, circuit: Circuit | None, *, memory: str | int | None = None
) -> dict[str, Tensor]:
    """Measures a mechanism at one step.

    Args:
        model: the model as it is at this step.
        prompts: clean prompts with their counterfactuals.
        circuit: base's; None leaves out what is measured of it.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Returns:
        `effects` (layer, head, prompt), and by prompt `logit_diff`, `circuit`, and `total/<role>`, `attention/<role>`,
        `copying/<role>` where there is such a thing.
    """
    heads = path_patch(model, prompts, memory=memory)
    found = {"effects": heads.by_head(), "logit_diff": heads.clean}
    if circuit is None:
        return found
    ablation = build_ablation(model, prompts, "counterfactual")
    found[CIRCUIT] = run_knockouts(model, prompts, [circuit.heads], ablation, keep=True, memory=memory)[0]
    classes = classes_of(circuit)
    if not classes:
        return found
    patched = activation_patch(model, prompts, sites=list(classes.values()), memory=memory).effects
    found |= {f"{TOTAL}/{name}": -effect for name, effect in zip(classes, patched, strict=True)}
    nodes = [node for name, mine in classes.items() if TARGETS.get(name) in prompts.positions for node in mine]
    on_task = measure_on_task(model, prompts, nodes, memory=memory).shares if nodes else {}
    acting = [node for name, mine in classes.items() if name in MOVERS for node in mine]
    copied = copy_shares(model, prompts, acting, memory=memory)
    for name, mine in classes.items():
        seen = [on_task.get(node, {}).get(f"{ATTENTION} to {TARGETS.get(name)}") for node in mine]
        known = [torch.from_numpy(each) for each in seen if each is not None]
        if known:
            found[f"{ATTENTION}/{name}"] = torch.stack(known).nanmean(dim=0)
        if name in MOVERS:
            rows = [acting.index(node) for node in mine]
            found[f"{COPYING}/{name}"] = copied[int(name in HINDERING), rows].mean(dim=0)
    return {key: values.float().contiguous() for key, values in found.items()}


@dataclass(frozen=True)
class Trajectory:
    """A mechanism along one fine-tuning."""

    steps: Int[np.ndarray, "point"]
    """The measured steps, rising, from 0."""
    logit_diff: Float[np.ndarray, "point prompt"]
    """LD at each."""
    effects: Float[np.ndarray, "point layer head prompt"]
    """Direct effect of every head on the logits; negative: it helps."""
    circuit: Float[np.ndarray, "point prompt"] | None
    """LD of base's circuit alone; None where there is none."""
    by_role: Mapping[tuple[str, str], Float[np.ndarray, "point prompt"]]
    """By quantity (`QUANTITIES`) and role."""

    def direct(self, heads: Collection[Node]) -> Float[np.ndarray, "point prompt"]:
        """What some heads add to LD directly, taken one by one: minus the sum of their effects."""
        rows = [(node.layer or 0, node.head or 0) for node in heads]
        layers, places = (np.array(column) for column in zip(*rows, strict=True))
        return -self.effects[:, layers, places].sum(axis=1)


class TrajectoryFolder:
    """A folder that holds what was measured at each step: `step-000012.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def visit(self, step: int, measure: Callable[[], Mapping[str, Tensor]]) -> None:
        """Measures at a step, unless that was done before."""
        if not (path := self._path(step)).is_file():
            write_tensors(path, measure(), {"step": str(step)})

    def load(self, steps: Sequence[int]) -> Trajectory:
        """Reads the steps.

        Raises:
            StorageError: when one is missing or damaged.
        """
        points: list[dict[str, np.ndarray]] = []
        for step in steps:
            if not (path := self._path(step)).is_file():
                raise StorageError(f"{path} is missing: remove {self.folder.parent}, then run the same command again")
            points.append({key: values.double().numpy() for key, values in load_tensors(path).items()})
        common = [key for key in points[0] if all(key in point for point in points)]
        if not {"logit_diff", "effects"} <= set(common):
            raise StorageError(
                f"{self.folder} is damaged: remove {self.folder.parent}, then run the same command again"
            )
        stacked = {key: np.stack([point[key] for point in points]) for key in common}
        roles = {(kind, name): each for key, each in stacked.items() for kind, _, name in [key.partition("/")] if name}
        return Trajectory(
            np.array(steps),
            stacked["logit_diff"],
            stacked["effects"],
            stacked.get(CIRCUIT),
            roles,
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.safetensors"
