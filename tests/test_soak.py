"""The soak: its kinds of intervention leave no tensor and no hook, and it would see one that did."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("soak", Path(__file__).parents[1] / "benchmarks" / "soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


@pytest.fixture(autouse=True)
def no_memory_is_read(monkeypatch: pytest.MonkeyPatch):
    """The tests' own process has much to collect; what counts here is tensors and hooks."""
    monkeypatch.setattr(soak, "used_memory", lambda device: 0)


def test_two_turns_of_all_interventions_keep_nothing():
    found = soak.soak("tiny", 20, 2)
    assert found["nothing_left"] and found["kinds"] == 10
    assert found["tensors"][0] == found["tensors"][1]


def test_an_intervention_that_keeps_a_tensor_or_a_hook_is_found_out(monkeypatch: pytest.MonkeyPatch):
    leaked = []

    def kinds_of(model, other, prompts):
        return {
            "tensor": lambda: leaked.append(torch.ones(2)),
            "hook": lambda: model.module.register_forward_hook(lambda *_: None),
        }

    monkeypatch.setattr(soak, "kinds_of", kinds_of)
    found = soak.soak("tiny", 6, 2)
    assert found["tensors"][1] == found["tensors"][0] + 1
    assert not found["flat"] and not found["nothing_left"]
