"""Shows what fine-tuning does to the circuits inside a language model, and whether the damage heals.

The front door: everything here is loaded on first use, so importing the package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroplast import tasks
    from neuroplast.audit import AuditConfig, run_audit
    from neuroplast.behaviour import measure_behaviour
    from neuroplast.bench import BenchConfig, run_bench
    from neuroplast.circuits.circuit import Circuit
    from neuroplast.circuits.discover import discover
    from neuroplast.circuits.edge_criteria import edge_curve
    from neuroplast.circuits.evaluate import evaluate
    from neuroplast.circuits.files import load_circuit, save_circuit
    from neuroplast.circuits.published import published_circuit
    from neuroplast.comparison.compare import compare
    from neuroplast.discovery import DiscoverConfig, run_discover
    from neuroplast.dose import DoseConfig, run_dose
    from neuroplast.errors import NeuroplastError
    from neuroplast.evaluation import EvaluateConfig, run_evaluate
    from neuroplast.interventions.activation_patching import activation_patch
    from neuroplast.interventions.causal_tracing import causal_trace
    from neuroplast.interventions.cross_model import cross_patch
    from neuroplast.interventions.edge_attribution import attribute_edges
    from neuroplast.interventions.edge_patching import patch_edges
    from neuroplast.interventions.grafting import graft
    from neuroplast.interventions.ledger import build_ledger
    from neuroplast.interventions.path_patching import path_patch
    from neuroplast.models.build import build_network
    from neuroplast.models.sources import list_models, load_model
    from neuroplast.patch import PatchConfig, run_patch
    from neuroplast.repair import RepairConfig, run_repair
    from neuroplast.report import write_report
    from neuroplast.report.circuit import draw_circuit
    from neuroplast.report.traces import draw_traces
    from neuroplast.study import build_config, run_study
    from neuroplast.training import FinetuneConfig, train

__version__ = "0.1.0"

__all__ = [
    "AuditConfig",
    "BenchConfig",
    "Circuit",
    "DiscoverConfig",
    "DoseConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "NeuroplastError",
    "PatchConfig",
    "RepairConfig",
    "activation_patch",
    "attribute_edges",
    "build_config",
    "build_ledger",
    "build_network",
    "causal_trace",
    "compare",
    "cross_patch",
    "discover",
    "draw_circuit",
    "draw_traces",
    "edge_curve",
    "evaluate",
    "graft",
    "list_models",
    "load_circuit",
    "load_model",
    "measure_behaviour",
    "patch_edges",
    "path_patch",
    "published_circuit",
    "run_audit",
    "run_bench",
    "run_discover",
    "run_dose",
    "run_evaluate",
    "run_patch",
    "run_repair",
    "run_study",
    "save_circuit",
    "tasks",
    "train",
    "write_report",
]

_HOMES = {
    "AuditConfig": "audit",
    "BenchConfig": "bench",
    "Circuit": "circuits.circuit",
    "DiscoverConfig": "discovery",
    "DoseConfig": "dose",
    "EvaluateConfig": "evaluation",
    "FinetuneConfig": "training",
    "NeuroplastError": "errors",
    "PatchConfig": "patch",
    "RepairConfig": "repair",
    "activation_patch": "interventions.activation_patching",
    "attribute_edges": "interventions.edge_attribution",
    "build_config": "study",
    "build_ledger": "interventions.ledger",
    "build_network": "models.build",
    "causal_trace": "interventions.causal_tracing",
    "compare": "comparison.compare",
    "cross_patch": "interventions.cross_model",
    "discover": "circuits.discover",
    "draw_circuit": "report.circuit",
    "draw_traces": "report.traces",
    "edge_curve": "circuits.edge_criteria",
    "evaluate": "circuits.evaluate",
    "graft": "interventions.grafting",
    "list_models": "models.sources",
    "load_circuit": "circuits.files",
    "load_model": "models.sources",
    "measure_behaviour": "behaviour",
    "patch_edges": "interventions.edge_patching",
    "path_patch": "interventions.path_patching",
    "published_circuit": "circuits.published",
    "run_audit": "audit",
    "run_bench": "bench",
    "run_discover": "discovery",
    "run_dose": "dose",
    "run_evaluate": "evaluation",
    "run_patch": "patch",
    "run_repair": "repair",
    "run_study": "study",
    "save_circuit": "circuits.files",
    "train": "training",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return import_module("neuroplast.tasks")
    if name not in _HOMES:
        raise AttributeError(f"module 'neuroplast' has no attribute {name!r}")
    return getattr(import_module(f"neuroplast.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
