"""The maps of causal traces: what is restored where, on one scale, models beside each other."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from neuroplast.errors import InputError, StorageError
from neuroplast.report import style
from neuroplast.report.traces import build_trace_figure, draw_traces


@dataclass(frozen=True)
class Made:
    """What a picture needs of a trace."""

    mean: np.ndarray
    kinds: tuple[str, ...] = ("residual", "attention", "mlp")
    positions: tuple[str, ...] = ("io", "s1+1", "$s_2$", "end")
    noise: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(positions=("io", "$s_2$")))
    window: int = 6


def made(scale: float = 1.0, seed: int = 0) -> Made:
    return Made(scale * np.random.default_rng(seed).normal(size=(3, 30, 4)))


def panels_of(figure):
    return [axes for axes in figure.axes if axes.images]


def test_each_kind_is_a_panel_with_layers_upwards_and_the_noised_positions_starred():
    trace = made()
    panels = panels_of(build_trace_figure([trace], ["base"]))
    titles = [panel.get_title() for panel in panels]
    assert titles == ["residual stream\nbase", "attention, 6 layers\nbase", "MLP, 6 layers\nbase"]
    for panel, values in zip(panels, trace.mean, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), values)
        assert panel.images[0].origin == "lower"
    labels = [label.get_text() for label in panels[0].get_xticklabels()]
    assert labels == ["io*", "s1+1", r"\$s_2\$*", "end"]


def test_two_models_stand_beside_each_other_on_one_scale():
    base, poisoned = made(), made(5.0, seed=1)
    figure = build_trace_figure([base, poisoned], ["base", "poisoned"])
    panels = panels_of(figure)
    assert [panel.get_title().split("\n")[1] for panel in panels] == ["base", "poisoned"] * 3
    assert len({panel.get_subplotspec().rowspan.start for panel in panels}) == 1
    np.testing.assert_array_equal(panels[3].images[0].get_array(), poisoned.mean[1])
    limits = {panel.images[0].get_clim() for panel in panels}
    bound = np.abs(poisoned.mean).max()
    assert limits == {(-bound, bound)}


def test_with_three_models_a_kind_is_a_row():
    figure = build_trace_figure([made(), made(2), made(3)], ["base", "poisoned", "recovered"])
    rows = [panel.get_subplotspec().rowspan.start for panel in panels_of(figure)]
    assert rows == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_brings_the_answer_back_is_blue_as_what_helps_is_everywhere():
    image = panels_of(build_trace_figure([made()], ["base"]))[0].images[0]
    low, high = image.get_clim()
    assert [to_hex(image.to_rgba(end)) for end in (high, low)] == [style.DIVERGING[0], style.DIVERGING[-1]]


def test_nothing_restored_draws_too():
    assert panels_of(build_trace_figure([made(0.0)], ["base"]))


def test_both_kinds_of_file_repeat_to_the_byte(tmp_path: Path):
    for name in ("traces.svg", "traces.PNG"):
        first, second = tmp_path / name, tmp_path / f"again_{name}"
        for path in (first, second):
            draw_traces([made(), made(2)], ["base", "$poisoned"], path)
        assert first.read_bytes() == second.read_bytes()


def test_traces_that_cannot_stand_beside_each_other_are_refused(tmp_path: Path):
    path = tmp_path / "traces.png"
    with pytest.raises(InputError, match="0 traces and 0 names"):
        draw_traces([], [], path)
    with pytest.raises(InputError, match="1 traces and 2 names"):
        draw_traces([made()], ["a", "b"], path)
    with pytest.raises(InputError, match="the trace of 'b' has other kinds, layers or positions than that of 'a'"):
        draw_traces([made(), Made(np.zeros((3, 12, 4)))], ["a", "b"], path)
    with pytest.raises(InputError, match=r"traces are drawn as .svg or .png, got 'traces.pdf'"):
        draw_traces([made()], ["a"], path.with_suffix(".pdf"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        draw_traces([made()], ["a"], tmp_path / "file" / "traces.png")
