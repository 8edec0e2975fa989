"""What a head does, in numbers: what it copies, where it attends, and how it treats repeated random tokens.

After Wang et al. 2022 (arXiv 2211.00593): attention and what is written from figure 3, tests off the task from the
appendices on induction, duplicate-token and previous-token heads.

- **copy**, **negative copy**: the shares of the names that a head copies (`neuroplast.circuits.copying`).
- **attention to P**, from where the head stands to the position named P; to its own token; to the first token.
  Of a head at several positions, the mean over those not before P. **even share**: what even attention would give.
- **direct logit attribution**, for heads at END: what the head's output there adds to the logit of the answer, to that
  of the foil, each above the mean over the vocabulary, and the difference; with the final norm's gain, and the scale
  that it divides by as in the clean run, before any soft cap or scaling of the logits. Of several answers or foils,
  the mean.
- **output follows attention**, for heads at END: the correlation, over prompts and over answer and foil, of the
  attention to a name, wherever it stands, with the direct logit attribution to it.
- off the task, on `SEQUENCES` sequences of BOS, where there is one, up to `REPEATED` different random tokens, and the
  same again: **previous token**, attention to the token before; **duplicate token**, from a token's second place to
  its first; **induction**, from there to the token after the first.

Units: probabilities, shares, logits and a correlation; means over prompts or sequences, each with its standard error
(the correlation's by bootstrap over prompts). The `reference` says what all heads of the model get, because the
paper's thresholds are known for GPT-2 only.

Deviation: where a norm stands between the heads and the residual stream (Gemma 3), direct logit attribution takes what
the norm gives with the head minus what it gives without.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from neuroplast.circuits.copying import TOP, copy_shares, passed_on
from neuroplast.components import Node
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks
from neuroplast.interventions.knockout import select_heads
from neuroplast.interventions.pairs import recorded_bytes
from neuroplast.interventions.selection import position_mask, require_prompts
from neuroplast.models.network import Network, unembedding_of
from neuroplast.models.recording import Place, at_positions
from neuroplast.models.replay import record
from neuroplast.statistics import bootstrap_weights
from neuroplast.tasks.metric import choices
from neuroplast.tasks.prompts import NO_TOKEN, PromptSet

COPY, NEGATIVE_COPY = "copy", "negative copy"
PREVIOUS, DUPLICATE, INDUCTION = OFF_TASK = ("previous token", "duplicate token", "induction")
OWN_TOKEN, FIRST_TOKEN, EVEN_SHARE = "attention to own token", "attention to first token", "even share"
ATTRIBUTION, TO_ANSWER, TO_FOIL = (f"direct logit attribution{to}" for to in ("", " to answer", " to foil"))
FOLLOWS = "output follows attention"

REPEATED = 25
"""Random tokens before they come again; fewer where the context or the vocabulary is smaller, and at least 3."""
SEQUENCES = 16
"""Sequences of repeated tokens."""

CONSTANT = 1e-6
"""What varies less than that, relative to its size, does not vary."""


@dataclass(frozen=True)
class HeadMeasures:
    """The numbers of one head."""

    values: Mapping[str, float | None]
    """By measure; None where it cannot be measured."""
    errors: Mapping[str, float | None]
    """Standard error of each; None where there is none, such as on a single prompt."""


@dataclass(frozen=True)
class Reference:
    """What all heads of the model get in one measure."""

    mean: float
    """The mean over heads."""
    p95: float
    """The 95th percentile over heads."""
    chance: float
    """What a head gets that attends evenly, or writes nothing in particular."""


@dataclass(frozen=True)
class Measured:
    """Measures of some heads, and what they are to be compared with."""

    heads: Mapping[Node, HeadMeasures]
    """By head, with its position."""
    reference: Mapping[str, Reference]
    """By measure, for the copy scores and what is measured off the task; those that cannot be measured are left out."""


@torch.no_grad()
def measure_heads(
    model: Network,
    prompts: PromptSet,
    heads: Sequence[Node],
    *,
    seed: int = 0,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measures what heads do.

    Args:
        model: the instrumented model.
        prompts: the clean prompts are run.
        heads: which heads, each where it stands.
        seed: seed of the random tokens, and of the resamples.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for a part or a position that is not there, or a budget that is too small.
    """
    require_prompts(prompts)
    nodes = tuple(dict.fromkeys(select_heads(list(heads), model, prompts)))
    if not nodes:
        return Measured({}, {})
    everywhere = {
        **_copy_scores(model, prompts, memory, _part(progress, 0)),
        **_off_task(model, seed, memory, _part(progress, 1)),
    }
    on_task = measure_on_task(model, prompts, nodes, memory=memory, progress=_part(progress, 2))
    found: dict[Node, HeadMeasures] = {}
    for node in nodes:
        samples = {name: all_heads.samples[node.layer or 0, node.head or 0] for name, all_heads in everywhere.items()}
        summaries = {name: _summary(each) for name, each in {**samples, **on_task.shares[node]}.items()}
        summaries.update(_of_names(*on_task.names[node], seed) if node in on_task.names else {})
        found[node] = HeadMeasures(
            {name: value for name, (value, _) in summaries.items()},
            {name: error for name, (_, error) in summaries.items()},
        )
    return Measured(
        found, {name: each.reference() for name, each in everywhere.items() if np.isfinite(each.samples).any()}
    )


@dataclass(frozen=True)
class _AllHeads:
    """One measure of every head."""

    samples: NDArray[np.float64]
    """(layer, head, prompt or sequence); NaN where there is none."""
    chance: float

    def reference(self) -> Reference:
        means = np.nanmean(self.samples, axis=2)
        return Reference(float(means.mean()), float(np.quantile(means, 0.95)), self.chance)


@dataclass(frozen=True)
class OnTask:
    """What some heads do on the task, prompt by prompt."""

    shares: Mapping[Node, Mapping[str, NDArray[np.float64]]]
    """By head and measure, of each prompt; NaN where there is none."""
    names: Mapping[Node, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """For heads at END: the attention to answer and foil, NaN where they are not in the prompt, and the direct logit
    attribution to them; (prompt, 2)."""


def _copy_scores(
    model: Network, prompts: PromptSet, memory: str | int | None, progress: Progress | None
) -> dict[str, _AllHeads]:
    """The share of each prompt's names that each head copies, with its own sign and with the other."""
    heads = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    shares = copy_shares(model, prompts, heads, memory=memory, progress=progress).numpy()
    samples = shares.reshape(2, model.n_layers, model.n_heads, -1)
    chance = TOP / len(unembedding_of(model.module).weight)
    return {name: _AllHeads(each, chance) for name, each in zip((COPY, NEGATIVE_COPY), samples, strict=True)}


def _off_task(model: Network, seed: int, memory: str | int | None, progress: Progress | None) -> dict[str, _AllHeads]:
    """Attention of every head on repeated random tokens; NaN where no such tokens can be had."""
    samples = np.full((len(OFF_TASK), model.n_layers, model.n_heads, SEQUENCES), np.nan)
    tokens, first = repeated_tokens(model, seed)
    width = tokens.shape[1]
    half = (width - first) // 2
    if half == 0:
        return {name: _AllHeads(each, 0.0) for name, each in zip(OFF_TASK, samples, strict=True)}
    again = torch.arange(first + half, width)
    places = ((torch.arange(first + 1, width), -1), (again, -half), (again, 1 - half))

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        run = record(model, chunk.prompts.clean, ("pattern",))
        for layer, pattern in run.pattern.items():
            for row, (queries, step) in enumerate(places):
                seen = pattern[:, :, queries, queries + step].double().mean(dim=2)
                samples[row, layer][:, chunk.rows.numpy()] = seen.T.cpu().numpy()
        tick()

    nothing = torch.zeros(SEQUENCES, dtype=torch.long)
    end = {"end": torch.full((SEQUENCES,), width - 1)}
    sequences = PromptSet("repeated tokens", (), tokens, tokens, nothing, nothing, end)
    size = Size(recorded_bytes(model, width, [("pattern",)]), 1, 1)
    in_prompt_chunks(model, sequences, size, work, 1, memory=memory, progress=progress)
    return {
        name: _AllHeads(each, float((1 / (queries + 1.0)).mean()))
        for name, each, (queries, _) in zip(OFF_TASK, samples, places, strict=True)
    }


def repeated_tokens(model: Network, seed: int) -> tuple[Int[Tensor, "sequence pos"], int]:
    """Random tokens that come twice, and where the first of them stands: 1 behind a BOS token, else 0.

    Special tokens are left out where the tokenizer tells. A model without a tokenizer has the BOS of its
    configuration, and all other tokens. Nothing but BOS where there is no room for 3 different tokens, twice.
    """
    tokenizer, config = model.tokenizer, model.module.config
    known, special = int(config.vocab_size), set[int]()
    bos: int | None = getattr(config, "bos_token_id", None) if tokenizer is None else tokenizer.bos_token_id
    if tokenizer is not None:
        known = min(known, len(tokenizer))
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = int(bos is not None and bos < known)
    ordinary = torch.tensor([token for token in range(known) if token != bos and token not in special])
    context: int = getattr(config, "max_position_embeddings", None) or 2 * REPEATED + first
    length = min(REPEATED, (context - first) // 2, len(ordinary))
    if length < 3:
        length = 0
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(ordinary), generator=generator)[:length] for _ in range(SEQUENCES)])
    start = torch.full((SEQUENCES, first), bos or 0)
    return torch.cat([start, ordinary[drawn], ordinary[drawn]], dim=1), first


@torch.no_grad()
def measure_on_task(
    model: Network,
    prompts: PromptSet,
    nodes: Sequence[Node],
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> OnTask:
    """Attention of some heads on the clean prompts, and what those at END write.

    Args:
        model: the instrumented model.
        prompts: the clean prompts are run.
        nodes: heads, each where it stands.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for a position that is not there, or a budget that is too small.
    """
    n = len(prompts)
    at_end = [node for node in nodes if node.position in ("end", None)]
    ending = _Ending(model) if at_end else None
    until = model.n_layers if at_end else 1 + max(node.layer or 0 for node in nodes)
    kept: tuple[Place, ...] = ("pattern", *(("z", "attention") if at_end else ()))
    shares: dict[Node, dict[str, NDArray[np.float64]]] = {node: {} for node in nodes}
    names = {node: (np.full((n, 2), np.nan), np.full((n, 2), np.nan)) for node in at_end}

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        run = record(model, chunk.prompts.clean, kept, until=until)
        rows = chunk.rows.numpy()

        def at_the_end(values: Tensor) -> Tensor:
            return at_positions(values, chunk.end[:, None])[:, 0]

        scale = ending.scale(at_the_end(run.residual[until])) if ending is not None else None
        wanted = choices(chunk.prompts)
        for node in nodes:
            layer = node.layer or 0
            pattern = run.pattern[layer][:, node.head].double()
            for name, each in _shares(pattern, chunk, node).items():
                shares[node].setdefault(name, np.full(n, np.nan))[rows] = each.cpu().numpy()
            if ending is not None and scale is not None and node in names:
                output = _written(model, node, at_the_end(run.z[layer]), at_the_end(run.attention[layer]))
                adds = _means_of_sets(ending.attribute(output, wanted), chunk.prompts) / scale
                for into, found in zip(names[node], (_to_names(pattern, chunk), adds), strict=True):
                    into[rows] = found.double().cpu().numpy()
        tick()

    size = Size(recorded_bytes(model, prompts.width, [(*kept, "residual")]), 1, 1)
    in_prompt_chunks(model, prompts, size, work, 1, memory=memory, progress=progress)
    seen = {
        node: {name: each for name, each in mine.items() if np.isfinite(each).any()} for node, mine in shares.items()
    }
    return OnTask(seen, names)


def _shares(pattern: Float[Tensor, "prompt query key"], chunk: Chunk, node: Node) -> dict[str, Float[Tensor, "prompt"]]:
    """How a head attends from where it stands; NaN in prompts where it stands before what is attended to."""
    here = position_mask(chunk.prompts, node.position)
    index = torch.arange(here.shape[1], device=here.device)

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return (values * where).sum(dim=1) / where.sum(dim=1)

    found: dict[str, Tensor] = {}
    for name, place in chunk.prompts.positions.items():
        if name != node.position:
            to_place = at_positions(pattern.transpose(1, 2), place[:, None])[:, 0]
            found[f"attention to {name}"] = mean(to_place, here & (index >= place[:, None]))
    found[OWN_TOKEN] = mean(pattern.diagonal(dim1=1, dim2=2), here)
    found[FIRST_TOKEN] = mean(pattern[:, :, 0], here)
    found[EVEN_SHARE] = mean((1 / (index + 1.0))[None].double(), here)
    return found


def _to_names(pattern: Float[Tensor, "prompt query key"], chunk: Chunk) -> Float[Tensor, "prompt name"]:
    """Attention from END to the answer and to the foil wherever they stand; NaN where they do not."""
    prompts = chunk.prompts
    said = prompts.clean[:, None] == torch.stack([prompts.answer, prompts.foil], dim=1)[:, :, None]
    said = said & position_mask(prompts, None)[:, None]
    from_end = at_positions(pattern, chunk.end[:, None])
    return (from_end * said).sum(dim=2).masked_fill(~said.any(dim=2), torch.nan)


def _means_of_sets(values: Float[Tensor, "prompt choice"], prompts: PromptSet) -> Float[Tensor, "prompt set"]:
    """The mean over each prompt's answers, and over its foils, of what each of `choices` has."""
    there = torch.cat([prompts.answers, prompts.foils], dim=1) != NO_TOKEN
    kept, n = values.masked_fill(~there, torch.nan), prompts.answers.shape[1]
    return torch.stack([kept[:, :n].nanmean(dim=1), kept[:, n:].nanmean(dim=1)], dim=1)


def _written(
    model: Network, node: Node, z: Float[Tensor, "prompt head d_head"], attention: Float[Tensor, "prompt d_model"]
) -> Float[Tensor, "prompt d_model"]:
    """What a head adds to the residual stream."""
    layer, head = node.layer or 0, node.head or 0
    output = z[:, head] @ model.head_weights(layer)[head]
    if model.adds_attention:
        return output
    return passed_on(model, layer, attention) - passed_on(model, layer, attention - output)


class _Ending:
    """The final norm and the unembedding as a linear map, the norm's scale being given.

    The norm's gain is what it gives for a vector of signs, whose mean is 0 and whose scale is 1. A norm that gives
    nothing for a constant vector subtracts the mean.
    """

    def __init__(self, model: Network) -> None:
        self.model = model
        signs = 1.0 - 2.0 * (torch.arange(model.d_model, device=model.device) % 2)
        probes = torch.stack([torch.zeros_like(signs), signs, torch.ones_like(signs)])
        self.bias, of_signs, of_ones = self.normed(probes.to(model.module.dtype))
        self.gain = (of_signs - self.bias) * signs
        self.centres = bool((of_ones - self.bias).norm() < 0.01 * self.gain.norm())
        self.weight = unembedding_of(model.module).weight
        self.mean = self.weight.mean(dim=0, dtype=torch.float32)

    def normed(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the unembedding reads."""
        seen: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            seen.append(hidden.float())
            return hidden

        self.model.run_ending(residual, keep)
        return seen[0]

    def scale(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row 1"]:
        """What the norm divides a residual stream by."""
        whole = self._gained(residual)
        divided = self.normed(residual) - self.bias
        return whole.pow(2).sum(dim=1, keepdim=True) / (whole * divided).sum(dim=1, keepdim=True)

    def attribute(
        self, output: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row choice"]
    ) -> Float[Tensor, "row choice"]:
        """What a part of the residual stream adds to the logits of tokens, above the vocabulary's mean, times scale."""
        directions = self.weight[tokens].float() - self.mean
        return torch.einsum("rd,rcd->rc", self._gained(output), directions)

    def _gained(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.gain * (x - x.mean(dim=1, keepdim=True) if self.centres else x)


def _summary(samples: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Mean and standard error of what there is."""
    found = samples[np.isfinite(samples)]
    if not len(found):
        return None, None
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else None


def _of_names(
    attention: NDArray[np.float64], adds: NDArray[np.float64], seed: int
) -> dict[str, tuple[float | None, float | None]]:
    """The measures of a head at END that have to do with answer and foil."""
    to_answer, to_foil = adds.T
    return {
        ATTRIBUTION: _summary(to_answer - to_foil),
        TO_ANSWER: _summary(to_answer),
        TO_FOIL: _summary(to_foil),
        FOLLOWS: _correlation(attention, adds, seed),
    }


def _correlation(
    attention: NDArray[np.float64], adds: NDArray[np.float64], seed: int
) -> tuple[float | None, float | None]:
    """Pearson's correlation over prompts and names, and its standard error over resampled prompts.

    Args:
        attention: (prompt, name), NaN where a name is not in the prompt.
        adds: (prompt, name).
        seed: seed of the resamples.
    """
    there = np.isfinite(attention)
    if there.any(axis=1).sum() < 3:
        return None, None
    a, b = (np.where(there, each - each[there].mean(), 0.0) for each in (attention, adds))
    if any(np.abs(each).max() <= CONSTANT * np.abs(of[there]).max() for each, of in ((a, attention), (b, adds))):
        return None, None
    a, b = (each / each[there].std() for each in (a, b))
    moments = [np.sum(each, axis=1) for each in (there, a, b, a * a, b * b, a * b)]

    def correlate(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total, *sums = (weights @ each for each in moments)
        mean_a, mean_b, square_a, square_b, product = (
            np.divide(each, total, out=np.full_like(each, np.nan), where=total > 0) for each in sums
        )
        spread = np.maximum((square_a - mean_a**2) * (square_b - mean_b**2), 0) ** 0.5
        return np.divide(product - mean_a * mean_b, spread, out=np.full_like(spread, np.nan), where=spread > CONSTANT)

    (value,) = correlate(np.ones((1, len(a))))
    if not np.isfinite(value):
        return None, None
    resampled = correlate(bootstrap_weights(len(a), seed))
    resampled = resampled[np.isfinite(resampled)]
    return float(value), float(resampled.std()) if len(resampled) > 1 else None


def _part(progress: Progress | None, number: int) -> Progress | None:
    """Progress of one of three parts."""
    if progress is None:
        return None
    return lambda done, total: progress(100 * number + 100 * done // total, 300)
