"""How long everything takes on this machine, beside the least that it could take and what it takes elsewhere."""

from neuroplast.bench.run import BenchConfig, run_bench

__all__ = ["BenchConfig", "run_bench"]
