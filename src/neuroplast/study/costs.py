"""What a study costs: seconds, memory and disk, from its settings and the speed of its model.

Seconds are counts (of steps, prompts, sets of heads) times what a piece of work takes (`neuroplast.study.calibration`).
Some counts are known beforehand: steps, points, prompts. Others are not, since they hang on the circuit that is found:
how many steps the search takes, how many sets of heads the judgement asks for, how much a comparison has to patch. For
those stand constants that were fitted on studies of `tiny` and `smollm2-135m` (`benchmarks/forecast.py` sets a forecast
beside the run). So every time is a range, of `CLOSE` either way where the counts are known, of `ROUGH` where not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from neuroplast.comparison.compare import SHAPE_PROMPTS
from neuroplast.comparison.text import LENGTH, SAMPLES
from neuroplast.study.artefacts import CHECKPOINT
from neuroplast.study.calibration import Speed
from neuroplast.study.cluster import BESIDE, WEIGHTS_HELD
from neuroplast.study.plan import Stage, StudyConfig
from neuroplast.study.remaining import Remaining
from neuroplast.tasks import TASKS

CLOSE, ROUGH = 1.4, 2.0
"""Factors either way."""
TRAINING, FOLLOWING, MEASURING, DISCOVERY, EDGES, JUDGING, COMPARING, LOOKING, REST, REPORT = ACTIVITIES = (
    "training",
    "following",
    "measuring",
    "circuit discovery",
    "edges",
    "judging",
    "comparing",
    "looking",
    "loading and writing",
    "report",
)
GUESSED = frozenset({FOLLOWING, DISCOVERY, JUDGING, COMPARING, LOOKING, REPORT})
"""Activities whose counts are not known beforehand."""

# Fitted, as ratios of what a study took to the pieces timed in the same process.
BEGINNING = 5.0
"""Of a training, in pieces of plain Python."""
SAVED = 4.0
"""Writing a save of a training, weights and two moments, in hashes of the weights."""
ROLES, NOTED = 0.7, 1.0
"""What following measures of base's circuit beside the heads, in patchings of all heads; and pieces of Python."""
SCREENED, SEARCHED, SEARCHED_ALL = 32, 12.0, 50.0
"""Searching a circuit, in patchings of all heads on all prompts; from so many prompts on a screening cuts most."""
TALKED = 4.0
"""What a search does whatever the prompts (roles, stability), in pieces of plain Python."""
JUDGED_SETS, JUDGED_CALLS, INSIDE_CALLS = 150, 9.0, 1.0
"""Sets of heads that a judgement asks for beside random ones, and pieces of plain Python; those of another circuit."""
TWINS = 1.5
"""Measuring a twin, in the passes and patchings that it is made of."""
CROSSED, GRAFTED, RANDOM_SETS = 12.0, 40.0, 0.3
"""A comparison: patching between the two, in patchings of all heads; grafts, in passes; random sets, in knockouts."""
LEDGER, LEDGER_OF_A_TWIN, PROFILES = 16.0, 8.0, 2
"""Splitting a change over the weights, in gradients: the stage's, that of a twin, and twins that are split."""
COMPARED = 20.0
"""What a comparison does whatever the prompts, in pieces of plain Python."""
LOOKED, SEEN = 6.0, 0.7
"""Looking at heads, in passes and pieces of plain Python."""
DRAWN_ONCE, DRAWN_A_STAGE = 16.0, 4.5
"""The report, and each stage of it, in pieces of plain Python."""
SUMMED = 2.0
"""Numbers of a point with their intervals, in pieces of plain Python."""

TEXT_OF_A_STAGE, TEXT_OF_A_CIRCUIT, TEXT_OF_AN_EDGE = 30_000, 180_000, 300
"""Bytes of the documents of a stage and of a circuit, and of an edge in its file."""
PAGE, FIGURES_OF_A_CIRCUIT = 6_500_000, 220_000
"""Bytes of the page with its figures and tables, and of the figures of a circuit."""


@dataclass(frozen=True)
class Range:
    """A number that is not known exactly."""

    low: float
    """It may be as little."""
    likely: float
    """The estimate."""
    high: float
    """It may be as much."""

    @classmethod
    def around(cls, value: float, factor: float) -> Self:
        """From a part of a value to as many times it."""
        return cls(value / factor, value, value * factor)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)


NOTHING = Range(0.0, 0.0, 0.0)


def total(ranges: Iterable[Range]) -> Range:
    """The sum."""
    return sum(ranges, NOTHING)


def spread(seconds: Mapping[str, float]) -> dict[str, Range]:
    """Activities that take any time, each with its range."""
    return {
        name: Range.around(value, ROUGH if name in GUESSED else CLOSE) for name, value in seconds.items() if value > 0
    }


def stage_seconds(left: Remaining, config: StudyConfig, speed: Speed) -> dict[str, Range]:
    """Seconds of what is left of a stage, by activity.

    Args:
        left: what there is to make.
        config: the study.
        speed: of its model.
    """
    n = min(config.n_prompts, speed.n_prompts)
    seconds = {
        TRAINING: _training(left, config, speed, n),
        FOLLOWING: _following(left, config, speed, n),
        MEASURING: left.measured * n * (speed.patch + speed.forward),
        DISCOVERY: left.circuits * _discovery(speed, n),
        EDGES: left.edges * n * speed.edges,
        JUDGING: _judging(left, config, speed, n),
        COMPARING: _comparing(config, speed, n) if left.compare else 0.0,
        LOOKING: LOOKED * n * speed.forward + SEEN * speed.python if left.look else 0.0,
    }
    loads = bool(left.checkpoint) + left.documents + left.look + 2 * left.compare + max(0, left.inside - left.judged)
    seconds[REST] = loads * (speed.load + speed.sha256) + (left.documents + left.way) * SUMMED * speed.python
    return spread(seconds)


def report_seconds(config: StudyConfig, n_stages: int, speed: Speed) -> dict[str, Range]:
    """Seconds of what comes before the first stage and after the last.

    Args:
        config: the study.
        n_stages: how many stages it has.
        speed: of its model.
    """
    pages = DRAWN_ONCE + DRAWN_A_STAGE * n_stages
    return spread({REST: speed.load + speed.sha256, REPORT: pages * speed.python})


def _training(left: Remaining, config: StudyConfig, speed: Speed, n: int) -> float:
    if not left.checkpoint or left.stage.parent is None:
        return 0.0
    saves = SAVED * speed.sha256 * (1 + left.steps / config.save_every)
    step = config.batch_size * speed.gradient + speed.update
    probes = (2 + left.steps / config.probe_every) * n * speed.forward
    return left.steps * step + probes + saves + BEGINNING * speed.python


def _following(left: Remaining, config: StudyConfig, speed: Speed, n: int) -> float:
    patched = 1 + (ROLES if "base" in config.circuit_stages else 0)
    return left.followed * (patched * min(config.follow_prompts, n) * speed.patch + NOTED * speed.python)


def _discovery(speed: Speed, n: int) -> float:
    return (SEARCHED if n >= SCREENED else SEARCHED_ALL) * n * speed.patch + TALKED * speed.python


def _judging(left: Remaining, config: StudyConfig, speed: Speed, n: int) -> float:
    means = config.circuit_reference * speed.forward
    judged = (JUDGED_SETS + config.circuit_random) * n * speed.knockout + 3 * means
    judged += JUDGED_CALLS * speed.python
    inside = (1 + config.circuit_random) * n * speed.knockout + means
    return left.judged * judged + left.inside * (inside + INSIDE_CALLS * speed.python)


def _comparing(config: StudyConfig, speed: Speed, n: int) -> float:
    battery = config.compare_battery * (len(TASKS) - 1)
    text = SAMPLES * LENGTH / speed.width * speed.forward if config.compare_battery else 0.0
    shape = len(range(0, n, max(1, n // SHAPE_PROMPTS)))
    a_twin = speed.twin + TWINS * (shape * speed.patch + (n + battery) * speed.forward + text)
    twins = config.compare_drift * a_twin
    effects = 2 * (n + battery) * speed.patch
    ledgers = (LEDGER + min(PROFILES, config.compare_drift) * LEDGER_OF_A_TWIN) * n * speed.gradient
    undone = n * (CROSSED * speed.patch + GRAFTED * speed.forward)
    random = RANDOM_SETS * config.compare_random * n * speed.knockout
    written = text * LENGTH / 2  # token by token, each pass as long as what is written by then
    return twins + effects + ledgers + undone + random + written + COMPARED * speed.python


def checkpoint_bytes(speed: Speed) -> int:
    """Bytes of one checkpoint."""
    return speed.weights + speed.beside


def kept_checkpoints(stage: Stage, config: StudyConfig) -> list[str]:
    """The checkpoints that stay of a stage, by their folder relative to the run.

    Args:
        stage: the stage.
        config: the study.
    """
    points = {"all": stage.points, "last": stage.points[-1:], "none": ()}[config.keep]
    return [f"{point.folder}/{CHECKPOINT}" for point in points]


def stage_bytes(stage: Stage, config: StudyConfig, speed: Speed) -> tuple[int, int]:
    """Bytes of a stage that is finished: of its checkpoints, as the settings keep them, and of all else.

    Args:
        stage: the stage.
        config: the study.
        speed: of its model.
    """
    kept = len(kept_checkpoints(stage, config)) * checkpoint_bytes(speed)
    n = min(config.n_prompts, speed.n_prompts)
    heads = speed.n_layers * speed.n_heads
    own = stage.kind in config.circuit_stages
    circuit = TEXT_OF_A_CIRCUIT + min(config.circuit_edges, speed.n_edges) * TEXT_OF_AN_EDGE if own else 0
    files = len(stage.points) * (4 * n * (heads + 6) + TEXT_OF_A_STAGE + heads * 60 + circuit)
    if stage.kind in config.follow_stages and stage.parent is not None:
        files += config.follow_points * 4 * min(config.follow_prompts, n) * (heads + 20)
    if stage.kind in config.look_stages:
        files += min(config.look_prompts, n) * 20 * speed.width**2 * 2 + TEXT_OF_A_STAGE
    return kept, files


def report_bytes(config: StudyConfig, stages: Iterable[Stage]) -> int:
    """Bytes of the page, its figures and tables."""
    circuits = sum(stage.kind in config.circuit_stages for stage in stages)
    return PAGE + circuits * FIGURES_OF_A_CIRCUIT


def peak_memory(config: StudyConfig, speed: Speed) -> int:
    """Bytes that the process holds at most, about: the weights as often as they are held, libraries, and the work.

    Args:
        config: the study.
        speed: of its model.
    """
    n = min(config.n_prompts, speed.n_prompts)
    edges = 4 * 2 * speed.n_edges * n if config.circuit_edges else 0
    text = 4 * 2 * SAMPLES * LENGTH * speed.vocabulary if config.compare_battery and config.compare_stages else 0
    return WEIGHTS_HELD * speed.weights + BESIDE + max(edges, text)
