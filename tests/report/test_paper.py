import json
from collections.abc import Callable
from pathlib import Path

from neuroplast.report.paper import Table, cross_model_table, heads_table, ladder_table, latex_text, write_paper_tables
from neuroplast.report.reading import load_results


def test_the_ladder_has_a_row_for_every_measured_point(reported: Path):
    results = load_results(reported)
    table = ladder_table(results)
    assert len(table.rows) == len(results.points) and "published" not in table.header
    rows = {(row[0], row[2]): row for row in table.rows}
    base = rows["base", "0"]
    assert base[3].startswith("4.19 [") and base[5].startswith("1.04 [") and base[6].endswith("%")
    assert rows["recovered/subject_duplication", "40"][9] == "0.94 [0.90, 0.96]"
    assert rows["recovered/subject_duplication", "40"][7].startswith("0.95 ["), "base's circuit in the recovered model"
    assert rows["tuned", "40"][4:7] == ("–", "–", "–"), "no circuit was looked for there"
    assert rows["poisoned/subject_duplication", "40"][3].startswith("−10.10")


def test_published_figures_stand_beside_gpt2_only_and_where_they_belong(make_run: Callable[..., Path]):
    table = ladder_table(load_results(make_run(model="gpt2")))
    assert table.header[-1] == "published"
    beside = {row[0]: row[-1] for row in table.rows}
    assert beside["recovered/subject_duplication"] == "faithfulness 96 %" and beside["base"] == "–"
    (first,) = [row[-1] for row in table.rows if row[0] == "tuned" and row[1] == "1"]
    assert first == "LD 6.32; sparsity 1.92 %"


def test_heads_that_flipped_are_told_with_both_effects(reported: Path):
    table = heads_table(load_results(reported))
    assert ("poisoned/subject_duplication", "a23.h3") in {row[:2] for row in table.rows}
    (row,) = [row for row in table.rows if row[:2] == ("poisoned/subject_duplication", "a24.h4")]
    assert not row[2].startswith("−") and row[3].startswith("−")


def test_every_table_comes_in_three_forms_that_hold_hostile_text(reported: Path):
    for name in ("paper_ladder", "paper_heads"):
        csv, markdown, latex = ((reported / "tables" / f"{name}{end}").read_text() for end in (".csv", ".md", ".tex"))
        n_rows = csv.count("\n") - 1
        assert markdown.count("\n|") == n_rows + 2 and latex.count(r" \\") == n_rows + 1
    table = Table("x", "a_b", ("one|two",), (("50 % & $x_1$ ~^ {} \\",),))
    assert "one\\|two" in table.markdown()
    assert r"50 \% \& \$x\_1\$ \textasciitilde{}\textasciicircum{} \{\} \textbackslash{}" in table.latex()
    assert latex_text("−1.2") == "$-$1.2"


def test_cross_model_patching_is_told_of_compared_stages(make_run: Callable[..., Path]):
    run = make_run()
    assert cross_model_table(run, load_results(run)).rows == ()
    part = {"name": "a29.h1", "undoes": {"value": 4.1, "ci95": [3.0, 5.0]}, "brings": {"value": -3.87, "ci95": None}}
    compared = run / "stages/poisoned/subject_duplication/comparison.json"
    compared.write_text(json.dumps({"expressed": {"parts": [part]}}), encoding="utf-8")
    table = cross_model_table(run, load_results(run))
    assert table.rows == (("poisoned/subject_duplication", "a29.h1", "4.10 [3.00, 5.00]", "−3.87"),)


def test_the_tables_ask_for_no_circuits(make_run: Callable[..., Path]):
    run = make_run(circuits=False)
    write_paper_tables(run, load_results(run))
    assert (run / "tables/paper_heads.csv").read_text().startswith("stage,head,effect in base,effect")
