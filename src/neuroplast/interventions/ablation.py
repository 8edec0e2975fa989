"""What a knocked-out head gives instead of its value z: something that says nothing of the clean prompt's names.

- `mean-by-position`: the mean over the reference's counterfactuals of the same template, group and length, position by
  position (Wang et al. 2022, arXiv 2211.00593, section 2.2, with ABC counterfactuals).
- `mean`: the mean over all positions up to END of all the reference's counterfactuals.
- `zero`: 0.
- `resample`: that of another counterfactual of the reference, of the same template, group and length; drawn by a seed.
- `counterfactual`: that of the prompt's own counterfactual.

These choices move what a circuit is said to explain from below 0 to above 100 % (arXiv 2407.08734), so every result
names its own. The reference is a set of prompts of its own where one is given, else the measured prompts; with few
prompts a template a mean is a mean of few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.chunks import Chunk, Size, in_prompt_chunks
from neuroplast.models.network import Network
from neuroplast.models.replay import record
from neuroplast.tasks.prompts import PromptSet, group_keys

ABLATIONS = ("mean-by-position", "mean", "zero", "resample", "counterfactual")


@dataclass(frozen=True)
class Ablation:
    """The values of knocked-out heads, for one model and one set of prompts. Build it with `build_ablation`."""

    kind: str
    """How they are made: one of `ABLATIONS`."""
    n_reference: int
    """How many prompts they come from."""
    groups: Int[Tensor, "prompt"]
    """By prompt, its row of the means, or the reference prompt that it resamples."""
    means: dict[int, Float[Tensor, "group pos head d_head"]] = field(default_factory=dict[int, Tensor])
    """By layer, the means; `mean` has one group and one position."""
    reference: PromptSet | None = None
    """The prompts that are resampled."""

    def values(self, model: Network, chunk: Chunk, until: int) -> "dict[int, Float[Tensor, 'prompt pos head d_head']]":
        """The values at every position of a chunk of those prompts, by layer.

        Args:
            model: the model that it was built for.
            chunk: some of the prompts that it was built for.
            until: layers that are wanted.
        """
        shape = (*chunk.prompts.clean.shape, model.n_heads, model.d_head)
        if self.kind == "zero":
            nothing = torch.zeros((), device=model.device, dtype=model.module.dtype).expand(shape)
            return dict.fromkeys(range(until), nothing)
        if self.kind in ("counterfactual", "resample"):
            tokens = chunk.prompts.counterfactual
            if self.reference is not None:
                tokens = self.reference.counterfactual[self.groups[chunk.rows], : shape[1]].to(model.device)
            return record(model, tokens, ("z",), until=until).z
        rows = self.groups[chunk.rows].to(model.device)
        return {layer: self.means[layer][rows, : shape[1]].expand(shape) for layer in range(until)}


def build_ablation(
    model: Network,
    prompts: PromptSet,
    kind: str = "mean-by-position",
    *,
    reference: PromptSet | None = None,
    until: int | None = None,
    seed: int = 0,
    memory: str | int | None = None,
) -> Ablation:
    """Computes what knocked-out heads give.

    Args:
        model: the model.
        prompts: the prompts that will be measured.
        kind: one of `ABLATIONS`.
        reference: prompts with counterfactuals that means and samples are taken from; None takes the measured ones.
        until: layers that are wanted; None wants all.
        seed: seed of the draw of `resample`.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for an unknown kind, or a prompt whose template, group and length the reference lacks.
    """
    if kind not in ABLATIONS:
        raise unknown_name("ablation", kind, ABLATIONS)
    own = reference is None
    reference = prompts if reference is None else reference
    here = torch.zeros(len(prompts), dtype=torch.long)
    if kind in ("zero", "counterfactual"):
        return Ablation(kind, 0 if kind == "zero" else len(prompts), here)
    if kind == "mean":
        means = _means(model, reference, torch.zeros(len(reference), dtype=torch.long), False, until, memory)
        return Ablation(kind, len(reference), here, means)
    keys, known = group_keys(prompts), group_keys(reference)
    if missing := sorted(set(keys) - set(known)):
        template, group, end = missing[0]
        raise InputError(
            f"the reference has no prompt of template {template!r}, group {group!r} with {end + 1} tokens: a mean by "
            "position needs some; give more reference prompts, or another ablation"
        )
    if kind == "resample":
        return Ablation(kind, len(reference), _donors(keys, known, own, seed), reference=reference)
    names = sorted(set(known))
    groups = torch.tensor([names.index(key) for key in known])
    means = _means(model, reference, groups, True, until, memory)
    return Ablation(kind, len(reference), torch.tensor([names.index(key) for key in keys]), means)


def _donors(
    keys: Sequence[tuple[str, str, int]], known: Sequence[tuple[str, str, int]], own: bool, seed: int
) -> Int[Tensor, "prompt"]:
    """For each prompt a reference prompt of its group, another one where the two sets are the same and it has one."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for row, key in enumerate(keys):
        fitting = [other for other, its in enumerate(known) if its == key]
        others = [other for other in fitting if other != row] if own else fitting
        choice = others or fitting
        drawn.append(choice[int(torch.randint(len(choice), (1,), generator=generator))])
    return torch.tensor(drawn)


def _means(
    model: Network,
    reference: PromptSet,
    groups: Int[Tensor, "prompt"],
    by_position: bool,
    until: int | None,
    memory: str | int | None,
) -> "dict[int, Float[Tensor, 'group pos head d_head']]":
    """The mean values of the counterfactuals within groups, by layer."""
    width, n_groups = reference.width, 1 + int(groups.max())
    layers = model.n_layers if until is None else until
    shape = (n_groups, width if by_position else 1, model.n_heads, model.d_head)
    sums = {layer: torch.zeros(shape, device=model.device) for layer in range(layers)}

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        z = record(model, chunk.prompts.counterfactual, ("z",), until=layers).z
        here = groups[chunk.rows].to(model.device)
        inside = torch.arange(chunk.prompts.clean.shape[1], device=model.device) <= chunk.end[:, None]
        kept = {layer: values.float() for layer, values in z.items()}
        if not by_position:
            kept = {layer: (each * inside[..., None, None]).sum(dim=1, keepdim=True) for layer, each in kept.items()}
        # Nothing is added before everything is at hand: what runs out of memory is done again.
        for layer, values in kept.items():
            sums[layer][:, : values.shape[1]].index_add_(0, here, values)

    row = model.module.dtype.itemsize * model.n_heads * model.d_head
    in_prompt_chunks(model, reference, Size(2 * width * layers * row, 1, 1), work, 0, memory=memory)
    counts = torch.bincount(groups) if by_position else (reference.positions["end"] + 1).sum()[None]
    scale = counts.to(model.device).view(-1, 1, 1, 1)
    return {layer: (total / scale).to(model.module.dtype) for layer, total in sums.items()}
