"""Files of a study are read without neuroplast, and say the same."""

import pytest
import torch

from neuroplast.circuits.files import load_circuit
from neuroplast.interventions.selection import position_mask
from neuroplast.models.sources import load_model
from neuroplast.tasks import build_prompt_set, greater_than, load_records, save_records


@pytest.mark.parametrize("name", ["base", "llama"])
def test_a_circuit_read_as_plain_json_has_our_parts_edges_and_roles(request: pytest.FixtureRequest, name: str):
    from read_circuit import read_circuit

    stage = request.getfixturevalue(name)
    parts, edges, placed, roles = read_circuit(stage.circuit)
    ours = load_circuit(stage.circuit)
    assert set(parts) == {str(node.at(None)) for node in ours.nodes}
    assert set(edges) == {str(edge.anywhere()) for edge in ours.edges}
    assert set(placed) == set(map(str, ours.nodes))
    assert roles == {str(node): role.name for node, role in ours.roles.items()}


def test_what_is_read_is_printed(base, capsys: pytest.CaptureFixture[str]):
    import read_circuit

    read_circuit.main([str(base.circuit)])
    first, *lines = capsys.readouterr().out.splitlines()
    ours = load_circuit(base.circuit)
    assert first.startswith(f"{len(ours.members('heads'))} parts, {len(ours.members('edges'))} edges: a")
    assert [line.split()[0] for line in lines] == list(map(str, ours.nodes))


@pytest.mark.parametrize("task", ["ioi", "greater_than"])
def test_prompts_read_as_plain_json_have_our_tokens_and_positions(base, tmp_path, task: str):
    from read_circuit import read_prompts

    model, path = load_model("tiny"), base.prompts
    if task == "greater_than":
        path = tmp_path / "prompts.jsonl"
        save_records(path, greater_than.TASK.build_records(model.tokenizer, 6, 0))
    ours = build_prompt_set(model.tokenizer, task, load_records(path))
    rows = read_prompts(path, model.tokenizer)
    assert len(rows) == len(ours)
    for index, row in enumerate(rows):
        one = ours.pick(torch.tensor([index]))
        until = int(one.positions["end"]) + 1
        assert row.clean == one.clean[0, :until].tolist()
        assert row.counterfactual == one.counterfactual[0, :until].tolist()
        for mine, theirs in ((row.answers, one.answers), (row.foils, one.foils)):
            assert mine == [token for token in theirs[0].tolist() if token >= 0]
        assert row.positions == {name: int(at) for name, at in one.positions.items()}
        for position in (None, "other", "2", *row.positions):
            mask = position_mask(one, position)[0, :until]
            assert row.places(position) == mask.nonzero()[:, 0].tolist()
