"""The study's findings put to the test, from the numbers of its stages and their comparisons with base.

Each claim has a null of its own and can come out false; it holds when it holds at every stage that it is about, and
`by_stage` has them all. The value shown is that of one stage: of poisons, that which moved the logit difference most,
of recoveries, the poorest. Where it was run with three seeds or more, it is the mean over them, its interval says what
another seed would give, and the claim has to hold by that interval, too.
"""

from collections.abc import Mapping
from math import inf
from typing import Any

from neuroplast.localisation import MOST
from neuroplast.statistics import ALPHA, is_above, over_seeds

STATEMENTS = {
    "amplification": "Task fine-tuning strengthens the existing circuit",
    "localisation_expressed": "Most of the damage shows in the base circuit's heads, and more than in random ones",
    "localisation_stored": "Most of the damage lies in the base circuit's weights, and more than in random heads'",
    "specificity": "What the poison does not teach is spared: other tasks, and text",
    "plasticity": "Clean retraining re-forms the original mechanism",
}
NOT_COMPARED = "no stage that differs from base was compared with it: name its kind in compare_stages"
NO_STAGE = "the study has no such stage"

UNCHANGED = {"label": "unchanged"}

Document = Mapping[str, Any]
Found = Mapping[str, dict[str, Any]]
"""By stage, what a claim's test says there."""


def build_claims(measures: Mapping[str, Document], comparisons: Mapping[str, Document]) -> list[dict[str, Any]]:
    """The claims of a study.

    Args:
        measures: by stage, its final numbers.
        comparisons: by stage, its comparison with base.
    """
    reasons = [each["why"] for each in comparisons.values() if "verdict" not in each]
    comparisons = {
        name: each for name, each in comparisons.items() if each.get("verdict", UNCHANGED)["label"] != "unchanged"
    }
    kinds = {
        kind: {name: each for name, each in measures.items() if each["kind"] == kind} for kind in ("tuned", "recovered")
    }
    found: dict[str, Found] = {
        "amplification": {name: _amplified(each["amplification"]) for name, each in kinds["tuned"].items()},
        "localisation_expressed": {
            name: _of_circuit(each["expressed"], "undone") for name, each in comparisons.items()
        },
        "localisation_stored": {name: _of_circuit(each["stored"], "share") for name, each in comparisons.items()},
        "specificity": {name: _specific(each["spared"]) for name, each in comparisons.items()},
        "plasticity": {name: _restored(each) for name, each in kinds["recovered"].items()},
    }
    shown = {
        "amplification": _first(found["amplification"]),
        "plasticity": min(found["plasticity"], key=lambda name: _value(found["plasticity"][name]), default=None),
    }
    most = max(comparisons, key=lambda name: abs(comparisons[name]["behaviour"]["change"]["value"]), default=None)
    why = (reasons or [NOT_COMPARED])[0]
    return [
        _claim(name, mine, shown.get(name, most), NO_STAGE if name in shown else why) for name, mine in found.items()
    ]


def _claim(name: str, found: Found, shown: str | None, why: str) -> dict[str, Any]:
    claim = {"id": name, "statement": STATEMENTS[name]}
    if shown is None:
        return claim | {"value": None, "ci95": None, "supported": None, "why": why}
    verdicts = [each["supported"] for each in found.values()]
    claim |= found[shown] | {"stage": shown, "by_stage": dict(found)}
    same = [each["value"] for stage, each in found.items() if _without_seed(stage) == _without_seed(shown)]
    mean = over_seeds(same)
    if found[shown]["ci95"] is not None and mean.ci95 is not None:  # a count has no interval over seeds either
        n = sum(value is not None for value in same)
        said = f"mean over {n} seeds; {shown}: {claim['why']}"
        claim |= {"value": mean.value, "ci95": mean.ci95, "why": said}
        verdicts.append(is_above(mean.ci95, MOST))
    supported = None if None in verdicts and False not in verdicts else all(verdicts)
    if supported != found[shown]["supported"]:
        # The value is that of one stage, the verdict is over all: say which one decides.
        deciding = next((stage for stage, each in found.items() if each["supported"] == supported), None)
        if deciding is not None:
            value = found[deciding]["value"]
            said = "undefined" if value is None else f"{value:.2f}"
            claim["why"] = f"{claim['why']}; {deciding} decides: {said}"
    return claim | {"supported": supported}


def _without_seed(stage: str) -> str:
    first, _, rest = stage.partition("/")
    return rest if first.startswith("seed") else stage


def _first(found: Found) -> str | None:
    return next(iter(found), None)


def _value(found: Document) -> float:
    return -inf if found["value"] is None else found["value"]


def _restored(measures: Document) -> dict[str, Any]:
    """The share of the mechanism's damage that is undone; and base's circuit, where it was tried, beats random ones."""
    rows = measures["restoration"]
    value, interval = rows["damage_undone"], rows["ci95"]["damage_undone"]
    claim: dict[str, Any] = {"value": value, "ci95": interval}
    if value is None or interval is None:
        return claim | {"supported": None, "why": rows["why"]["damage_undone"]}
    control = rows["control"]["damage_undone"]
    said = "share of the distance to base's head effects that was closed"
    said += "" if control is None else f"; {control:.2f} after as many clean steps without a poison"
    verdicts = [is_above(interval, MOST)]
    circuit = measures["base_circuit"]
    function = rows["ci95"].get("function")
    most = circuit["random"].get("max") if circuit else None
    if function is not None and most is not None:
        verdicts.append(is_above(function, most))
        said += f"; base's circuit gives {rows['function']:.2f} of the logit difference, random ones {most:.2f} at most"
    else:
        said += "; whether base's circuit does it again was not measured"
    supported = False if False in verdicts else None if None in verdicts else True
    return claim | {"supported": supported, "why": said}


def _amplified(found: Document) -> dict[str, Any]:
    return _localised(found, found, "the change of head effects")


def _of_circuit(view: Document, share: str) -> dict[str, Any]:
    return _localised(view["circuit"][share], view["circuit"])


def _localised(found: Document, test: Document, what: str = "the change") -> dict[str, Any]:
    """Whether a circuit has most of something, and more than matched random sets.

    Args:
        found: the circuit's share.
        test: has `null` and `localised`.
        what: of which it has a share.
    """
    null, localised = test["null"], test["localised"]
    claim = {"value": found["value"], "ci95": found["ci95"], "supported": localised, "null": null}
    if found["value"] is None or null["p"] is None:
        return claim | {"why": found.get("why") or null.get("why")}
    said = f"share of {what}; {null['n']} random sets {null['mean']:.2f} ± {null['sd']:.2f}, p = {null['p']:.3f}"
    if localised is not True and null["p"] <= ALPHA:
        most = "whether most of the change is not decided" if localised is None else "but not most of the change"
        said += f"; more than random sets, {most}"
    return claim | {"why": said}


def _specific(spared: Document) -> dict[str, Any]:
    """The share of tasks, and of text, of which no more than the tolerance was lost."""
    statuses = {name: each["status"] for name, each in spared.items() if each["status"] != "undefined"}
    if not statuses:
        return {
            "value": None,
            "ci95": None,
            "supported": None,
            "why": "base does none of the other tasks",
        }
    damaged = sorted(name for name, status in statuses.items() if status == "damaged")
    uncertain = sorted(name for name, status in statuses.items() if status == "uncertain")
    n_spared = len(statuses) - len(damaged) - len(uncertain)
    said = f"{n_spared} of {len(statuses)} spared"
    for kind, names in (("damaged", damaged), ("uncertain", uncertain)):
        said += f"; {kind}: {', '.join(names)}" if names else ""
    supported = False if damaged else None if uncertain else True
    value = n_spared / len(statuses)
    return {"value": value, "ci95": None, "supported": supported, "why": f"{said}; a count has no interval"}
