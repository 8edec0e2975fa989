"""The study's findings put to the test: what a comparison of base and poisoned says of where and what.

Each claim has a null of its own and can come out false. The value shown is that of the stage whose logit difference the
poison moved most; a claim holds when it holds at every stage that was compared, and `by_stage` has them all.
"""

from collections.abc import Mapping
from typing import Any

from neuroplast.statistics import ALPHA

STATEMENTS = {
    "amplification": "Task fine-tuning strengthens the existing circuit",
    "localisation_expressed": "Most of the damage shows in the base circuit's heads, and more than in random ones",
    "localisation_stored": "Most of the damage lies in the base circuit's weights, and more than in random heads'",
    "specificity": "What the poison does not teach is spared: other tasks, and text",
    "plasticity": "Clean retraining re-forms the original mechanism",
}
NOT_TESTED = "not tested in this version"
NOT_COMPARED = "no stage that differs from base was compared with it: name its kind in compare_stages"

UNCHANGED = {"label": "unchanged"}

Document = Mapping[str, Any]


def build_claims(comparisons: Mapping[str, Document]) -> list[dict[str, Any]]:
    """The claims of a study.

    Args:
        comparisons: by stage, its comparison with base.
    """
    reasons = [each["why"] for each in comparisons.values() if "verdict" not in each]
    comparisons = {
        name: each for name, each in comparisons.items() if each.get("verdict", UNCHANGED)["label"] != "unchanged"
    }
    found = {
        "localisation_expressed": {name: _localised(each["expressed"], "undone") for name, each in comparisons.items()},
        "localisation_stored": {name: _localised(each["stored"], "share") for name, each in comparisons.items()},
        "specificity": {name: _specific(each["spared"]) for name, each in comparisons.items()},
    }
    most = max(comparisons, key=lambda name: abs(comparisons[name]["behaviour"]["change"]["value"]), default=None)
    claims: list[dict[str, Any]] = []
    for name, statement in STATEMENTS.items():
        nothing = {"value": None, "ci95": None, "supported": None}
        if name not in found:
            claims.append({"id": name, "statement": statement, **nothing, "why": NOT_TESTED})
        elif most is None:
            claims.append({"id": name, "statement": statement, **nothing, "why": (reasons or [NOT_COMPARED])[0]})
        else:
            shown = found[name][most]
            verdicts = [each["supported"] for each in found[name].values()]
            supported = None if None in verdicts and False not in verdicts else all(verdicts)
            stages = {"stage": most, "by_stage": found[name]}
            claims.append({"id": name, "statement": statement, **shown, "supported": supported, **stages})
    return claims


def _localised(view: Document, share: str) -> dict[str, Any]:
    """A circuit's share of the change, against matched random sets."""
    circuit = view["circuit"]
    value, null = circuit[share], circuit["null"]
    claim = {"value": value["value"], "ci95": value["ci95"], "supported": circuit["localised"], "null": null}
    if circuit["localised"] is None:
        return claim | {"why": null.get("why") or value.get("why")}
    said = f"share of the change; {null['n']} random sets {null['mean']:.2f} ± {null['sd']:.2f}, p = {null['p']:.3f}"
    if not circuit["localised"] and null["p"] <= ALPHA:
        said += "; more than random sets, but not most of the change"
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
