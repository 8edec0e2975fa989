"""A damaged checkpoint from words to a mended one: what `neuroplast repair` does.

The folder becomes a normal Hugging Face checkpoint, with `repair.json` (what was done, its cost, how far it is back,
the frontier of what was tried), `frontier.csv` and `frontier.png` beside it. `repairing.json` says what is mended and
how; what is measured and trained on the way is in `work/` until everything is done, so an interrupted run goes on.

A mended model is chosen on one set of held-out prompts, and judged on another: the cheapest that reaches the target on
the one is taken if it does on the other, too, else the next. The models that are given stay as they are.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.files import load_heads
from neuroplast.circuits.inside import inside_document
from neuroplast.circuits.shape import shape_of
from neuroplast.errors import GateError, InputError, UnsupportedModelError, unknown_name
from neuroplast.interventions.selection import OTHER
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.models.between import require_same_parts
from neuroplast.models.network import Network
from neuroplast.models.sources import LEARNING_RATE, DType, load_model, suited_learning_rate, weights_sha256
from neuroplast.models.weights import WeightMap, choose_pieces, put_weights
from neuroplast.observer import Observer, Silent
from neuroplast.repair.check import check_battery, new_damage
from neuroplast.repair.restored import NO_BASE, Judge, Restored, restored_document
from neuroplast.repair.strategies import BEST, Candidate, Ranking, grafts, rank_by_gradient, rank_by_ledger, retrain
from neuroplast.report.repair import REPAIR_FILES, write_repair_report
from neuroplast.statistics import MOST_SEED
from neuroplast.storage import Parts, atomic_file, hash_file, is_begun, load_json, telling, write_json
from neuroplast.subject import require_between, task_provenance, versions
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import REFERENCE_SEED, PromptSet
from neuroplast.tasks.task import shortfall
from neuroplast.training.data import Example, build_examples
from neuroplast.training.finetune import FinetuneConfig
from neuroplast.training.saves import save_checkpoint

Strategy = Literal["auto", "graft", "masked", "full"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
MARKER, RESULT, WORK = "repairing.json", "repair.json", "work"
OTHER_PROMPTS = 1_000_003
"""Added to the seed of the prompts that the mended model is judged on, which are not those it is chosen on."""
N_REFERENCE = 480
"""Prompts that knocked-out heads are averaged over, where a circuit is given."""
N_RANDOM = 20
"""Matched random circuits that it is held against."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """What is mended, and how."""

    poisoned: str
    """The damaged checkpoint: a named model, a hub id, a folder, an adapter."""
    base: str | None = None
    """The model before the damage; None where nobody has it."""
    task: str = "ioi"
    """The task that was damaged."""
    strategy: Strategy = "auto"
    """`graft`, `masked`, `full`, or `auto` for the cheapest of them that reaches the target."""
    target: float = 0.9
    """How far it has to be back, above 0 and up to 1."""
    n_prompts: int = 64
    """Held-out prompts that a mended model is chosen on, and as many others that it is judged on."""
    n_train: int = 512
    """Clean examples to retrain on."""
    steps: int = 80
    """Optimizer steps of a retraining at most."""
    batch_size: int = 16
    """Examples a step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; None takes one that suits the model's size."""
    circuit: str | None = None
    """A file with the base's circuit, to be tried in the mended model; None leaves that out."""
    n_battery: int = 32
    """Prompts of each other task that is checked for new damage; 0 checks none, and no text."""
    seed: int = 0
    """Seed of prompts, examples and their order."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: DType = "float32"
    """Type of the weights."""

    def __post_init__(self) -> None:
        task = load_task(self.task)
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy", self.strategy, STRATEGIES)
        if self.base is None and self.strategy == "graft":
            raise InputError("graft puts the base's weights back: give the base, or take masked or full")
        if not 0 < self.target <= 1:
            raise InputError(f"target must be above 0 and at most 1, got {self.target}")
        for name, least in {"n_prompts": 2, "n_train": 1, "n_battery": 0}.items():
            require_between(name, getattr(self, name), least)
        require_between("seed", self.seed, 0, MOST_SEED - OTHER_PROMPTS - REFERENCE_SEED)
        if not task.counterfactuals:
            raise InputError(f"task {task.name!r} has no counterfactual prompts, and a mechanism is measured with them")
        self.training(LEARNING_RATE if self.learning_rate is None else self.learning_rate)

    def training(self, learning_rate: float) -> FinetuneConfig:
        """How to retrain."""
        every = max(1, self.steps // 4)
        return FinetuneConfig(self.steps, self.batch_size, learning_rate, seed=self.seed, save_every=every)

    def load(self, source: str, observer: Observer) -> Network:
        """One of the two models."""
        return load_model(source, device=self.device, dtype=self.dtype, say=observer.say)

    def prompts(self, model: Network) -> tuple[PromptSet, PromptSet]:
        """Held-out prompts of the task: those that a mended model is chosen on, and those that it is judged on."""
        seeds = (self.seed, self.seed + OTHER_PROMPTS)
        chosen_on, judged_on = load_task(self.task).apart(model, self.n_prompts, seeds, split="eval")
        return chosen_on, judged_on

    def load_circuit(self, model: Network) -> Circuit | None:
        """The base's circuit, where one is given."""
        if self.circuit is None:
            return None
        circuit = load_heads(Path(self.circuit), shape_of(model))
        task = load_task(self.task)
        positions = task.positions
        if unknown := {node.position for node in circuit.heads if node.position} - {OTHER, *positions}:
            raise InputError(
                f"{self.circuit} has heads at {', '.join(sorted(unknown))}, which prompts of {task.name!r} have not: "
                f"they have {', '.join(positions)}; give a circuit of this task"
            )
        return circuit

    def examples(self, model: Network) -> list[Example]:
        """Clean examples of the task, from names and templates that no prompt has."""
        return build_examples(model.tokenizer, load_task(self.task).pairs(model, self.n_train, self.seed))


def run_repair(
    config: RepairConfig, out: Path | str, observer: Observer | None = None, *, memory: str | int | None = None
) -> dict[str, Any]:
    """Mends a damaged checkpoint, writes the folder, and gives the document.

    Args:
        config: what to mend, and how.
        out: the folder: new, empty, or of the same repair.
        observer: is told how it goes; by default nobody is.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for models that are not checkpoints of one, a circuit of another model, a folder that holds
            something else, a wrong setting.
        TrainingDivergedError: a retraining's loss stopped being a number.
        StorageError: when the folder cannot be written.
    """
    out, observer = Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    is_begun(out, MARKER, "repair")
    poisoned = config.load(config.poisoned, observer)
    base = None if config.base is None else config.load(config.base, observer)
    if base is not None:
        require_same_parts(base, poisoned)
    circuit = config.load_circuit(poisoned)
    hashes = {"poisoned": weights_sha256(poisoned)} | ({} if base is None else {"base": weights_sha256(base)})
    settings = {name: value for name, value in asdict(config).items() if (name, value) != ("circuit", None)}
    provenance: dict[str, Any] = {"schema": 1, "settings": settings, "weights_sha256": hashes}
    provenance |= task_provenance(load_task(config.task))
    if config.circuit is not None:
        provenance["circuit_sha256"] = hash_file(Path(config.circuit))
    with claimed(out, MARKER, "repair", provenance):
        if not (out / RESULT).is_file():
            document = _Repair(config, base, poisoned, circuit, out, observer, memory).run()
            write_json(out / RESULT, provenance | document | {"versions": versions()})
    document = load_json(out / RESULT)
    with telling(out / RESULT):
        write_repair_report(document, out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    files = {name: str(out / name) for name in (RESULT, *REPAIR_FILES)}
    return document | {"files": files | ({"checkpoint": str(out)} if document["strategy"] else {})}


def require_reached(document: Mapping[str, Any]) -> None:
    """Ends where the target was not reached, or something else was damaged on the way.

    Raises:
        GateError: so it is; the best that was found is in the folder.
    """
    if not document["reached"]:
        raise GateError(document["statement"])
    if damaged := document["new_damage"]:
        raise GateError(f"mended, but with new damage to {', '.join(damaged)}")


class _Repair:
    """One repair under way."""

    def __init__(
        self,
        config: RepairConfig,
        base: Network | None,
        poisoned: Network,
        circuit: Circuit | None,
        out: Path,
        observer: Observer,
        memory: str | int | None,
    ) -> None:
        self.config, self.base, self.poisoned, self.circuit, self.out = config, base, poisoned, circuit, out
        self.observer, self.memory = observer, memory
        self.whole = sum(weight.numel() for weight in poisoned.module.parameters())
        self.learning_rate = config.learning_rate or suited_learning_rate(poisoned)
        chosen_on, judged_on = config.prompts(poisoned)
        if said := shortfall(chosen_on, config.n_prompts):
            observer.say(said)
        self.judge = self._judge("chosen on", chosen_on)
        self.others = self._judge("judged on", judged_on)
        self.examples = config.examples(poisoned)
        self.why: dict[str, str] = {}
        """Why a strategy was not tried."""

    def run(self) -> dict[str, Any]:
        if self.judge.is_better:
            raise InputError(
                f"{self.config.poisoned} does the task better than {self.config.base}: the order is BASE POISONED"
            )
        document: dict[str, Any] = {
            "strategy": None,
            "target": self.config.target,
            "learning_rate": self.learning_rate,
            "cost": None,
            "restoration": None,
            "before": restored_document(self.judge.damage, self._function("poisoned", self.poisoned)),
            "function_in_base": self._function("base", self.base),
            "spared": None,
            "new_damage": [],
            "n_prompts": len(self.judge.prompts),
        }
        if said := self._nothing_to_mend():
            return document | {"reached": True, "frontier": [], "statement": f"Nothing to mend: {said}."}
        tried = self._try()
        chosen, found = self._settle(tried)
        mended = self._model(chosen)
        self._write(mended)
        document |= {
            "strategy": chosen.strategy,
            "reached": found.score is not None and found.score >= self.config.target,
            "cost": self._candidate_document(chosen)["cost"],
            "restoration": restored_document(found, self._function(chosen.name, mended)),
            "frontier": [self._candidate_document(each) for each in tried],
            "why": self.why,
            "statement": self._statement(chosen, found),
        }
        if self.config.n_battery:
            self.observer.say("checking other tasks and text for new damage")
            spared = check_battery(
                self.base,
                self.poisoned,
                mended,
                n_prompts=self.config.n_battery,
                seed=self.config.seed,
                besides=self.config.task,
            )
            document |= {"spared": spared, "new_damage": new_damage(spared)}
        return document

    def _judge(self, name: str, prompts: PromptSet) -> Judge:
        kept = Parts(self.out / WORK / name.replace(" ", "-"))
        return Judge(self.base, lambda: self.poisoned, prompts, self.config.seed, kept, memory=self.memory)

    def _function(self, name: str, model: Network | None) -> dict[str, Any] | None:
        """How much of a model's logit difference the base's circuit gives, on the prompts that models are judged on."""
        if self.circuit is None or model is None:
            return None
        seed, prompts = self.config.seed + OTHER_PROMPTS, self.others.prompts
        reference = load_task(self.config.task).reference(self.poisoned, prompts, N_REFERENCE, seed, split="eval")
        return inside_document(
            model,
            self.circuit,
            prompts,
            reference,
            self.others.weights,
            n_random=N_RANDOM,
            seed=self.config.seed,
            parts=Parts(self.out / WORK / "function"),
            name=f"base's circuit in {name}",
            progress=self.observer.progress,
            memory=self.memory,
        )

    def _nothing_to_mend(self) -> str | None:
        damage, target = self.judge.damage, self.config.target
        if self.base is None:
            right = damage.accuracy.value or 0.0
            return f"{right:.0%} of held-out prompts are right, the target is {target:.0%}" if right >= target else None
        if damage.behaviour.value is None and damage.damage_undone.value is None:
            return f"{damage.behaviour.why}; {damage.damage_undone.why}"
        return f"it has {damage.score:.0%} of base's" if damage.score and damage.score >= target else None

    def _try(self) -> list[Candidate]:
        """Everything that the strategy asks for."""
        config, judge, base, poisoned = self.config, self.judge, self.base, self.poisoned
        tried: list[Candidate] = []
        if config.strategy != "full":
            try:
                if base is None:
                    ranking = rank_by_gradient(poisoned, self.examples, config.batch_size)
                else:
                    ranking = rank_by_ledger(judge, base, poisoned, self.observer)
                if base is not None and config.strategy in ("auto", "graft"):
                    tried += grafts(judge, base, poisoned, ranking, config.target, self.observer)
                if config.strategy in ("auto", "masked"):
                    tried += self._retrain(ranking.most())
            except UnsupportedModelError as error:
                if config.strategy != "auto":
                    raise
                self.why = dict.fromkeys(("graft", "masked"), str(error))
        if base is None and config.strategy == "auto":
            self.why.setdefault("graft", NO_BASE)
        if config.strategy in ("auto", "full"):
            tried += self._retrain(None)
        return tried

    def _retrain(self, parts: Ranking | None) -> list[Candidate]:
        config, folder = self.config, self.out / WORK / ("full" if parts is None else "masked")
        model = config.load(config.poisoned, self.observer)
        training = config.training(self.learning_rate)
        return retrain(self.judge, model, self.examples, training, folder, parts, config.target, self.observer)

    def _settle(self, tried: Sequence[Candidate]) -> tuple[Candidate, Restored]:
        """The cheapest that reaches the target on other prompts, too; else the one that comes nearest there."""
        judged: list[tuple[Candidate, Restored]] = []
        for candidate in in_turn(tried, self.config.target):
            found = self.others.judge(candidate.name, partial(self._model, candidate))
            judged.append((candidate, found))
            if found.score is not None and found.score >= self.config.target:
                return judged[-1]
        return max(judged, key=lambda each: -inf if each[1].score is None else each[1].score)

    def _model(self, candidate: Candidate) -> Network:
        """A candidate's model."""
        if candidate.strategy != "graft":
            return self.config.load(str((self.out / WORK / candidate.strategy / BEST).absolute()), self.observer)
        model = self.config.load(self.config.poisoned, self.observer)
        if self.base is not None and candidate.components is not None:
            put_weights(model, self.base, choose_pieces(WeightMap(self.base).pieces(), candidate.components))
        return model

    def _write(self, mended: Network) -> None:
        """The mended model as a checkpoint in the folder itself; whole files only, the weights last."""
        ready = self.out / WORK / "checkpoint"
        save_checkpoint(mended, ready)
        files = [path for path in ready.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path.name)):
            with atomic_file(self.out / path.relative_to(ready)) as temporary:
                shutil.copyfile(path, temporary)

    def _candidate_document(self, each: Candidate) -> dict[str, Any]:
        return {
            "strategy": each.strategy,
            "cost": {
                "parameters": each.parameters,
                "parameters_share": each.parameters / self.whole,
                "steps": each.steps,
                "examples": each.examples,
                "n_parts": None if each.parts is None else len(each.parts),
                "parts": None if each.parts is None else list(each.parts),
            },
            "restored": restored_document(each.restored),
        }

    def _statement(self, chosen: Candidate, found: Restored) -> str:
        """What was done and what it gave, in a sentence."""
        parts, steps = _counted(len(chosen.parts or ()), "part"), _counted(chosen.steps, "clean step")
        share = f"{chosen.parameters / self.whole:.1%} of the weights"
        did = {
            "graft": f"base's weights in {parts} ({share})",
            "masked": f"{steps} of {parts} ({share})",
            "full": f"{steps} of all weights",
        }[chosen.strategy]
        what = "of held-out prompts are right" if self.base is None else "of base is back"
        share_back = "an undefined share" if found.score is None else f"{found.score:.0%}"
        said = f"{did}; {share_back} {what}, on prompts that it was not chosen on"
        if found.score is not None and found.score >= self.config.target:
            return f"Mended by {chosen.strategy}: {said}."
        return f"Not mended: the nearest is {chosen.strategy}, {said}; the target is {self.config.target:.0%}."


def in_turn(tried: Sequence[Candidate], target: float) -> list[Candidate]:
    """What reaches the target, the cheapest first; where nothing does, the one that comes nearest.

    Raises:
        InputError: when nothing could be judged.
    """
    known = [each for each in tried if each.restored.score is not None]
    if not known:
        raise InputError("no mended model could be judged: the damage is within the noise of the prompts; take more")
    reaching = sorted((each for each in known if each.score >= target), key=lambda each: each.cost)
    return reaching or [max(known, key=lambda each: each.score)]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
