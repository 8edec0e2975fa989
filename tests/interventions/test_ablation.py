"""What knocked-out heads give, and what is left of LD without some heads or with nothing else."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.ablation import ABLATIONS, build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet, Record
from oracle import Oracle, prompts_of

positions = st.sampled_from([None, "a", "b", "end", "2", "other"])
heads = st.builds(Node, st.just("head"), st.sampled_from(range(3)), st.sampled_from(range(4)), positions)
sets = st.lists(st.lists(heads, max_size=6, unique=True), min_size=1, max_size=3)


def given_instead(kind, oracle: Oracle, prompts: PromptSet, number: int, donor: int | None):
    """By head, what it gives on one prompt when it is knocked out; slow and obvious."""
    texts = prompts_of(prompts)
    runs = [oracle.run(text.counterfactual).seen for text in texts]
    mine = texts[number]
    given = {}
    for layer in range(oracle.n_layers):
        for head in range(oracle.n_heads):
            key = ("z", layer, head)
            if kind == "zero":
                given[key] = torch.zeros_like(runs[number][key])
            elif kind == "counterfactual":
                given[key] = runs[number][key]
            elif kind == "resample":
                given[key] = runs[donor][key]
            elif kind == "mean":
                given[key] = torch.cat([run[key] for run in runs]).mean(0).expand_as(runs[number][key])
            else:
                alike = [run for run, text in zip(runs, texts, strict=True) if len(text.clean) == len(mine.clean)]
                given[key] = torch.stack([run[key] for run in alike]).mean(0)
    return given


@pytest.mark.parametrize("kind", ABLATIONS)
@pytest.mark.parametrize("keep", [False, True])
def test_what_is_left_agrees_with_a_full_forward_pass(network: Network, named_prompts, family, kind, keep):
    oracle = Oracle(random_model(family), family)
    ablation = build_ablation(network, named_prompts, kind)

    @settings(
        max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(sets, st.lists(heads, min_size=1, max_size=6, unique=True), st.booleans())
    def check(chosen, near, start_near):
        chosen = [*chosen, near[1:]]
        fast = run_knockouts(network, named_prompts, chosen, ablation, keep=keep, near=near if start_near else ())
        for number, text in enumerate(prompts_of(named_prompts)):
            given = given_instead(kind, oracle, named_prompts, number, int(ablation.groups[number]))
            for nodes, found in zip(chosen, fast, strict=True):
                replace = {}
                for key, value in given.items():
                    where = torch.zeros(len(text.clean), dtype=torch.bool)
                    for node in nodes:
                        if (node.layer, node.head) == key[1:]:
                            where |= text.where(node.position)
                    replace[key] = (~where if keep else where, value)
                slow = text.ld(oracle.run(text.clean, replace))
                torch.testing.assert_close(found[number], slow, atol=1e-4, rtol=1e-4)

    check()


def test_nothing_knocked_out_is_the_clean_model_and_everything_kept_too(network: Network, named_prompts: PromptSet):
    every = [Node("head", layer, head) for layer in range(3) for head in range(4)]
    ablation = build_ablation(network, named_prompts, "zero")
    without = run_knockouts(network, named_prompts, [[], every], ablation)
    only = run_knockouts(network, named_prompts, [every, []], ablation, keep=True)
    torch.testing.assert_close(without, only, atol=1e-5, rtol=1e-5)
    assert (without[0] - without[1]).abs().min() > 1e-3


def test_a_reference_of_its_own_gives_the_means(network: Network, named_prompts: PromptSet):
    lengths = named_prompts.positions["end"]
    long = lengths == 8
    half = build_ablation(network, named_prompts.pick(long.nonzero()[:, 0]), reference=named_prompts)
    whole = build_ablation(network, named_prompts)
    for layer in range(3):
        torch.testing.assert_close(half.means[layer], whole.means[layer])
    assert half.n_reference == 4


def test_a_reference_without_the_template_is_refused(network: Network):
    records = tuple(Record("a b", "a c", " x", " y", template=name) for name in ("one", "two"))
    tokens, one = torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.long)
    prompts = PromptSet("t", records, tokens, tokens, one, 2 * one, {"end": 2 * one})
    with pytest.raises(InputError, match="no prompt of template 'two'"):
        build_ablation(network, prompts, reference=prompts.pick(torch.tensor([0])))


def test_a_resampled_prompt_is_another_of_its_group(network: Network, named_prompts: PromptSet):
    donors = build_ablation(network, named_prompts, "resample").groups
    assert donors[0] == 3 and donors[3] == 0  # the only two of one length
    assert donors[1] == 1  # alone of its length


def test_an_unknown_ablation_is_refused(network: Network, named_prompts: PromptSet):
    with pytest.raises(InputError, match="did you mean 'resample'"):
        build_ablation(network, named_prompts, "resampel")
