"""Path patching, heads → logits (Wang et al. 2022, arXiv 2211.00593, section 3.1 and appendix B).

For each head: the clean prompt with every head frozen to its clean value, except the sender, which takes its
counterfactual value at END; MLPs and norms recompute; the change of the logit difference is the head's effect.

Steps here: record the clean and the counterfactual run at END once; then walk up the layers once, all senders
batched. At layer l the rows of earlier senders and the new rows of layer l's heads go through the layer together,
attention answering its clean output plus, for the new rows, (z_counterfactual - z_clean) W_O of their head. With
all attention frozen no position but END can matter, so a row is a single position and the result is exact.

Sign: effect = LD(patched) - LD(clean), in logits; a negative effect says that the head helps the task.
Deviation from the paper: the score is not divided by LD(clean); divide by `clean` for that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.errors import InputError
from neuroplast.models.network import Network, Recording
from neuroplast.tasks.prompts import PromptSet

ROWS = 4096
"""Rows (sender × prompt) replayed at once, by default: large enough for full matrix-product speed."""


@dataclass(frozen=True)
class HeadEffects:
    """The exact effect of every head on the logit difference, prompt by prompt."""

    effects: Float[Tensor, "layer head prompt"]
    """LD(patched) - LD(clean), in logits; negative: the head helped."""
    clean: Float[Tensor, "prompt"]
    """Logit difference, answer minus foil, on the clean prompts."""
    counterfactual: Float[Tensor, "prompt"]
    """The same difference on the counterfactual prompts."""
    position: str
    """Where the senders were patched."""


def path_patch(
    model: Network,
    prompts: PromptSet,
    *,
    rows: int = ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> HeadEffects:
    """Path-patches every head into the logits at END, exactly.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        rows: bound on the rows (sender × prompt) held at once; memory grows with it, results do not change.
        progress: called with (prompts done, prompts in all) after each chunk.

    Returns:
        Effects with shape (layer, head, prompt), on the CPU in float32.

    Raises:
        InputError: when `rows` is less than 1.
    """
    if rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    step = max(1, rows // (model.n_layers * model.n_heads))
    parts: list[HeadEffects] = []
    for start in range(0, len(prompts), step):
        parts.append(_patch_chunk(model, prompts[start : start + step], rows))
        if progress is not None:
            progress(min(start + step, len(prompts)), len(prompts))
    return HeadEffects(
        torch.cat([part.effects for part in parts], dim=2),
        torch.cat([part.clean for part in parts]),
        torch.cat([part.counterfactual for part in parts]),
        "end",
    )


def _patch_chunk(model: Network, prompts: PromptSet, rows: int) -> HeadEffects:
    end = prompts.positions["end"]
    choices = torch.stack([prompts.answer, prompts.foil], dim=1).to(model.device)
    clean = model.record(prompts.clean, end)
    other = model.record(prompts.counterfactual, end)
    # The clean logits come from the same one-position arithmetic as the patched ones: rounding cancels.
    top = _replay(model, clean, other, [], rows)
    baseline = _logit_difference(model, top, choices)
    effects = torch.empty(model.n_layers * model.n_heads, len(prompts))
    senders = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    width = max(1, rows // len(prompts))
    for start in range(0, len(senders), width):
        group = senders[start : start + width]
        top = _replay(model, clean, other, group, rows)
        patched = _logit_difference(model, top, choices.repeat(len(group), 1)).view(len(group), -1)
        effects[start : start + len(group)] = (patched - baseline).float().cpu()
    return HeadEffects(
        effects.view(model.n_layers, model.n_heads, -1),
        difference(clean.logits, choices).float().cpu(),
        difference(other.logits, choices).float().cpu(),
        "end",
    )


def _replay(
    model: Network, clean: Recording, other: Recording, senders: list[tuple[int, int]], rows: int
) -> Float[Tensor, "row d_model"]:
    """Walks up the layers with the senders' rows, sender-major; without senders, with the clean rows alone."""
    first = min((layer for layer, _ in senders), default=0)
    alive = clean.residual[0] if not senders else clean.residual[0][:0]
    for layer in range(first, model.n_layers):
        heads = torch.tensor([head for at, head in senders if at == layer], dtype=torch.long, device=model.device)
        change = other.z[layer][:, heads] - clean.z[layer][:, heads]
        sent = torch.einsum("phf,hfd->hpd", change, model.head_weights(layer)[heads])
        copies = len(alive) // clean.residual.shape[1]
        attention = torch.cat([clean.attention[layer].repeat(copies, 1), (clean.attention[layer] + sent).flatten(0, 1)])
        residual = torch.cat([alive, clean.residual[layer].repeat(len(heads), 1)])
        alive = model.replay_layer(layer, residual, attention)
    return alive


def _logit_difference(
    model: Network, residual: Float[Tensor, "row d_model"], choices: Int[Tensor, "row 2"]
) -> Float[Tensor, "row"]:
    logits = model.readout(residual, choices).float()
    return logits[:, 0] - logits[:, 1]


def difference(logits: Float[Tensor, "prompt vocab"], choices: Int[Tensor, "prompt 2"]) -> Float[Tensor, "prompt"]:
    """Logit of the first choice minus logit of the second, prompt by prompt."""
    picked = logits.float().gather(1, choices)
    return picked[:, 0] - picked[:, 1]
