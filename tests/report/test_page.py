"""The page: complete in itself, safe with any name, one colour scale, the same bytes every time."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from safetensors.numpy import load_file, save_file

from html_page import Page
from neuroplast.circuits.circuit import Circuit, Role, Shape
from neuroplast.components import parse_edge, parse_node
from neuroplast.errors import InputError
from neuroplast.report import write_report
from neuroplast.report.results import Estimate, HeadEffects
from neuroplast.report.timeline import Moment, TimelineWay, strengths
from neuroplast.storage import load_jsonl
from synthetic_run import (
    EDGES,
    HOSTILE,
    LADDER,
    N_HEADS,
    N_LAYERS,
    NODES,
    ON_PROMPTS,
    POISON,
    TOKENS,
    judged,
)

MAX_BYTES = 8_000_000
LOADING = {"src", "srcset", "href", "data", "poster", "action", "background", "formaction"}


def own_part(html: str) -> str:
    """The page without plotly.js, which names addresses that it never asks for here."""
    library = get_plotlyjs()
    assert html.count(library) == 1
    return html.replace(library, "")


@pytest.fixture
def html(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def test_the_page_is_under_its_size_and_beside_figures_and_tables(run: Path) -> None:
    page = write_report(run)
    assert page == run / "report.html"
    assert page.stat().st_size < MAX_BYTES
    drawings = ("head_effects", "logit_diff_by_stage", "logit_diff_over_training")
    names = [f"{name}.{end}" for name in drawings for end in ("png", "svg")]
    stages = ("base", "poisoned-subject_duplication", "recovered-subject_duplication")
    names += [f"circuit-{stage}.{end}" for stage in stages for end in ("png", "svg")]
    names += [f"trajectory-recovered-subject_duplication.{end}" for end in ("png", "svg")]
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(names)
    starts = {"png": b"\x89PNG", "svg": b"<?xml"}
    assert all((run / "figures" / name).read_bytes().startswith(starts[name[-3:]]) for name in names)


def test_hostile_names_stay_text(html: str) -> None:
    page = Page(html)
    assert page.count("script") == 7, "plotly.js, five stores, our own"
    assert page.count("img") == 1, "of the way"
    assert (page.count("b"), page.count("i")) == (5, 0), "the story's numbers are bold, nothing else is"
    assert "</script><script>alert" not in html
    assert '</script><script>alert("x")</script><img src=x onerror=alert(1)>' in "".join(page.text)
    assert "</code></pre><b>bold</b>" not in html


def test_hostile_poison_names_stay_text_in_charts(make_run: Callable[..., Path]) -> None:
    poison = "</script><b>%{x}$"
    html = write_report(make_run(poisons=(poison.replace("/", "-"),))).read_text(encoding="utf-8")
    titles = [note["text"] for note in Page(html).document("charts")["heads-0"]["layout"]["annotations"]]
    assert titles[2] == "poisoned<br>&lt;-script&gt;&lt;b&gt;%{x}$"


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    own = own_part(html)
    page = Page(own)
    targets = [(a, v or "") for _, attributes in page.elements for a, v in attributes.items() if a in LOADING]
    pictures = [value for name, value in targets if name == "src"]
    assert len(pictures) == 1 and all(value.startswith("data:image/svg+xml;base64,") for value in pictures)
    links = {value for name, value in targets if name != "src"}
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"data:,", "#main", "#restoration"} < links
    assert all(value.removeprefix("#") in ids for value in links - {"data:,"}), "every link leads somewhere"
    own = own.replace("http://www.w3.org/2000/svg", "")  # the name of a vocabulary, not an address
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", own)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_all_heat_maps_share_one_scale_around_zero_and_one_bar(html: str) -> None:
    chart = Page(html).document("charts")["heads-0"]
    assert len(chart["data"]) == 5
    assert {trace["coloraxis"] for trace in chart["data"]} == {"coloraxis"}
    assert not any(key in trace for trace in chart["data"] for key in ("zmin", "zmax", "colorscale", "colorbar"))
    axis = chart["layout"]["coloraxis"]
    assert [key for key in chart["layout"] if key.startswith("coloraxis")] == ["coloraxis"]
    largest = max(abs(value) for trace in chart["data"] for row in trace["z"] for value in row)
    assert (axis["cmin"], axis["cmid"], axis["cmax"]) == (-largest, 0, largest)


def test_seeds_share_the_scale_too(make_run: Callable[..., Path]) -> None:
    charts = Page(write_report(make_run(seeds=3)).read_text(encoding="utf-8")).document("charts")
    assert {"heads-0", "heads-1", "heads-2"} < set(charts)
    bounds = {charts[f"heads-{seed}"]["layout"]["coloraxis"]["cmax"] for seed in range(3)}
    assert len(bounds) == 1


def test_hovering_shows_the_head_and_its_interval(html: str) -> None:
    base = Page(html).document("charts")["heads-0"]["data"][0]
    assert base["customdata"][23][3] == ["a23.h3", "[−3.287, −2.653]"]


def test_every_table_has_a_caption_and_every_scroller_takes_the_keyboard(html: str) -> None:
    page = Page(html)
    assert page.count("table") == page.count("caption") > 4
    scrollers = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert scrollers
    assert all(s["tabindex"] == "0" and s["role"] == "region" and s["aria-label"] for s in scrollers)
    assert page.count("main") == page.count("h1") == 1


def test_reasons_verdicts_and_the_story_are_on_the_page(html: str) -> None:
    text = " ".join("".join(Page(own_part(html)).text).split())
    assert "The logit difference is 4.19 at base and 11.30 after clean fine-tuning." in text
    assert "Subject duplication takes it to −10.10; 40 clean steps bring it to 2.14" in text
    assert "circuits were not discovered in this preset" in text
    for verdict in ("supported", "not supported", "undecided"):
        assert f" {verdict} " in text


def visible(html: str) -> str:
    return " ".join("".join(Page(own_part(html)).text).split())


def section(html: str, name: str) -> str:
    """One section of the page, as HTML."""
    return html.split(f'<section aria-labelledby="{name}">')[1].split("</section>")[0]


def cells(html: str, row: str) -> list[str]:
    """The texts of the first table row that names `row`."""
    found = next(part for part in html.split("<tr>") if row in part).split("</tr>")[0]
    return [" ".join("".join(Page(cell).text).split()) for cell in re.split(r"<t[hd][^>]*>", found)[1:]]


def test_the_criteria_of_every_circuit_stand_in_one_table(html: str) -> None:
    table = section(html, "circuits").split("</table>")[0]
    base = cells(table, '"stage-id">base')
    assert base[1:3] == ["30.6 %3 edges", "4.19[3.94, 4.44]"]
    poisoned = cells(table, '"stage-id">poisoned')
    recovered = cells(table, '"stage-id">recovered')
    assert poisoned[5] == "–" and "undefined: the interval of F(M) includes 0" in table
    assert poisoned[6].startswith("0.11 logits") and "logits" not in base[6]
    assert base[5].startswith("1.04") and base[6] == "0.110.37 at most50 drawn"
    assert base[7].startswith("0.51") and base[8] == "0.0040[−0.2460, 0.2540]2 of 3 pass"
    assert base[9] == "0.77[0.57, 0.94]" and base[10] == ""
    assert recovered[10].startswith("0.95")
    assert "tuned" not in table and "control" not in table


def test_methodology_warnings_and_reasons_stand_beside_the_criteria(html: str) -> None:
    text = visible(html)
    assert "How: nodes are heads; mean-by-position <of> 60 counterfactuals (abc); 64 prompts." in text
    assert text.count("above 1: <b>the circuit</b> leaves out what works against it") == 3
    assert "No circuit of tuned, control/equal_steps: circuits were not discovered in this preset." in text


def test_the_overlap_stands_beside_the_noise_floor(html: str) -> None:
    table = section(html, "circuits").split("<h3>Beside")[1].split("</table>")[0]
    recovered = cells(table, '"stage-id">recovered')
    assert recovered[1:] == ["0.67", "0.77", "0.54", "0.67", "0.81", "0.95[0.70, 1.21]", "0.88[0.62, 1.12]"]


def test_a_circuits_nodes_are_listed_by_strength_with_role_and_stability(html: str) -> None:
    table = section(html, "circuits").split("Nodes of the circuit of base")[1].split("</table>")[0]
    assert re.findall(r"<code>(.*?)</code>", table) == ["a23.h3@end", "a24.h4@end", "a20.h0@s2"]
    mover = cells(table, "a23.h3@end")
    assert mover[1] == "−2.970" and mover[2] == "62 %"
    assert mover[3].startswith("name mover <i> </script>")
    assert cells(table, "a24.h4@end")[1:] == ["1.310", "–", "–"]


def test_a_circuit_on_the_page_has_a_box_a_node_and_a_line_an_edge(html: str) -> None:
    elements = Page(html).elements
    figures = [attributes["data-stage"] for _, attributes in elements if "data-stage" in attributes]
    assert figures == ["base", "poisoned/subject_duplication", "recovered/subject_duplication"]
    begin = html.index('data-stage="base"')
    figure = Page(html[begin : html.index('<div class="inspector"', begin)]).elements
    boxes = {a["data-node"]: a for _, a in figure if a.get("data-part") == "true"}
    assert set(boxes) == set(NODES)
    mover = boxes["a23.h3@end"]
    assert (mover["data-role"], mover["data-score"]) == ("name mover <i>", "−2.97")
    assert mover["tabindex"] == "0" and mover["role"] == "button" and "score −2.97" in (mover["aria-label"] or "")
    lines = {(a["data-edge"] or "").partition("  ")[0]: a for tag, a in figure if tag == "path"}
    assert set(lines) == set(EDGES)
    assert lines["a24.h4@end->logits@end"]["class"] == "edge hinders"
    assert lines["a20.h0@s2->a23.h3<v>@s2"]["data-source"] == "a20.h0@s2"


def test_the_timeline_goes_from_base_through_breaking_to_healing(html: str) -> None:
    data = Page(html).document("timeline-data")
    assert [way["name"] for way in data["ways"]] == ["subject duplication and recovery", "tuned", "equal steps"]
    way = data["ways"][0]
    moments = way["moments"]
    assert [(m["kind"], m["step"], m["at"]) for m in moments] == [
        *[("base", 0, 0), ("poisoned", 1, 1), ("poisoned", 4, 4), ("poisoned", 40, 40)],
        *[("recovered", 1, 41), ("recovered", 4, 44), ("recovered", 40, 80)],
    ]
    assert moments[3]["ld"][0] == LADDER["poisoned"] and moments[0]["ld"][0] == LADDER["base"]
    flipped = 23 * N_HEADS + 3
    base, poisoned = (m["effects"][flipped] / 1000 * data["bound"] for m in (moments[0], moments[3]))
    assert (base, poisoned) == pytest.approx((-2.97, 4.4), abs=0.01)
    strengths = way["strengths"]["a23.h3@end"]
    assert strengths[0] == 1 and strengths[3] == pytest.approx(4.4 / -2.97, abs=0.001), "it works the other way round"
    assert set(way["strengths"]["a20.h0@s2"]) == {None}, "it has no role, so nothing was measured of it"
    rungs = data["ways"][1]["moments"]
    assert [(m["kind"], m["step"]) for m in rungs] == [("base", 0), ("tuned", 20), ("tuned", 40)], "not followed: rungs"


def test_heads_have_their_history_and_their_attention(html: str) -> None:
    data = Page(html).document("looks-data")
    stages = [stage["id"] for stage in data["stages"]]
    assert stages[0] == "base" and len(stages) == 5
    assert data["effects"]["a23.h3"][stages.index("poisoned/subject_duplication")][0] == 4.4
    assert data["looks"]["a23.h3@end"][0]["attention"]["io"] == [0.625, 0.375, 0.875]
    assert data["looks"]["a23.h3@end"][0]["attention"]["own token"] is None
    triangle = list(base64.b64decode(data["patterns"][0]["a23.h3"][0]))
    assert len(triangle) == 5 * 6 // 2 and triangle[:3] == [255, 128, 128]
    assert data["tokens"] == TOKENS


def test_prompts_have_their_numbers_and_the_effects_of_every_head(reported: Path, html: str) -> None:
    data = Page(html).document("prompts-data")
    poisoned = next(stage for stage in data["stages"] if stage["kind"] == "poisoned")
    assert poisoned["ld"] == pytest.approx([LADDER["poisoned"] + each for each in ON_PROMPTS], abs=1e-3)
    effects = np.frombuffer(base64.b64decode(poisoned["effects"]), "<i2").reshape(3, N_LAYERS, N_HEADS)
    saved = load_file(reported / f"stages/poisoned/{POISON}/effects.safetensors")["effects"]
    np.testing.assert_allclose(effects / 32767 * data["bound"], saved.transpose(2, 0, 1), atol=1e-3)
    assert data["prompts"][1][0] == HOSTILE


def test_what_has_no_room_on_the_page_is_left_out_and_not_cut(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroplast.report.prompts.MOST_BYTES", 5000)
    monkeypatch.setattr("neuroplast.report.looks.MOST_BYTES", 200)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    effects = [stage["effects"] for stage in page.document("prompts-data")["stages"]]
    assert [each is not None for each in effects] == [True, True, False, False, False]
    patterns = page.document("looks-data")["patterns"]
    assert patterns[0] is not None and patterns[-1] is None


def test_a_run_of_an_earlier_version_has_a_page_without_what_it_did_not_keep(run: Path) -> None:
    for name in ("heads.json", "patterns.safetensors", "trajectory.json"):
        for path in run.rglob(name):
            path.unlink()
    (run / "prompts/measured.jsonl").unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.document("looks-data")["looks"] == {}
    ids = [attributes.get("id") for _, attributes in page.elements]
    assert "prompts" not in ids and "timeline" in ids, "the stages themselves are moments"
    assert page.document("timeline-data")["ways"][0]["moments"][0]["kind"] == "base"


def damage(run: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes one file of a run: a JSON document, lines of it, or tensors."""
    path = run / name
    if path.suffix == ".safetensors":
        save_file(change(load_file(path)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in change(load_jsonl(path))))
    else:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))


STEP = f"stages/poisoned/{POISON}/trajectory/step-000004.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("prompts/measured.jsonl", lambda rows: rows[:1], r"expected logit_diff of 1, got \[3\]"),
        ("stages/base/heads.json", lambda d: d["heads"].update(weird={}), "base/heads.json: .*weird"),
        ("stages/base/heads.json", lambda d: d["heads"].update({"a99.h0@s2": {}}), "expected a head of 30 layers"),
        ("stages/base/heads.json", lambda d: d["tokens"][0].extend("abc"), "expected a20.h0 of 3 x 8 x 8"),
        ("stages/base/heads.json", lambda d: d["positions"].update(end=[4, 2]), "a token of each shown prompt"),
        ("stages/base/heads.json", lambda d: d["positions"].update(end=[4, 2, 99]), "a token of each shown prompt"),
        ("stages/base/patterns.safetensors", lambda t: {"a20.h0": t["a20.h0"]}, "has no a23.h3"),
        ("stages/base/patterns.safetensors", lambda t: {k: v[:, :2] for k, v in t.items()}, "expected a20.h0 of 3 x 5"),
        (
            "stages/base/effects.safetensors",
            lambda t: t | {"effects": t["effects"][:3]},
            "expected effects of 30 x 9 x 3",
        ),
        ("stages/base/effects.safetensors", lambda t: {"effects": t["effects"]}, "has no logit_diff"),
        (STEP, lambda t: {"other": t["effects"]}, "step-000004.safetensors has no effects"),
        (STEP, lambda t: {"effects": t["effects"][0]}, "expected effects of 30 x 9 x any"),
        (STEP, lambda t: {"effects": t["effects"] * np.float32(np.nan)}, "not finite"),
        (
            f"stages/poisoned/{POISON}/trajectory.json",
            lambda d: d["points"][0].update(logit_diff=judged(None, "x")),
            r"points\[0\]: expected a logit difference",
        ),
    ],
)
def test_a_damaged_file_is_told_by_its_name_with_what_to_do(
    run: Path, name: str, change: Callable[[Any], Any], said: str
) -> None:
    damage(run, name, change)
    with pytest.raises(InputError, match=f"(?s){said}.*run the same study command again"):
        write_report(run)


def test_a_way_without_its_first_step_is_told_by_its_stages(run: Path) -> None:
    damage(run, f"stages/poisoned/{POISON}/trajectory.json", lambda d: d["points"].pop(0))
    moments = Page(write_report(run).read_text(encoding="utf-8")).document("timeline-data")["ways"][0]["moments"]
    assert [(m["kind"], m["step"]) for m in moments[:2]] == [("base", 0), ("poisoned", 20)]


def test_fewer_prompts_are_shown_before_stages_go_without(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroplast.report.looks.MOST_BYTES", 430)
    data = Page(write_report(run).read_text(encoding="utf-8")).document("looks-data")
    assert len(data["tokens"]) == 2 and all(each and len(each["a23.h3"]) == 2 for each in data["patterns"])


def test_a_strength_is_a_share_of_one_that_is_there() -> None:
    nodes = dict.fromkeys(map(parse_node, ("a1.h0@end", "a1.h1@end", "a0.h0@s2", "a0.h1@s2")), -1.0)
    edges = {parse_edge(f"{name}->logits@end"): -1.0 for name in ("a1.h0@end", "a1.h1@end")}
    roles = {parse_node("a0.h0@s2"): Role("induction", ""), parse_node("a0.h1@s2"): Role("duplicate token", "")}
    circuit = Circuit(Shape("x", 2, 2, 8), nodes, dict(edges), roles=roles)
    mean, low, high = ((0.0, 0.0), (-2.0, 0.5)), ((0.0, 0.0), (-3.0, -0.1)), ((0.0, 0.0), (-1.0, 1.1))
    base = SimpleNamespace(effects=HeadEffects(mean, low, high))

    def moment(first: float, second: float, induction: Estimate, duplicate: Estimate) -> Moment:
        totals = {"induction": induction, "duplicate token": duplicate}
        effects = ((0.0, 0.0), (first, second))
        return Moment("s", "poisoned", 0, 0, Estimate(1.0), None, Estimate(1.0), effects, totals)

    apart, not_apart = Estimate(0.8, (0.5, 1.1)), Estimate(0.8, (-0.1, 1.7))
    way = TimelineWay("x", 0, (moment(-2.0, 0.5, apart, not_apart), moment(1.0, 0.5, Estimate(0.2), Estimate(0.4))), 4)
    found = strengths(way, circuit, base)  # pyright: ignore[reportArgumentType]
    assert found["a1.h0@end"] == [1, -0.5], "half as strong, the other way round"
    assert found["a1.h1@end"] == [None, None], "base's interval holds 0"
    assert found["a0.h0@s2"] == [1, pytest.approx(0.25)], "its role's total"
    assert found["a0.h1@s2"] == [None, None]


def test_reasons_for_no_comparison_are_told_where_none_was_made(run: Path) -> None:
    (run / f"stages/poisoned/{POISON}/comparison.json").write_text(json.dumps({"why": "its <weights> cannot be told"}))
    html = write_report(run).read_text(encoding="utf-8")
    assert "was not compared: its <weights> cannot be told" in visible(html)


def test_restoration_has_structure_function_and_transfer(html: str) -> None:
    table = section(html, "restoration")
    structure = cells(table, ">Structure<")
    assert structure[0].endswith("base's own resamples share 0.77")
    assert structure[1] == "0.67" and structure[3] == "control: circuits were not discovered in this preset"
    assert cells(table, ">Function<")[1] == "0.95[0.70, 1.21]"
    assert cells(table, ">Transfer<")[1] == "0.88"


def test_a_run_without_circuits_has_no_such_section(make_run: Callable[..., Path]) -> None:
    run = make_run(circuits=False)
    html = write_report(run).read_text(encoding="utf-8")
    assert "circuits" not in [attributes.get("id") for _, attributes in Page(html).elements]
    assert Page(html).count("img") == 1, "that of the way"
    assert not list((run / "figures").glob("circuit*"))
    assert "Transfer" not in section(html, "restoration"), "an earlier version's run has no such row"


def test_a_stage_where_nothing_was_found_says_why_and_shows_bases_circuit(run: Path) -> None:
    folder = run / "stages/poisoned/subject_duplication"
    saved = json.loads((folder / "measures.json").read_text())
    saved["why"], saved["similarity_to_base"]["nodes_jaccard"] = {"circuit": "no head <passes>"}, None
    (folder / "measures.json").write_text(json.dumps(saved))
    judged = json.loads((folder / "criteria.json").read_text())
    del judged["evaluation"]
    (folder / "criteria.json").write_text(json.dumps(judged))
    (folder / "circuit.json").unlink()
    html = write_report(run).read_text(encoding="utf-8")
    found = cells(section(html, "circuits"), '"stage-id">poisoned')
    assert found[1] == "none of its own" and found[2].startswith("0.95")
    assert "No circuit of poisoned/subject_duplication: no head <passes>." in visible(html)


def test_many_circuits_fold_away_and_the_page_draws_only_some(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuroplast.report.page.SHOWN_CIRCUITS", 1)
    monkeypatch.setattr("neuroplast.report.page.DRAWN_CIRCUITS", 2)
    html = write_report(make_run()).read_text(encoding="utf-8")
    assert html.count('<div class="graph-figure"') == 2
    assert "Drawn in <code>figures/circuit-recovered-subject_duplication.svg</code>" in html
    folded = section(html, "circuits").split("Circuits of the other stages")[1]
    assert "Circuit of poisoned/subject_duplication" in folded and "Circuit of base" not in folded


def test_without_flips_the_page_says_so(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run(poisons=())).read_text(encoding="utf-8")
    assert "No head flipped sign against base in any stage." in page


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_half_written(run: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

    write_report(run)
    once = everything()
    write_report(run)
    assert everything() == once
    assert not [name for name in once if name.endswith(".partial")]


def test_of_several_seeds_and_poisons_the_page_says_which_it_tells_of(make_run: Callable[..., Path]) -> None:
    html = write_report(make_run(seeds=2, poisons=(POISON, "name_moving"))).read_text(encoding="utf-8")
    said = visible(html)
    assert "Seed 0: the logit difference is 4.19 at base" in said
    assert "Of 2 poisons it moves the logit difference most." in said
    tiles = html[html.index('class="path"') : html.index("</ol>")]
    assert tiles.count("<li") == 7, "base, tuned, two poisons, two recoveries, the control"
    assert "Two seeds have no mean with an interval" in said
