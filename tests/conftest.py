"""Shared by all tests: shape checks at run time, and tiny random models of the architectures that must agree."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

# Tiny matrices gain nothing from a second thread, and subprocesses of the tests must round as this one does.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The hook must stand before the first import of what it checks.
SHAPE_CHECKED = (
    "behaviour",
    "circuits",
    "comparison",
    "interventions",
    "localisation",
    "models",
    "plasticity",
    "statistics",
    "training.data",
)
install_import_hook([f"neuroplast.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

from architectures import ARCHITECTURES, VOCABULARY, random_model  # noqa: E402
from left_out import without_shape_checks  # noqa: E402
from neuroplast.models.build import build_network  # noqa: E402
from neuroplast.models.network import Network  # noqa: E402
from neuroplast.tasks.prompts import PromptSet  # noqa: E402


def pytest_collection_finish() -> None:
    """Spares every collection of garbage, and every training asks for one, what the imports have left for good."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Hypothesis, when it is first imported for the summary, asks what refers to what."""
    gc.unfreeze()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No shape checks, for tests that repeat what others have checked."""
    with without_shape_checks():
        yield


@pytest.fixture(params=sorted(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def network(family: str) -> Network:
    """A tiny instrumented model of each architecture in turn."""
    return build_network(random_model(family), None, family)


@pytest.fixture
def token_prompts() -> PromptSet:
    """Five random prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(3)
    width, lengths = 11, torch.tensor([11, 7, 9, 11, 8])
    clean, other = torch.randint(1, VOCABULARY, (2, 5, width), generator=generator)
    choices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:2] for _ in range(5)])
    return PromptSet("random", (), clean, other, choices[:, 0], choices[:, 1], {"end": lengths - 1})


@pytest.fixture
def named_prompts() -> PromptSet:
    """Four random prompts of mixed lengths with named positions; each begins like its counterfactual."""
    generator = torch.Generator().manual_seed(5)
    width, lengths = 9, torch.tensor([9, 6, 8, 9])
    clean, other = torch.randint(1, VOCABULARY, (2, 4, width), generator=generator)
    same = torch.tensor([2, 1, 0, 3])
    other = torch.where(torch.arange(width) < same[:, None], clean, other)
    choices = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:2] for _ in range(4)])
    # In the first prompt two names fall on one position.
    positions = {"a": torch.tensor([4, 1, 2, 3]), "b": torch.tensor([4, 3, 5, 6]), "end": lengths - 1}
    return PromptSet("random", (), clean, other, choices[:, 0], choices[:, 1], positions)
