import pytest
import torch

from neuroplast.errors import InputError, NeuroplastError
from neuroplast.interventions import chunks
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.causal_tracing import causal_trace
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.memory import in_chunks, parse_size, reuse_freed_memory, used_memory, working_memory
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

RUNS = {
    "path": lambda model, prompts, **more: path_patch(model, prompts, senders="all", **more).effects,
    "path to heads": lambda model, prompts, **more: (
        path_patch(model, prompts, receivers="a2.h1<q>@end, a1.h0<v>@a, m2", **more).effects
    ),
    "activation": lambda model, prompts, **more: activation_patch(model, prompts, **more).effects,
    "tracing": lambda model, prompts, **more: causal_trace(model, prompts, window=2, n_noise=1, **more).effects,
    "attribution": lambda model, prompts, **more: attribute_edges(model, prompts, per_prompt=True, **more).per_prompt,
    "edges": lambda model, prompts, **more: patch_edges(model, prompts, receivers="a1.h0<k>, m2", **more).effects,
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, unchecked: None):
    return RUNS[request.param]


def test_few_rows_at_once_change_nothing(network: Network, named_prompts: PromptSet, run, monkeypatch):
    whole = run(network, named_prompts)
    for rows in (1, 30):
        monkeypatch.setitem(chunks.ROWS, "cpu", rows)
        torch.testing.assert_close(run(network, named_prompts), whole, atol=2e-5, rtol=1e-4)


def test_a_tight_budget_changes_nothing(network: Network, named_prompts: PromptSet, run, monkeypatch):
    whole = run(network, named_prompts)
    # From so little that hardly two copies of one prompt fit together.
    kept = 0
    for free in (20_000, 160_000, 640_000, 1_280_000):
        monkeypatch.setattr(chunks, "working_memory", lambda *_, free=free: free)
        try:
            found = run(network, named_prompts)
        except InputError:
            assert not kept, "a larger budget was refused than one that was enough"
            continue
        kept += 1
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)
    assert kept >= 2


def test_a_budget_below_one_prompt_is_one_clear_line(network: Network, named_prompts: PromptSet, run):
    with pytest.raises(InputError, match=r"memory budget of 1.0 MiB cannot be kept: the model and the libraries take"):
        run(network, named_prompts, memory="1MiB")


def test_a_budget_that_one_prompt_outgrows_is_one_clear_line(network, named_prompts, run, monkeypatch):
    monkeypatch.setattr(chunks, "working_memory", lambda *_: 10)
    with pytest.raises(InputError, match=r"10 bytes of memory are left for the work, and one prompt takes \d"):
        run(network, named_prompts)


def test_a_gpu_that_is_full_gets_half_as_much(network: Network, named_prompts: PromptSet, run, monkeypatch):
    whole = run(network, named_prompts)
    sizes = []

    def starts(tokens, start=network.start):
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(tokens)

    monkeypatch.setattr(network, "start", starts)
    torch.testing.assert_close(run(network, named_prompts), whole, atol=2e-5, rtol=1e-4)
    assert sizes[:3] == [4, 2, 1]


@pytest.mark.parametrize("name", ["attribution", "knock-outs"])
def test_what_ran_out_of_memory_is_not_counted_twice(network: Network, named_prompts: PromptSet, monkeypatch, name):
    runs = {
        "attribution": lambda: attribute_edges(network, named_prompts, method="eap").scores,
        "knock-outs": lambda: path_patch(network, named_prompts, knocked_out="a0.h1, a1.h2@b").effects,
    }
    whole = runs[name]()
    # The sum over prompts, or the last head's values, do not fit: as late as an attempt can fail.
    module, function = {"attribution": (torch.Tensor, "sum"), "knock-outs": (torch.Tensor, "float")}[name]
    real, failed = getattr(module, function), []

    def fails(tensor, *args, **kwargs):
        late = kwargs.get("dtype") == torch.float64 or (function == "float" and tensor.shape[-1] == network.d_head)
        if late and len(failed) < 2:
            failed.append(len(tensor))
            if len(failed) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(module, function, fails)
    torch.testing.assert_close(runs[name](), whole, atol=2e-5, rtol=1e-4)
    assert len(failed) == 2


def test_a_gpu_too_small_for_one_prompt_is_said(network: Network, named_prompts: PromptSet, run, monkeypatch):
    def full(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "start", full)
    with pytest.raises(NeuroplastError, match="too small for a single prompt"):
        run(network, named_prompts)


def test_progress_counts_up_to_the_end(network: Network, named_prompts: PromptSet, run):
    calls: list[tuple[int, int]] = []
    run(network, named_prompts, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 2 and calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] and all(done < total for done, total in calls[:-1])


# In a trace the noise belongs to the row.
@pytest.mark.parametrize("run", [each for name, each in RUNS.items() if name != "tracing"])
def test_the_random_state_and_the_order_of_prompts_do_not_matter(network: Network, named_prompts: PromptSet, run):
    order = torch.tensor([2, 0, 3, 1])
    torch.manual_seed(1)
    whole = run(network, named_prompts)
    torch.testing.assert_close(run(network, named_prompts.pick(order)), whole[..., order], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("800MB", 800_000_000), ("2g", 2 * 10**9), ("1.5 kib", 1536), (77, 77), ("12B", 12)],
)
def test_amounts_of_memory_are_read(text, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "4GiBB", "much", "1e9", "1" * 400, "nan"])
def test_other_amounts_are_refused(text: str):
    with pytest.raises(InputError, match="is no amount of memory; expected one such as 4GiB"):
        parse_size(text)


def test_a_budget_counts_what_is_used_already():
    device = torch.device("cpu")
    used = used_memory(device)
    assert used > 10 * 2**20
    assert 0.6 * 2**30 < working_memory(device, used + 2**30) < 2**30
    assert working_memory(device, None) > 2**20


def test_what_was_freed_does_not_count_against_the_budget():
    reuse_freed_memory()
    budget = used_memory(torch.device("cpu")) + 400 * 2**20
    before = working_memory(torch.device("cpu"), budget)
    held = [torch.ones(2**16) for _ in range(800)]
    assert working_memory(torch.device("cpu"), budget) < before - 100 * 2**20
    del held
    assert working_memory(torch.device("cpu"), budget) > before - 20 * 2**20


def test_work_in_chunks_covers_everything_once():
    seen: list[int] = []
    in_chunks(7, 3, lambda part: seen.extend(range(7)[part]))
    assert seen == list(range(7))
