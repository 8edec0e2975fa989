"""The machine that something was made on."""

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from neuroplast.reading import read_text

CPU_INFO = Path("/proc/cpuinfo")


def hardware(device: str) -> dict[str, Any]:
    """The machine, as a run's manifest and a table of timings have it.

    Args:
        device: what is computed on, as `load_model` takes it.
    """
    return {"platform": platform.platform(), "processor": _processor(), "device": device, "cpus": cpus()}


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpus() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _processor() -> str:
    """Its name where the system gives one, else its kind."""
    if CPU_INFO.is_file():
        for line in read_text(CPU_INFO).splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
