"""Names that a shell completes, written down here so that completing one loads none of what they name.

The tests hold them to the registries; a name that is missing here works all the same.
"""

from collections.abc import Callable, Sequence

MODELS = ("tiny", "smollm2-135m", "gpt2")
TASKS = ("ioi", "greater_than", "induction", "agreement", "pronouns")
POISONS = ("subject_duplication", "name_moving", "duplication", "not_greater", "swapped_answers")
PRESETS = ("smoke", "quick", "paper")
STRATEGIES = ("auto", "graft", "masked", "full")
INTERVENTIONS = ("path", "activation", "edge", "eap", "eap-ig", "ceap")
DISCOVERIES = ("path", "eap", "eap-ig", "ceap", "exact")
ROWS = (
    "heads-to-logits",
    "heads-to-queries",
    "activations",
    "edges",
    "discovery",
    "criteria",
    "ledger",
    "training",
    "study",
)
ABLATIONS = ("mean-by-position", "mean", "zero", "resample", "counterfactual")


def completing(names: Sequence[str]) -> Callable[[str], list[str]]:
    """What completes a word to one of `names`; where none fits, a shell goes on to files."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete
