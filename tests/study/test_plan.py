from pathlib import Path

import pytest

from neuroplast.errors import InputError
from neuroplast.study.plan import PRESETS, build_config, build_plan, load_config


def ids(**settings: object) -> list[str]:
    return [stage.id for stage in build_plan(build_config("quick", settings))]


def test_the_quick_study_has_five_stages_in_an_order_that_can_be_run():
    assert ids() == [
        "base",
        "tuned",
        "control/equal_steps",
        "poisoned/subject_duplication",
        "recovered/subject_duplication",
    ]


def test_every_parent_and_control_comes_first_whatever_the_seeds_and_poisons():
    plan = build_plan(build_config("paper"))
    seen: set[str] = set()
    for stage in plan:
        assert stage.parent is None or stage.parent in seen
        assert stage.control is None or stage.control in seen
        seen.add(stage.id)
    assert len(seen) == len(plan) == 1 + 3 * (4 + 2 * 3)
    assert "seed1/recovered/name_moving" in seen


def test_the_control_takes_as_many_steps_as_the_recovery():
    plan = {stage.id: stage for stage in build_plan(build_config("quick", {"recover_steps": 17, "tune_steps": 3}))}
    assert plan["control/equal_steps"].points[-1].step == plan["recovered/subject_duplication"].points[-1].step == 17


def test_more_controls_start_from_base_and_take_the_steps_of_what_they_control():
    config = build_config("quick", {"more_controls": ["reseeded", "shuffled_labels"], "recover_steps": 7})
    plan = {stage.id: stage for stage in build_plan(config)}
    for name, steps in {"equal_steps": 7, "reseeded": 7, "shuffled_labels": 40}.items():
        stage = plan[f"control/{name}"]
        assert (stage.parent, stage.recipe, stage.points[-1].step) == ("base", name, steps)
    assert plan["recovered/subject_duplication"].control == "control/equal_steps"
    with pytest.raises(InputError, match="more_controls"):
        build_config("quick", {"more_controls": ["reseeded", "reseeded"]})
    with pytest.raises(InputError, match="more_controls"):
        build_config("quick", {"more_controls": ["equal_steps"]})


def test_a_ladder_measures_every_rung_and_ends_in_the_stages_own_folder():
    config = build_config("quick", {"epochs": [1, 3, 10], "n_train": 100, "batch_size": 16})
    tuned = build_plan(config)[1]
    assert [(point.epoch, point.step, point.folder) for point in tuned.points] == [
        (1.0, 7, "stages/tuned/epoch-1"),
        (3.0, 19, "stages/tuned/epoch-3"),
        (10.0, 63, "stages/tuned"),
    ]


def test_later_settings_win_and_every_knob_can_be_set():
    config = build_config("smoke", {"n_prompts": 20}, {"n_prompts": 30}, assignments=["rate=0.5", "schedule=cosine"])
    assert (config.n_prompts, config.rate, config.schedule) == (30, 0.5, "cosine")
    assert build_config("quick", assignments=["seeds=[1, 2]"]).seeds == [1, 2]
    assert build_config("quick", {"preset": "smoke"}).tune_steps == PRESETS["smoke"]["tune_steps"]


def test_a_models_own_learning_rate_yields_to_a_given_one():
    assert build_config("quick").learning_rate == 3e-4
    assert build_config("quick", {"model": "smollm2-135m"}).learning_rate == 1e-5
    assert build_config("quick", assignments=["learning_rate=2e-5"]).learning_rate == 2e-5


def test_settings_come_back_from_toml(tmp_path: Path):
    config = build_config("paper", {"model": 'naïve "folder"'})
    (tmp_path / "study.toml").write_text(config.toml(), encoding="utf-8")
    assert build_config("quick", load_config(tmp_path / "study.toml")) == config


def test_a_preset_is_not_laid_over_the_settings_of_another():
    resolved = build_config("smoke").model_dump()
    assert build_config("quick", resolved, {"preset": "smoke"}).tune_steps == PRESETS["smoke"]["tune_steps"]
    with pytest.raises(InputError, match="preset 'paper' cannot be laid over settings that come from preset 'smoke'"):
        build_config("quick", resolved, {"preset": "paper"})


def test_another_model_does_not_inherit_the_formers_learning_rate_but_a_chosen_one():
    of_tiny = build_config("quick").model_dump()
    assert build_config("quick", of_tiny, {"model": "smollm2-135m"}).learning_rate == 1e-5
    chosen = of_tiny | {"learning_rate": 7e-5}
    assert build_config("quick", chosen, {"model": "smollm2-135m"}).learning_rate == 7e-5


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rat=1", "unknown key 'learning_rat': did you mean 'learning_rate'"),
        ("task=ioo", "unknown task 'ioo': did you mean 'ioi'"),
        ('poisons=["subject_duplicatoin"]', "unknown poison 'subject_duplicatoin': did you mean 'subject_duplication'"),
        ("preset=quik", "unknown preset 'quik': did you mean 'quick'"),
        ("counterfactual=abd", "unknown counterfactual 'abd': did you mean 'abc'"),
        ("rate=1.5", "rate = 1.5: Input should be less than or equal to 1"),
        ("rate=-0.1", "rate = -0.1: Input should be greater than or equal to 0"),
        ("preset=nan", "unknown preset 'nan'"),
        ("seeds=" + "[" * 5000, "seeds = '[[["),
        ("rate=nan", "rate = 'nan'"),
        ("n_prompts=0", "n_prompts = 0: Input should be greater than or equal to 2"),
        ("seeds=[0, 0]", "each may be named once"),
        ("epochs=[3, 1]", "must rise"),
        ("seeds=[1, 0]", "must rise"),
        ("model=[1]", "model = [1]"),
        ("resamples=1000000000000", "resamples = 1000000000000"),
        ("poisons=[]", "poisons"),
        ("tune_steps", "--set takes key=value, got 'tune_steps'"),
        ("tune_steps=many", "tune_steps = 'many'"),
        ("n_prompts=true", "n_prompts = True"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(assignment: str, message: str):
    with pytest.raises(InputError) as caught:
        build_config("quick", assignments=[assignment])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_settings_file_is_a_clear_error(tmp_path: Path):
    (tmp_path / "x.toml").write_text("a = [")
    with pytest.raises(InputError, match="as TOML"):
        load_config(tmp_path / "x.toml")
    with pytest.raises(InputError, match="could not read"):
        load_config(tmp_path / "none.toml")


def test_poisons_and_counterfactual_are_the_tasks_own_unless_given():
    config = build_config("quick", {"task": "greater_than"})
    assert (config.poisons, config.counterfactual) == (["not_greater"], "year_01")
    assert build_config("paper", {"task": "greater_than"}).poisons == ["not_greater"]
    assert build_config("paper").poisons == ["subject_duplication", "name_moving", "duplication"]
    with pytest.raises(InputError, match="made for ioi, not for task 'greater_than'; use one of not_greater"):
        build_config("quick", {"task": "greater_than", "poisons": ["name_moving"]})
