"""The table of what everything takes on this machine: the front door."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from neuroplast.bench.document import SCHEMA, row_document
from neuroplast.bench.job import Setting
from neuroplast.bench.rounds import Clock, measure_peers, measure_rounds
from neuroplast.bench.rows import ROWS, choose_rows
from neuroplast.machine import hardware, now
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.observer import Observer, Silent
from neuroplast.subject import MOST_PROMPTS, require_between, versions


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, and how often."""

    model: str = "tiny"
    """A named model, a hub id or a folder."""
    prompts: int = 64
    """Prompts of a row that does not take fewer."""
    repeats: int = 3
    """Rounds; rows that take long are in the first alone."""
    rows: tuple[str, ...] = ()
    """Names of rows; empty takes all."""
    peers: bool = True
    """Whether the same is timed by other means, where there are any."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""

    def __post_init__(self) -> None:
        require_between("prompts", self.prompts, 1, MOST_PROMPTS)
        require_between("repeats", self.repeats, 1)
        choose_rows(self.rows)


def run_bench(config: BenchConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Measures the table and gives it as a document; nothing is left on the disk.

    A row that cannot be measured on this model is null in the document, with the reason.

    Args:
        config: what is measured.
        observer: is told how it goes; by default nobody is.

    Raises:
        InputError: for a model or prompts that cannot be had.
    """
    observer, started = observer or Silent(), time.perf_counter()
    model = load_model(config.model, device=config.device, say=observer.say)
    names = choose_rows(config.rows)
    with TemporaryDirectory(prefix="neuroplast-") as folder:
        setting = Setting(model, config.model, config.prompts, config.device, Path(folder))
        clocks = {name: Clock(ROWS[name](setting)) for name in names}
        rates = measure_rounds(model, clocks, config.repeats, observer)
        if config.peers:
            observer.stage("peers", config.repeats + 1, config.repeats + 2)
            measure_peers(clocks, observer)
    rate = statistics.median(rates)
    return {
        "schema": SCHEMA,
        "date": now(),
        "seconds": time.perf_counter() - started,
        "versions": versions(),
        "hardware": hardware(config.device) | _more_hardware(model),
        "model": {
            "name": config.model,
            "architecture": model.architecture,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "weights_sha256": weights_sha256(model),
        },
        "settings": asdict(config) | {"rows": list(names)},
        "rate": {"operations_a_second": rate, "range": [min(rates), max(rates)]},
        "rows": [row_document(name, clock, rate) for name, clock in clocks.items()],
    }


def _more_hardware(model: Network) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "memory_bytes": psutil.virtual_memory().total}
    if model.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.device)
    return found
