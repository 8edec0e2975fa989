"""Mending a damaged checkpoint at the least cost."""

from neuroplast.repair.repair import RepairConfig, require_reached, run_repair

__all__ = ["RepairConfig", "require_reached", "run_repair"]
