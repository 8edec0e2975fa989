"""A damaged checkpoint from words to a mended one: what `neuroplast repair` does.

The folder becomes a normal Hugging Face checkpoint, with `repair.json` (what was done, its cost, how far it is back,
the frontier of what was tried), `frontier.csv` and `frontier.png` beside it. `repairing.json` says what is mended and
how; what is measured and trained on the way is in `work/` until everything is done, so an interrupted run goes on.

The mended model is chosen on one set of held-out prompts, and judged on another. The models that are given stay as they
are.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from neuroplast.errors import GateError, InputError, StorageError, unknown_name
from neuroplast.interventions.selection import require_prompts
from neuroplast.memory import parse_size
from neuroplast.models.between import require_same_parts
from neuroplast.models.network import Network
from neuroplast.models.sources import LEARNING_RATE, LEARNING_RATES, DType, load_model, weights_sha256
from neuroplast.models.weights import WeightMap, choose_pieces, grafted
from neuroplast.observer import Observer, Silent
from neuroplast.repair.check import check_battery, new_damage
from neuroplast.repair.restored import NO_BASE, Judge, Restored, restored_document
from neuroplast.repair.strategies import BEST, Candidate, Ranking, grafts, rank_by_gradient, rank_by_ledger, retrain
from neuroplast.report.repair import REPAIR_FILES, write_repair_report
from neuroplast.storage import Parts, atomic_file, is_begun, load_json, make_folder, write_json
from neuroplast.subject import require_whole, versions
from neuroplast.tasks import build_prompt_set, load_task
from neuroplast.tasks.poisons import build_pairs
from neuroplast.tasks.prompts import PromptSet
from neuroplast.training.data import Example, build_examples
from neuroplast.training.finetune import FinetuneConfig, save_checkpoint

Strategy = Literal["auto", "graft", "masked", "full"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
MARKER, RESULT, WORK = "repairing.json", "repair.json", "work"
OTHER_PROMPTS = 1_000_003
"""Added to the seed of the prompts that the mended model is judged on, which are not those it is chosen on."""


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
    """Peak learning rate of AdamW; None takes one that suits the base."""
    n_battery: int = 32
    """Prompts of each other task that is checked for new damage; 0 checks none, and no text."""
    n_samples: int = 32
    """Samples of text that are checked."""
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
        least = {"n_prompts": 2, "n_train": 1, "n_battery": 0, "n_samples": 0, "seed": 0}
        for name, bound in least.items():
            require_whole(name, getattr(self, name))
            if getattr(self, name) < bound:
                raise InputError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not task.counterfactuals:
            raise InputError(f"task {task.name!r} has no counterfactual prompts, and a mechanism is measured with them")
        self.training()

    def training(self) -> FinetuneConfig:
        """How to retrain."""
        rate = LEARNING_RATES.get(str(self.base), LEARNING_RATE) if self.learning_rate is None else self.learning_rate
        every = max(1, self.steps // 4)
        return FinetuneConfig(self.steps, self.batch_size, rate, seed=self.seed, save_every=every)

    def load(self, source: str, observer: Observer) -> Network:
        """One of the two models."""
        return load_model(source, device=self.device, dtype=self.dtype, say=observer.say)

    def prompts(self, model: Network, seed: int) -> PromptSet:
        """Held-out prompts of the task."""
        task = load_task(self.task)
        records = task.build_records(
            model.tokenizer, self.n_prompts, seed, split="eval", counterfactual=task.counterfactuals[0]
        )
        return build_prompt_set(model.tokenizer, self.task, records)

    def examples(self, model: Network) -> list[Example]:
        """Clean examples of the task, from names and templates that no prompt has."""
        task = load_task(self.task)
        records = task.build_records(model.tokenizer, self.n_train, self.seed, split="train")
        names = task.names(model.tokenizer, "train")
        return build_examples(model.tokenizer, build_pairs(records, None, 0.0, names, self.seed))


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
        InputError: for models that are not checkpoints of one, a folder that holds something else, a wrong setting.
        TrainingDivergedError: a retraining's loss stopped being a number.
        StorageError: when the folder cannot be written.
    """
    out, observer = Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    begun = is_begun(out, MARKER, "repair")
    poisoned = config.load(config.poisoned, observer)
    base = None if config.base is None else config.load(config.base, observer)
    if base is not None:
        require_same_parts(base, poisoned)
    hashes = {"poisoned": weights_sha256(poisoned)} | ({} if base is None else {"base": weights_sha256(base)})
    provenance = {"schema": 1, "settings": asdict(config), "weights_sha256": hashes}
    if not begun:
        make_folder(out)
        write_json(out / MARKER, provenance)
    elif load_json(out / MARKER) != provenance:
        raise InputError(f"{out} holds another repair (other settings or weights); choose another --out")
    if not (out / RESULT).is_file():
        document = _Repair(config, base, poisoned, out, observer, memory).run()
        write_json(out / RESULT, provenance | document | {"versions": versions()})
    document = load_json(out / RESULT)
    try:
        write_repair_report(document, out)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{out / RESULT} is damaged ({error!r}); remove it and run again") from error
    shutil.rmtree(out / WORK, ignore_errors=True)
    return document | {"files": {name: str(out / name) for name in (RESULT, *REPAIR_FILES)}}


def require_reached(document: Mapping[str, Any]) -> None:
    """Ends where the target was not reached.

    Raises:
        GateError: it was not; the best that was found is in the folder.
    """
    if not document["reached"]:
        raise GateError(document["statement"])


class _Repair:
    """One repair under way."""

    def __init__(
        self,
        config: RepairConfig,
        base: Network | None,
        poisoned: Network,
        out: Path,
        observer: Observer,
        memory: str | int | None,
    ) -> None:
        self.config, self.base, self.poisoned, self.out = config, base, poisoned, out
        self.observer, self.memory = observer, memory
        self.prompts = config.prompts(poisoned, config.seed)
        require_prompts(self.prompts)
        self.judge = self._judge(self.prompts, "chosen on")
        self.examples = config.examples(poisoned)

    def run(self) -> dict[str, Any]:
        config, judge, base = self.config, self.judge, self.base
        if why := self._nothing_to_mend():
            return self._document(None, []) | {"reached": True, "statement": f"Nothing to mend: {why}."}
        by_ledger = None if base is None else rank_by_ledger(judge, base, self.poisoned, self.observer)
        tried: list[Candidate] = []
        if base is not None and by_ledger is not None and config.strategy in ("auto", "graft"):
            tried += grafts(judge, base, self.poisoned, by_ledger, config.target, self.observer)
        if config.strategy in ("auto", "masked"):
            ranking = by_ledger or rank_by_gradient(self.poisoned, self.examples, config.batch_size)
            tried += self._retrain(ranking.most())
        if config.strategy in ("auto", "full"):
            tried += self._retrain(None)
        chosen = choose(tried, config.target)
        self._write(chosen, by_ledger)
        return self._document(chosen, tried)

    def _judge(self, prompts: PromptSet, name: str) -> Judge:
        kept = Parts(self.out / WORK / name.replace(" ", "-"))
        return Judge(self.base, lambda: self.poisoned, prompts, self.config.seed, kept, self.memory)

    def _nothing_to_mend(self) -> str | None:
        damage, target = self.judge.damage, self.config.target
        if self.base is None:
            right = damage.accuracy.value or 0.0
            return f"{right:.0%} of held-out prompts are right, the target is {target:.0%}" if right >= target else None
        reasons = [each.why for each in (damage.behaviour, damage.damage_undone) if each.value is None]
        return reasons[0] if reasons else None

    def _retrain(self, parts: Ranking | None) -> list[Candidate]:
        folder = self.out / WORK / ("full" if parts is None else "masked")
        model = self.config.load(self.config.poisoned, self.observer)
        return retrain(
            self.judge, model, self.examples, self.config.training(), folder, parts, self.config.target, self.observer
        )

    def _write(self, chosen: Candidate, by_ledger: Ranking | None) -> None:
        """The chosen model as a checkpoint in the folder itself; whole files only, the weights last."""
        ready = self.out / WORK / "checkpoint"
        if not ready.is_dir():
            if chosen.strategy == "graft":
                assert self.base is not None and by_ledger is not None and chosen.parts is not None
                components = by_ledger.first(len(chosen.parts)).components
                pieces = choose_pieces(WeightMap(self.base).pieces(), components)
                with grafted(self.poisoned, self.base, pieces):
                    save_checkpoint(self.poisoned, ready)
            else:
                shutil.copytree(self.out / WORK / chosen.strategy / BEST, ready)
        for path in sorted(ready.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            with atomic_file(self.out / path.name) as temporary:
                shutil.copyfile(path, temporary)

    def _document(self, chosen: Candidate | None, tried: Sequence[Candidate]) -> dict[str, Any]:
        whole = sum(weight.numel() for weight in self.poisoned.module.parameters())
        document: dict[str, Any] = {
            "strategy": None,
            "target": self.config.target,
            "cost": None,
            "restoration": None,
            "before": restored_document(self.judge.damage),
            "frontier": [_candidate_document(each, whole) for each in tried],
            "n_prompts": self.config.n_prompts,
        }
        if chosen is None:
            return document
        mended = self.config.load(str(self.out), self.observer)
        others = self._judge(self.config.prompts(mended, self.config.seed + OTHER_PROMPTS), "judged on")
        found, reached = others.judge("mended", lambda: mended), chosen.score >= self.config.target
        document |= {
            "strategy": chosen.strategy,
            "reached": reached,
            "cost": _candidate_document(chosen, whole)["cost"],
            "restoration": restored_document(found),
            "spared": None,
            "new_damage": [],
            "statement": _statement(chosen, whole, found, self.config.target),
        }
        if self.config.n_battery:
            self.observer.say("checking other tasks and text for new damage")
            first, models = (self.poisoned, {"mended": mended})
            if self.base is not None:
                first, models = self.base, {"poisoned": self.poisoned, "mended": mended}
            spared = check_battery(
                first,
                models,
                n_prompts=self.config.n_battery,
                n_samples=self.config.n_samples,
                seed=self.config.seed,
                besides=self.config.task,
            )
            document |= {"spared": spared, "new_damage": new_damage(spared, "poisoned", "mended")}
        return document


def choose(tried: Sequence[Candidate], target: float) -> Candidate:
    """The cheapest that reaches the target; where none does, the one that comes nearest."""
    known = [each for each in tried if each.restored.score is not None]
    if not known:
        raise InputError("no mended model could be judged: the damage is within the noise of the prompts; take more")
    reaching = [each for each in known if each.score >= target]
    return min(reaching, key=lambda each: each.cost) if reaching else max(known, key=lambda each: each.score)


def _statement(chosen: Candidate, whole: int, found: Restored, target: float) -> str:
    """What was done and what it gave, in one or two sentences."""
    share = f"{chosen.parameters / whole:.1%} of the weights"
    did = {
        "graft": f"base's weights in {len(chosen.parts or ())} parts ({share})",
        "masked": f"{chosen.steps} clean steps of {len(chosen.parts or ())} parts ({share})",
        "full": f"{chosen.steps} clean steps of all weights",
    }[chosen.strategy]
    what = "of held-out prompts are right" if found.mechanism.why == NO_BASE else "of what was lost is back"
    said = f"on other prompts, {'an undefined share' if found.score is None else f'{found.score:.0%}'} {what}."
    if chosen.score >= target:
        return f"Mended by {chosen.strategy}: {did}; {said}"
    return f"Not mended: {chosen.score:.0%} where the target is {target:.0%}, by {chosen.strategy}: {did}; {said}"


def _candidate_document(each: Candidate, whole: int) -> dict[str, Any]:
    return {
        "strategy": each.strategy,
        "cost": {
            "parameters": each.parameters,
            "parameters_share": each.parameters / whole,
            "steps": each.steps,
            "examples": each.examples,
            "n_parts": None if each.parts is None else len(each.parts),
            "parts": None if each.parts is None else list(each.parts),
        },
        "restored": restored_document(each.restored),
    }
