"""A stage and its circuit opened in other libraries give there the numbers that they give here."""

import json
import re
from pathlib import Path

import pytest
import torch

from neuroplast.circuits.files import load_circuit
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.sources import load_model
from neuroplast.tasks import build_prompt_set, load_records

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["base", "llama"])
def stage(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def opened(stage):
    """The same files, opened here."""
    model = load_model(stage.checkpoint)
    return model, build_prompt_set(model.tokenizer, "ioi", load_records(stage.prompts))


def test_a_circuit_alone_does_as_much_in_transformer_lens_as_here(stage):
    import open_in_transformer_lens

    whole, alone = open_in_transformer_lens.measure(stage.checkpoint, stage.circuit, stage.prompts)
    model, prompts = opened(stage)
    ablation, circuit = build_ablation(model, prompts, "counterfactual"), load_circuit(stage.circuit).heads
    ours = run_knockouts(model, prompts, [circuit, ()], ablation, keep=True).mean(dim=1)
    assert whole == pytest.approx(float(run_knockouts(model, prompts, [()], ablation).mean()), abs=1e-4)
    assert alone == pytest.approx(float(ours[0]), abs=1e-4)
    assert min(abs(alone - whole), abs(alone - float(ours[1]))) > 1e-2


def test_transformer_lens_prints_what_the_study_wrote(base, capsys: pytest.CaptureFixture[str]):
    import open_in_transformer_lens

    open_in_transformer_lens.main([str(base.checkpoint), str(base.circuit), str(base.prompts)])
    found = json.loads((base.circuit.parent / "criteria.json").read_text())["evaluation"]
    written = [found["F"]["model"]["value"], found["by_ablation"]["counterfactual"]["circuit"]["value"]]
    printed = capsys.readouterr().out.splitlines()[-1]
    assert [float(number) for number in re.findall(r"-?\d+\.\d+", printed)] == pytest.approx(written, abs=1e-3)


@pytest.mark.parametrize("name", ["a0.h1", "a2.h3"])
def test_a_patched_head_changes_as_much_in_nnsight_as_here(stage, name: str):
    import open_in_nnsight

    changes = torch.tensor(open_in_nnsight.measure(stage.checkpoint, stage.prompts, name))
    model, prompts = opened(stage)
    ours = activation_patch(model, prompts, sites=f"{name}@end").effects[0]
    torch.testing.assert_close(changes, ours, atol=1e-4, rtol=0)
    assert ours.abs().max() > 1e-2


def test_nnsight_prints_the_mean_and_refuses_what_is_no_head(base, capsys: pytest.CaptureFixture[str]):
    import open_in_nnsight

    words = [str(base.checkpoint), str(base.prompts), "--head"]
    open_in_nnsight.main([*words, "a3.h4"])
    model, prompts = opened(base)
    mean = float(activation_patch(model, prompts, sites="a3.h4@end").effects.mean())
    assert capsys.readouterr().out.splitlines()[-1] == f"a3.h4 at END: {mean:+.4f} logits when patched, 12 prompts"
    with pytest.raises(SystemExit, match="'m3' is no head"):
        open_in_nnsight.main([*words, "m3"])


def test_the_examples_need_no_neuroplast():
    for path in (Path(__file__).parents[2] / "examples").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.startswith(("import neuroplast", "from neuroplast"))]
        assert len(lines) < 80
