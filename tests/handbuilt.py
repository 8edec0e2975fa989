"""Small transformers built by hand, whose circuits are known exactly: what circuit discovery must find.

The residual stream is cut into *features*, each a subspace of its own: a token's identity, its position, which
token stood before it, what is to be said, … A head is written down as what it attends by (pairs of features, whose
products are the attention scores) and what it moves (features that its value reads, and where they are written). A
feature is held twice, as x and as -x, so that the mean is 0; and `one`, a feature that never changes, is so large that
nothing else moves the scale of a norm. A norm's gain takes that scale back, so everything reads features in the
units in which they were written. Attention is sharp, but it is the softmax of moderate scores.

Every model has decoys: heads that attend and write as the real ones do, but into features (`spare`, `hoard`) that
neither heads nor logits read; a head that only a decoy reads (`echo`); heads that write nothing; heads that move a
logit that is not compared, or all logits alike. MLPs are random, and write into `hoard`.

What each node and edge does follows from the weights on paper: effects are given as shares of LD, with the sign of
LD(patched) - LD(clean), so a negative one says that it helps the task. A mover that attends to IO and then, not
inhibited any more, to IO, S1 and S2 alike, goes from 1 to 1/3 - 2/3: a change of -4/3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

N_HEADS = 4
ONE = 100.0
"""The constant that sets the scale of every norm; the other features are about 1."""
LOGIT = 8.0
"""Logit of a token whose share in the feature `out` is 1."""
ROTARY = 8
"""Dimensions of a GPT-NeoX head that are rotated by position; its other ones see no positions."""
BOS = 0
MLP_WIDTH = 8
CONTEXT = 14


@dataclass(frozen=True)
class Head:
    """A head, in features; without any, it writes nothing."""

    attends: Sequence[tuple[str, str, float]] = ()
    """Terms of the attention score: feature of the query, feature of the key, weight of their product."""
    moves: Sequence[tuple[str, str, float]] = ()
    """Feature that the value reads, feature that it is written into (a single number into all of it), weight."""
    shuns_near: float = 0.0
    """GPT-NeoX: a key at distance d loses this much times the sum of cos(f d) over the rotary frequencies f."""


@dataclass(frozen=True)
class HandBuilt:
    """A model with its circuit."""

    network: Network
    """The model."""
    prompts: Callable[[int, int], PromptSet]
    """Makes n prompts from a seed."""
    nodes: Mapping[str, float]
    """The circuit's heads at their positions. Effect on all that reads them with that sign, together, ÷ LD."""
    edges: Mapping[str, float]
    """All its edges between heads and to the logits. Effect ÷ LD."""
    attended: Mapping[str, str]
    """The position that each of those heads attends to."""
    silent: frozenset[str]
    """Decoys that write nothing."""
    constant: frozenset[str]
    """Decoys that write the same on every prompt. The others write what changes with the prompt."""
    backups: Mapping[str, float] = field(default_factory=dict)
    """Edges to the logits that are there only while the movers are knocked out. Effect then ÷ LD of the whole model."""
    backup_reads: Mapping[str, float] = field(default_factory=dict)
    """Edges into backups. They are there in the whole model: a backup keeps silent because of what it reads."""

    @property
    def movers(self) -> tuple[str, ...]:
        """The nodes that write to the logits and help."""
        return tuple(node for node in self.nodes if self.edges.get(f"{node}->logits@end", 0) < 0)


class Stream:
    """The features of a residual stream, and how they are written and read."""

    def __init__(self, sizes: Mapping[str, int], rotary: int = 0) -> None:
        self.sizes = {"one": 1, **sizes}
        self.rotary = rotary
        self.d_head = 32 * -(-2 * sum(self.sizes.values()) // (32 * N_HEADS))
        self.d_model = N_HEADS * self.d_head
        self._first: dict[str, int] = {}
        for name, size in self.sizes.items():
            self._first[name] = sum(self.sizes[before] for before in self._first)
            assert self._first[name] + size <= self.d_model // 2

    @property
    def gain(self) -> float:
        """What a norm multiplies by to give features back as they were."""
        return ONE * (2 / self.d_model) ** 0.5

    def writing(self, name: str) -> Tensor:
        """(feature, d_model): what a feature adds to the stream."""
        rows = torch.arange(self.sizes[name])
        plus = self._first[name] + rows
        matrix = torch.zeros(len(rows), self.d_model)
        matrix[rows, plus], matrix[rows, plus + self.d_model // 2] = 1.0, -1.0
        return matrix

    def reading(self, name: str) -> Tensor:
        """(d_model, feature): what a feature is read by behind a norm; `one` reads as 1."""
        return self.writing(name).T / (2 * ONE if name == "one" else 2)

    def head(self, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_Q, W_K and W_V of shape (d_model, d_head), W_O of shape (d_head, d_model)."""
        query, key, value, output = torch.zeros(4, self.d_model, self.d_head)
        output = output.T.contiguous()
        score = self.d_head**0.5
        if head.shuns_near:
            query[:, : self.rotary // 2] = -head.shuns_near * score * self.reading("one")
            key[:, : self.rotary // 2] = self.reading("one")
        last = self.rotary
        for asking, offering, weight in head.attends:
            here = slice(last, last := last + self.sizes[asking])
            query[:, here], key[:, here] = weight * score * self.reading(asking), self.reading(offering)
        last = 0
        for taken, given, weight in head.moves:
            here = slice(last, last := last + self.sizes[taken])
            into = self.writing(given)
            value[:, here] = self.reading(taken)
            output[here] = weight * (into if self.sizes[taken] > 1 else into.sum(dim=0))
        return query, key, value, output

    def mlp(self, layer: int) -> tuple[Tensor, Tensor]:
        """Random maps (d_model, hidden) and (hidden, d_model): they read all that changes, and write into `hoard`."""
        generator = torch.Generator().manual_seed(layer)
        names = [name for name in self.sizes if name != "one"]
        reading = torch.cat([self.reading(name) for name in names], dim=1)
        into = reading @ torch.randn(reading.shape[1], MLP_WIDTH, generator=generator)
        return into, torch.randn(MLP_WIDTH, self.sizes["hoard"], generator=generator) * 0.05 @ self.writing("hoard")

    def embedding(self, features: Mapping[str, Tensor]) -> Tensor:
        """(token or position, d_model)."""
        return sum((values @ self.writing(name) for name, values in features.items()), start=torch.zeros(()))

    def unembedding(self, n_tokens: int) -> Tensor:
        """(token, d_model): tokens 1 to the size of `out` are said, others have logit 0."""
        matrix = torch.zeros(n_tokens, self.d_model)
        matrix[1 : 1 + self.sizes["out"]] = LOGIT * self.reading("out").T
        return matrix


def _flags(n_rows: int, rows: Sequence[int]) -> Tensor:
    column = torch.zeros(n_rows, 1)
    column[list(rows)] = 1.0
    return column


def _identities(n_rows: int, first: int, size: int) -> Tensor:
    """Rows `first`, `first + 1`, … are one-hot."""
    matrix = torch.zeros(n_rows, size)
    rows = torch.arange(first, min(n_rows, first + size))
    matrix[rows, rows - first] = 1.0
    return matrix


Heads = Sequence[Sequence[Head]]
"""By layer, its heads."""


@torch.no_grad()
def build_gpt2(
    stream: Stream, heads: Heads, tokens: Mapping[str, Tensor], places: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A GPT-2.

    Args:
        stream: the features.
        heads: the heads.
        tokens: by feature, what each token of the vocabulary has of it.
        places: likewise each position of the context.
    """
    table = stream.embedding(tokens)
    config = GPT2Config(
        vocab_size=len(table), n_embd=stream.d_model, n_layer=len(heads), n_head=N_HEADS, n_positions=CONTEXT,
        n_inner=MLP_WIDTH, bos_token_id=BOS, eos_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.zero_()
    model.transformer.wte.weight.copy_(table)
    model.transformer.wpe.weight.copy_(stream.embedding(places))
    model.transformer.ln_f.weight.fill_(stream.gain)
    model.lm_head.weight.copy_(stream.unembedding(len(table)))
    for number, (layer, mine) in enumerate(zip(model.transformer.h, heads, strict=True)):
        layer.ln_1.weight.fill_(stream.gain)
        layer.ln_2.weight.fill_(stream.gain)
        query, key, value, output = zip(*map(stream.head, mine), strict=True)
        layer.attn.c_attn.weight.copy_(torch.cat([*query, *key, *value], dim=1))
        layer.attn.c_proj.weight.copy_(torch.cat(output))
        into, out_of = stream.mlp(number)
        layer.mlp.c_fc.weight.copy_(into)
        layer.mlp.c_proj.weight.copy_(out_of)
    return model


@torch.no_grad()
def build_gpt_neox(stream: Stream, heads: Heads, tokens: Mapping[str, Tensor]) -> PreTrainedModel:
    """A GPT-NeoX: attention and MLP side by side, positions by rotation only. Arguments as those of a GPT-2."""
    table = stream.embedding(tokens)
    rotation = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": ROTARY / stream.d_head}
    config = GPTNeoXConfig(
        vocab_size=len(table), hidden_size=stream.d_model, num_hidden_layers=len(heads), num_attention_heads=N_HEADS,
        intermediate_size=MLP_WIDTH, max_position_embeddings=CONTEXT, rope_parameters=rotation,
        bos_token_id=BOS, eos_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        parameter.zero_()
    model.gpt_neox.embed_in.weight.copy_(table)
    model.gpt_neox.final_layer_norm.weight.fill_(stream.gain)
    model.lm_head.weight.copy_(stream.unembedding(len(table)))
    for number, (layer, mine) in enumerate(zip(model.gpt_neox.layers, heads, strict=True)):
        layer.input_layernorm.weight.fill_(stream.gain)
        layer.post_attention_layernorm.weight.fill_(stream.gain)
        maps = [stream.head(head) for head in mine]
        layer.attention.query_key_value.weight.copy_(torch.cat([torch.cat(each[:3], dim=1) for each in maps], dim=1).T)
        layer.attention.dense.weight.copy_(torch.cat([output for *_, output in maps]).T)
        into, out_of = stream.mlp(number)
        layer.mlp.dense_h_to_4h.weight.copy_(into.T)
        layer.mlp.dense_4h_to_h.weight.copy_(out_of.T)
    return model


# Induction: … A B … A -> B.

LETTERS = 16


def build_induction() -> HandBuilt:
    """Says what followed the last token when it stood before, by a previous-token head and an induction head.

    a0.h1 at first+1 attends to `first` and writes its letter into `before`. a2.h2 at END looks with its own letter
    for a key whose `before` is that letter, and moves the letter that stands there to the logits. So the
    previous-token head reaches it through its key at first+1 alone: its value reads the embedding, its query too.
    """
    letters = dict.fromkeys(("tok", "before", "out", "spare", "echo", "hoard"), LETTERS)
    stream = Stream({**letters, "bos": 1, "place": CONTEXT, "previous place": CONTEXT})
    to_previous = [("previous place", "place", 7.0)]
    to_twin = [("tok", "tok", 14.0), ("place", "place", -14.0), ("one", "bos", 7.0)]
    by_induction = [("tok", "before", 9.0), ("one", "bos", 4.0)]
    to_bos = [("one", "bos", 7.0)]
    heads = [
        [
            Head(to_twin, [("tok", "hoard", 1.0)]),
            Head(to_previous, [("tok", "before", 1.0)]),
            Head(to_previous, [("tok", "spare", 1.0)]),
            Head([("place", "place", 7.0)], [("tok", "echo", 1.0)]),
        ],
        [
            Head([("tok", "echo", 7.0), ("one", "bos", 2.0)], [("tok", "hoard", 1.0)]),
            Head(),
            Head([("place", "place", 7.0)], [("before", "hoard", 1.0)]),
            Head(to_bos, [("one", "out", 0.3)]),
        ],
        [
            Head(by_induction, [("tok", "hoard", 1.0)]),
            Head(to_twin, [("tok", "out", 0.5)]),
            Head(by_induction, [("tok", "out", 1.0)]),
            Head(to_bos, [("one", "hoard", 1.0)]),
        ],
    ]
    n_tokens = 1 + LETTERS
    tokens = {
        "one": torch.full((n_tokens, 1), ONE),
        "bos": _flags(n_tokens, [BOS]),
        "tok": _identities(n_tokens, 1, LETTERS),
    }
    places = {
        "place": _identities(CONTEXT, 0, CONTEXT),
        "previous place": _identities(CONTEXT, 1, CONTEXT),
    }
    return HandBuilt(
        build_network(build_gpt2(stream, heads, tokens, places), None, "induction"),
        induction_prompts,
        {"a0.h1@first+1": -1.0, "a2.h2@end": -2.0},
        {"a0.h1@first+1->a2.h2<k>@first+1": -1.0, "a2.h2@end->logits@end": -2.0},
        {"a0.h1@first+1": "first", "a2.h2@end": "first+1"},
        silent=frozenset({"a1.h1"}),
        constant=frozenset({"a1.h3", "a2.h3"}),
    )


def induction_prompts(n: int, seed: int) -> PromptSet:
    """`BOS … A B … A`, of 8 to 10 letters; the counterfactual says D C in place of A B, and the foil is C."""
    rng = Random(seed)
    clean: list[list[int]] = []
    counterfactual: list[list[int]] = []
    choices: list[tuple[int, int]] = []
    first: list[int] = []
    for _ in range(n):
        a, b, c, d, *others = rng.sample(range(1, 1 + LETTERS), 4 + 7)
        length, at = rng.randint(8, 10), rng.randint(1, 4)
        others = others[: length - 3]
        clean.append([BOS, *others[:at], a, b, *others[at:], a])
        counterfactual.append([BOS, *others[:at], d, c, *others[at:], d])
        choices.append((b, c))
        first.append(1 + at)
    return _prompt_set(
        "induction", clean, counterfactual, choices, {"first": first, "first+1": [at + 1 for at in first]}
    )


# Indirect object identification: … IO … S … S … TO -> IO.

NAMES = 16
TO = 1 + NAMES
FILLERS = range(TO + 1, TO + 7)
LATE = 8
"""GPT-2 only: positions from here on are late; S2 is the only late name."""


def build_copier(backup: bool = False) -> HandBuilt:
    """Says the name that was not repeated: a GPT-2 with two name movers and a negative one.

    a0.h2 at S2 attends to S1 and writes its name into `repeated`. a1.h1 at END attends to S2 (a name, and late),
    and moves what is `repeated` there into `inhibited`: it reads a0.h2 through its value alone. a2.h0 and a2.h3 at
    END attend to names, except to the inhibited one, and move them to the logits; a3.h1 does so with a minus. All
    three read a1.h1 through their query.

    Args:
        backup: adds a name mover a3.h2 that shuns also the name that a2.h0 has moved, so it stays on BOS. Knocked
            out, a2.h0 gives the mean over other names, and a3.h2 moves IO.
    """
    sizes = dict.fromkeys(("tok", "repeated", "inhibited", "out", "moved", "spare", "echo", "hoard"), NAMES)
    stream = Stream({**sizes, "name": 1, "to": 1, "bos": 1, "late": 1, "place": CONTEXT})
    to_twin = [("tok", "tok", 14.0), ("place", "place", -14.0), ("one", "bos", 7.0)]
    to_late_name = [("to", "name", 7.0), ("to", "late", 7.0), ("one", "bos", 5.0)]
    heads = _copier_heads(to_twin, to_late_name)
    heads[0][1] = Head([("place", "place", 7.0)], [("tok", "echo", 1.0)])
    extra: dict[str, Mapping[str, float]] = {}
    if backup:
        heads[2][0] = Head(TO_FREE_NAME, [("tok", "out", 1.0), ("tok", "moved", 1.0)])
        heads[3][2] = Head(
            [("to", "name", 20.0), ("inhibited", "tok", -20.0), ("moved", "tok", -48.0), ("one", "bos", 9.0)],
            [("tok", "out", 0.75)],
        )
        extra = {
            "backups": {"a3.h2@end->logits@end": -0.75},
            "backup_reads": {"a1.h1@end->a3.h2<q>@end": -0.75, "a2.h0@end->a3.h2<q>@end": 0.75},
        }
    tokens = _copier_tokens()
    places = {
        "place": _identities(CONTEXT, 0, CONTEXT),
        "late": _flags(CONTEXT, range(LATE, CONTEXT)),
    }
    return HandBuilt(
        build_network(build_gpt2(stream, heads, tokens, places), None, "copier with a backup" if backup else "copier"),
        copier_prompts,
        COPIER_NODES,
        {"a0.h2@s2->a1.h1<v>@s2": -4 / 3, **COPIER_EDGES},
        COPIER_ATTENDED,
        silent=frozenset({"a1.h3"} if backup else {"a1.h3", "a3.h2"}),
        constant=frozenset({"a2.h2"}),
        **extra,
    )


def build_parallel_copier() -> HandBuilt:
    """The same task in a GPT-NeoX. a1.h1 finds S2 by a flag that a0.h2 sets there, so it reads its key and its value.

    Rotated dimensions keep a0.h2 from attending to S2 itself.
    """
    sizes = dict.fromkeys(("tok", "repeated", "inhibited", "out", "spare", "echo", "hoard"), NAMES)
    stream = Stream({**sizes, "name": 1, "to": 1, "bos": 1, "flag": 1}, ROTARY)
    to_twin = [("tok", "tok", 30.0), ("one", "bos", 16.0)]
    heads = _copier_heads(to_twin, [("to", "flag", 9.0), ("one", "bos", 4.0)], shuns_near=5.0)
    finder = heads[0][2]
    heads[0][1] = Head([("tok", "tok", 7.0), ("one", "bos", 2.0)], [("tok", "echo", 1.0)])
    heads[0][2] = Head(finder.attends, [*finder.moves, ("name", "flag", 1.0)], finder.shuns_near)
    return HandBuilt(
        build_network(build_gpt_neox(stream, heads, _copier_tokens()), None, "parallel copier"),
        copier_prompts,
        COPIER_NODES,
        {"a0.h2@s2->a1.h1<k>@s2": -4 / 3, "a0.h2@s2->a1.h1<v>@s2": -4 / 3, **COPIER_EDGES},
        COPIER_ATTENDED,
        silent=frozenset({"a1.h3", "a3.h2"}),
        constant=frozenset({"a2.h2"}),
    )


TO_FREE_NAME = [("to", "name", 8.0), ("inhibited", "tok", -8.0), ("one", "bos", 1.0)]
COPIER_NODES = {"a0.h2@s2": -4 / 3, "a1.h1@end": -2.0, "a2.h0@end": -1.0, "a2.h3@end": -0.5, "a3.h1@end": 0.5}
COPIER_EDGES = {
    "a1.h1@end->a2.h0<q>@end": -4 / 3,
    "a1.h1@end->a2.h3<q>@end": -2 / 3,
    "a1.h1@end->a3.h1<q>@end": 2 / 3,
    "a2.h0@end->logits@end": -1.0,
    "a2.h3@end->logits@end": -0.5,
    "a3.h1@end->logits@end": 0.5,
}
COPIER_ATTENDED = {"a0.h2@s2": "s1", "a1.h1@end": "s2", "a2.h0@end": "io", "a2.h3@end": "io", "a3.h1@end": "io"}


def _copier_heads(
    to_twin: Sequence[tuple[str, str, float]], to_second: Sequence[tuple[str, str, float]], shuns_near: float = 0.0
) -> list[list[Head]]:
    """What the copiers have in common; a0.h1 is left to them."""
    to_bos = [("one", "bos", 7.0)]
    return [
        [
            Head(to_twin, [("tok", "spare", 1.0)], shuns_near),
            Head(),
            Head(to_twin, [("tok", "repeated", 1.0)], shuns_near),
            Head([("one", "name", 3.0)], [("tok", "hoard", 1.0)]),
        ],
        [
            Head(to_second, [("repeated", "spare", 1.0), ("tok", "hoard", 1.0)]),
            Head(to_second, [("repeated", "inhibited", 1.0)]),
            Head([("to", "name", 7.0), ("one", "bos", 1.0)], [("echo", "hoard", 1.0)]),
            Head(),
        ],
        [
            Head(TO_FREE_NAME, [("tok", "out", 1.0)]),
            Head(TO_FREE_NAME, [("tok", "hoard", 1.0)]),
            Head(to_bos, [("one", "out", 0.3)]),
            Head(TO_FREE_NAME, [("tok", "out", 0.5)]),
        ],
        [
            Head([("to", "to", 7.0)], [("inhibited", "hoard", 1.0)]),
            Head(TO_FREE_NAME, [("tok", "out", -0.5)]),
            Head(),
            Head([("inhibited", "tok", 7.0), ("one", "bos", 2.0)], [("tok", "spare", 1.0)]),
        ],
    ]


def _copier_tokens() -> dict[str, Tensor]:
    n_tokens = FILLERS.stop
    return {
        "one": torch.full((n_tokens, 1), ONE),
        "bos": _flags(n_tokens, [BOS]),
        "tok": _identities(n_tokens, 1, NAMES),
        "name": _flags(n_tokens, range(1, TO)),
        "to": _flags(n_tokens, [TO]),
    }


def copier_prompts(n: int, seed: int) -> PromptSet:
    """`BOS … N1 . N2 … S2 . TO` in both orders and two lengths; the counterfactual has three other names."""
    rng = Random(seed)
    clean: list[list[int]] = []
    counterfactual: list[list[int]] = []
    choices: list[tuple[int, int]] = []
    positions: dict[str, list[int]] = {"io": [], "s1": [], "s2": []}
    for _ in range(n):
        io, s, *three = rng.sample(range(1, TO), 5)
        io_first, gap = rng.random() < 0.5, rng.randint(3, 4)
        words = rng.choices(FILLERS, k=5 + gap)
        clean_names = (io, s, s) if io_first else (s, io, s)
        for rows, (one, two, last) in ((clean, clean_names), (counterfactual, three)):
            rows.append([BOS, *words[:3], one, words[3], two, *words[4:-1], last, words[-1], TO])
        choices.append((io, s))
        for name, at in zip(positions, (4, 6, 7 + gap) if io_first else (6, 4, 7 + gap), strict=True):
            positions[name].append(at)
    return _prompt_set("copier", clean, counterfactual, choices, positions)


def _prompt_set(
    task: str,
    clean: Sequence[Sequence[int]],
    counterfactual: Sequence[Sequence[int]],
    choices: Sequence[tuple[int, int]],
    positions: Mapping[str, Sequence[int]],
) -> PromptSet:
    width = max(map(len, clean))
    tokens, others = (
        torch.tensor([[*row, *[BOS] * (width - len(row))] for row in rows]) for rows in (clean, counterfactual)
    )
    answer, foil = torch.tensor(choices).unbind(dim=1)
    named = {**positions, "end": [len(row) - 1 for row in clean]}
    indices = {name: torch.tensor(index) for name, index in named.items()}
    return PromptSet(task, (), tokens, others, answer, foil, indices)


MODELS: Mapping[str, Callable[[], HandBuilt]] = {
    "induction": build_induction,
    "copier": build_copier,
    "copier with a backup": lambda: build_copier(backup=True),
    "parallel copier": build_parallel_copier,
}
