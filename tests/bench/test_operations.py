"""What is counted against what torch counts while it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from architectures import VOCABULARY, random_model
from neuroplast.bench.job import Counted, Setting
from neuroplast.bench.operations import Operations
from neuroplast.bench.rows import ROWS
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.tasks.prompts import PromptSet

COUNTED = ("heads-to-logits", "heads-to-queries", "activations", "criteria", "discovery", "training")
MOST = 3.0
"""How often what is counted may be run on a model of four layers, where ends and set-up weigh much."""


def executed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Operations of all matrix products with weights that something runs, and what it gives."""
    with FlopCounterMode(display=False) as counter:
        found = work()
    by_kind = counter.get_flop_counts()["Global"]
    return float(sum(n for kind, n in by_kind.items() if str(kind) in ("aten.mm", "aten.addmm"))), found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@torch.no_grad()
def test_a_forward_pass_is_what_torch_counts(family: str):
    network = build_network(random_model(family), None, family)
    tokens = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    end = torch.full((4,), 8)
    prompts = PromptSet("random", (), tokens, tokens.flip(0), tokens[:, 0], tokens[:, 1], {"end": end})
    counted, _ = executed(lambda: network.logits(tokens, end))
    unembedding = 2 * 4 * VOCABULARY * network.d_model
    assert Operations(network, prompts).run(network.n_layers) == counted - unembedding


@pytest.fixture(scope="module")
def tiny() -> Network:
    return load_model("tiny")


@pytest.mark.parametrize("row", COUNTED)
def test_a_floor_counts_no_product_that_is_not_run(tiny: Network, tmp_path: Path, row: str):
    job = ROWS[row](Setting(tiny, "tiny", 3, "cpu", tmp_path))
    assert isinstance(job.floor, Counted)
    run, found = executed(job.run)
    assert job.floor.operations(found) <= run <= MOST * job.floor.operations(found)


def test_more_prompts_cost_in_proportion_and_more_receivers_more(tiny: Network, tmp_path: Path):
    setting = Setting(tiny, "tiny", 4, "cpu", tmp_path)
    prompts = setting.prompts()
    twice = prompts.pick(torch.arange(4).repeat(2))
    assert Operations(tiny, twice).heads_to_logits() == 2 * Operations(tiny, prompts).heads_to_logits()
    assert Operations(tiny, twice).sites(["s2"]) == 2 * Operations(tiny, prompts).sites(["s2"])
    counts = Operations(tiny, prompts)
    assert counts.sites(["io"]) > counts.sites(["s2"]) > counts.sites(["end"])
