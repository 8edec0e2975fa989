"""Causal tracing (Meng, Bau, Andonian and Belinkov 2022, arXiv 2202.05262): which hidden values carry what a model
knows of some tokens.

Noise on the embeddings of those tokens makes the model forget them; then one clean value is put back, and everything
after it recomputes. What brings the answer back carried it.

Steps: the clean run and, for each draw of the noise, a noised run are recorded once. Restoring is activation patching
of the one into the other: a copy of the prompts is the window from the restored position to END, from the first
restored layer up (`neuroplast.interventions.activation_patching.patch_sites`). Restored is, at one position,

- `residual`: the residual stream entering a layer,
- `attention`, `mlp`: their outputs in a window of layers about the layer, `window // 2` below it and the rest from it
  up, cut off at either end of the model; alone, one layer's output is too little to see.

Sign: effect = LD(restored) - LD(noised), in logits, the mean over the draws; positive: it brings the answer back. Put
back at all noised positions, the residual stream entering layer 0 brings back LD(clean) - LD(noised).

Noise: Gaussian, σ = 3 × the standard deviation of the embeddings. It is a function of seed, draw, row of the prompt and
position, whatever else is noised and however the work is cut, so checkpoints get the same draws, times their own σ.

Deviations: the metric is LD, not the probability of the answer. The standard deviation is that of the vocabulary's
embeddings, not of a sample of subjects. The window grows with the model (10 of GPT-2 XL's 48 layers in the paper, a
fifth of the layers here). Draws are 3, not 10: means here are over prompts too, which differ more than draws do (on IOI
in SmolLM2-135M, three times the variance of LD(noised)), so a prompt more says more than a draw more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.activation_patching import BASE_PLACES, patch_sites, place_of, values_differ
from neuroplast.interventions.chunks import Chunk, Progress
from neuroplast.interventions.pairs import Pair, recorded_bytes
from neuroplast.interventions.selection import Group, position_mask, require_prompts
from neuroplast.models.network import Network
from neuroplast.models.recording import Edit, Place
from neuroplast.statistics import bootstrap_weights, interval
from neuroplast.tasks.prompts import PromptSet

Kind = Literal["residual", "attention", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)

DEVIATIONS = 3.0
"""σ in standard deviations of the embeddings."""
N_NOISE = 3
WINDOW_SHARE = 1 / 5
"""Share of the layers that a window covers."""
ROWS_A_PART = 4096
"""Rows of the vocabulary whose embeddings are looked at together."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the embeddings of some tokens."""

    positions: tuple[str, ...]
    """Whose tokens' embeddings get it."""
    sigma: float
    """Its standard deviation."""
    draws: int
    """How often it is drawn."""
    seed: int
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not (isfinite(self.sigma) and self.sigma > 0):
            raise InputError(f"noise with σ = {self.sigma}: expected a number above 0, or None for {DEVIATIONS:g} std")
        if self.draws < 1:
            raise InputError(f"{self.draws} draws of the noise: expected at least 1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} of the noise: expected 0 or more")
        if not self.positions:
            raise InputError("no tokens to noise: name some of the prompts' positions")

    def draw(
        self, chosen: Bool[Tensor, "prompt pos"], draws: Sequence[int], rows: Sequence[int], d_model: int
    ) -> Float[Tensor, "prompt pos d_model"]:
        """Its values, on the CPU in float32; 0 at positions that are not chosen.

        Args:
            chosen: the noised positions.
            draws: the number of the draw of each prompt.
            rows: where each prompt stands in the whole set.
            d_model: width of the embeddings.
        """
        noise = np.zeros((*chosen.shape, d_model), dtype=np.float32)
        for prompt, position in chosen.nonzero().tolist():
            generator = np.random.default_rng((self.seed, draws[prompt], rows[prompt], position))
            noise[prompt, position] = self.sigma * generator.standard_normal(d_model, dtype=np.float32)
        return torch.from_numpy(noise)


@dataclass(frozen=True)
class Shares:
    """Means over prompts as shares of what the noise took: 0 brings nothing back, 1 all of it."""

    values: Float[np.ndarray, "kind layer position"] | None
    """Mean effect ÷ (mean LD clean - mean LD noised)."""
    low: Float[np.ndarray, "kind layer position"] | None = None
    """Lower end of the 95 % bootstrap interval over prompts."""
    high: Float[np.ndarray, "kind layer position"] | None = None
    """Upper end."""
    why: str | None = None
    """Why there are none."""


@dataclass(frozen=True)
class Trace:
    """What each restored value brings back of the logit difference; on the CPU, in float32."""

    kinds: tuple[Kind, ...]
    """What was restored."""
    positions: tuple[str, ...]
    """Where: the prompts' named positions."""
    noise: Noise
    """The noise."""
    window: int
    """Layers whose `attention` or `mlp` was restored together."""
    effects: Float[Tensor, "kind layer position prompt"]
    """LD(restored) - LD(noised), in logits, the mean over the draws."""
    clean: Float[Tensor, "prompt"]
    """LD of the clean run."""
    noised: Float[Tensor, "prompt"]
    """LD of the noised runs, the mean over the draws."""

    @property
    def mean(self) -> Float[np.ndarray, "kind layer position"]:
        """The mean effects over prompts, in logits."""
        return self.effects.mean(dim=-1).numpy()

    def shares(self, seed: int = 0) -> Shares:
        """The indirect effects as shares of LD(clean) - LD(noised), prompts resampled together.

        They are undefined where the interval of that difference includes 0: the noise took nothing to bring back.
        Where a model prefers the foil, the noise takes that preference, and shares are of it.

        Args:
            seed: seed of the bootstrap.
        """
        lost = (self.clean - self.noised).double().numpy()
        weights = bootstrap_weights(len(lost), seed)
        taken = weights @ lost
        low, high = (float(end) for end in interval(taken))
        if low <= 0 <= high:
            about = f"{lost.mean():.3g} [{low:.3g}, {high:.3g}]"
            return Shares(None, why=f"undefined: the noise changed the logit difference by {about}, within the noise")
        effects = self.effects.double().numpy()
        samples = np.einsum("klpn,sn->sklp", effects, weights) / taken[:, None, None, None]
        return Shares(effects.mean(axis=-1) / lost.mean(), *interval(samples))


def causal_trace(
    model: Network,
    prompts: PromptSet,
    *,
    noised: str | Iterable[str] | None = None,
    kinds: str | Iterable[str] = KINDS,
    sigma: float | None = None,
    n_noise: int = N_NOISE,
    window: int | None = None,
    seed: int = 0,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Restores clean values, one at a time, in runs whose prompts were noised: every layer, every named position.

    Args:
        model: the instrumented model.
        prompts: clean prompts with named positions; their counterfactuals do not matter.
        noised: names of the positions whose embeddings get noise, such as `io,s1,s2`; None takes all but `end` and
            neighbours of others, such as `s1+1`.
        kinds: what is restored: `residual`, `attention`, `mlp`.
        sigma: standard deviation of the noise; None takes 3 × that of the vocabulary's embeddings.
        n_noise: draws of the noise, over which effects are averaged.
        window: layers whose `attention` or `mlp` is restored together; None takes a fifth of them.
        seed: seed of the noise.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for an unknown position or kind, noise or a window that cannot be, or a budget that is too small.
    """
    require_prompts(prompts)
    wanted = _names(kinds, "kind of value to restore", KINDS)
    found: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in set(wanted))
    if not found:
        raise InputError(f"nothing to restore: expected some of {', '.join(KINDS)}")
    if "mlp" in found:
        model.require_mlps()
    if window is None:
        window = max(1, round(WINDOW_SHARE * model.n_layers))
    if window < 1:
        raise InputError(f"a window of {window} layers: expected at least 1")
    sigma = DEVIATIONS * embedding_deviation(model) if sigma is None else sigma
    noise = Noise(_noised_positions(prompts, noised), sigma, n_noise, seed)
    groups = [
        tuple(Node(kind, each, position=position) for each in _layers(model, kind, layer, window))
        for kind in found
        for layer in range(model.n_layers)
        for position in prompts.positions
    ]
    effects, clean, after = restore(model, prompts, groups, noise, memory=memory, progress=progress)
    effects = effects.view(len(found), model.n_layers, len(prompts.positions), len(prompts))
    return Trace(found, tuple(prompts.positions), noise, window, effects, clean, after)


def restore(
    model: Network,
    prompts: PromptSet,
    groups: Sequence[Group],
    noise: Noise,
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "site prompt"], Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
    """Restores the clean values of groups of nodes, each group alone, in noised runs.

    Args:
        model: the instrumented model.
        prompts: clean prompts.
        groups: what is restored together.
        noise: the noise.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Returns:
        LD(restored) - LD(noised) and LD(noised) as means over the draws, and between them LD(clean).
    """
    n = len(prompts)
    places: set[Place] = {place_of(node) for group in groups for node in group}
    kept: set[Place] = {*BASE_PLACES, *places}

    def build_pair(chunk: Chunk) -> Pair:
        chosen = torch.stack([position_mask(chunk.prompts, name) for name in noise.positions]).any(dim=0)
        draws, rows = (chunk.rows // n).tolist(), (chunk.rows % n).tolist()
        values = noise.draw(chosen.cpu(), draws, rows, model.d_model).to(model.device)
        edit = Edit("residual", chosen[:, None], values[:, None], adds=True)
        # Nothing that stands before the noise can be restored.
        touched = replace(chunk, changed=(chosen.cumsum(dim=1) > 0) & position_mask(chunk.prompts, None))
        return Pair(model, touched, kept, places, donor=model, base_edits={0: [edit]})

    noises = model.module.dtype.itemsize * prompts.width * model.d_model
    effects, noised, clean = patch_sites(
        model,
        prompts.pick(torch.arange(n).repeat(noise.draws)),
        groups,
        build_pair,
        recorded_bytes(model, prompts.width, (kept, places)) + 2 * noises,
        differs=values_differ,
        memory=memory,
        progress=progress,
    )
    return effects.unflatten(1, (noise.draws, n)).mean(dim=1), clean[:n], noised.view(noise.draws, n).mean(dim=0)


@torch.no_grad()
def embedding_deviation(model: Network) -> float:
    """The standard deviation of the embeddings of the whole vocabulary, scaled where the model scales them."""
    embedding: Callable[[Tensor], Tensor] = model.module.get_input_embeddings()
    count, total, squares = 0, 0.0, 0.0
    for tokens in torch.arange(int(model.module.config.vocab_size), device=model.device).split(ROWS_A_PART):
        values = embedding(tokens[None]).double()
        count, total, squares = (
            count + values.numel(),
            total + float(values.sum()),
            squares + float(values.square().sum()),
        )
    return ((squares - total**2 / count) / (count - 1)) ** 0.5


def _layers(model: Network, kind: Kind, layer: int, window: int) -> range:
    """The layers that are restored together."""
    if kind == "residual":
        return range(layer, layer + 1)
    first = layer - window // 2
    return range(max(0, first), min(model.n_layers, first + window))


def _noised_positions(prompts: PromptSet, noised: str | Iterable[str] | None) -> tuple[str, ...]:
    names = prompts.positions
    if noised is None:
        found = tuple(name for name in names if name != "end" and not _is_neighbour(name, names))
        if not found:
            raise InputError("these prompts name no position but end: say which to noise, such as noised=['end']")
        return found
    return _names(noised, "position", names)


def _names(given: str | Iterable[str], what: str, known: Iterable[str]) -> tuple[str, ...]:
    """Names of a list or of a text, each once; all must be known."""
    found = tuple(dict.fromkeys(name.strip() for name in (given.split(",") if isinstance(given, str) else given)))
    if unknown := [name for name in found if name not in known]:
        raise unknown_name(what, unknown[0], known)
    return found


def _is_neighbour(name: str, names: Mapping[str, Tensor]) -> bool:
    """Whether a position is named after another, such as `s1+1` after `s1`."""
    word, plus, offset = name.rpartition("+")
    return bool(plus) and offset.isdecimal() and word in names
