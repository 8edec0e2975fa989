"""What heads do, in numbers: against one full forward pass of one unpadded prompt a number, on every architecture."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from architectures import VOCABULARY, random_model
from handbuilt import MODELS
from neuroplast.circuits import copying, head_measures
from neuroplast.circuits.head_measures import Measured, measure_heads, repeated_tokens
from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError
from neuroplast.interventions import chunks
from neuroplast.models.build import build_network
from neuroplast.models.network import Network, weight_of
from neuroplast.models.sources import load_model
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, Prompt, prompts_of

HEADS = [
    parse_node(name)
    for name in ("a0.h0@end", "a1.h3@end", "a2.h2@end", "a2.h1@b", "a1.h0@a", "a2.h3@other", "a0.h2@1", "a1.h1")
]


@pytest.fixture
def prompts() -> PromptSet:
    """Six random prompts of mixed lengths; four say their answer and foil, once or twice, one only its answer."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([9, 6, 8, 9, 7, 8])
    clean, other = torch.randint(1, VOCABULARY, (2, 6, 9), generator=generator)
    clean[0, 5] = clean[0, 1]
    answer, foil = clean[:, 1].clone(), clean[:, 4].clone()
    answer[4], foil[4], foil[5] = 57, 58, 59
    clean = torch.where(clean >= 57, 3, clean)
    positions = {"a": torch.tensor([4, 1, 2, 3, 3, 2]), "b": torch.tensor([4, 3, 1, 6, 5, 5]), "end": lengths - 1}
    return PromptSet("random", (), clean, other, answer, foil, positions)


class Slow:
    """The measures by their definitions."""

    def __init__(self, family: str) -> None:
        self.family, self.oracle = family, Oracle(random_model(family), family)
        self.model, names = self.oracle.model, self.oracle.names
        self.norm, self.unembedding = self.model.get_submodule(names.final_norm), self.model.lm_head
        self.d_head = len(self._projection(0)) // self.oracle.n_heads

    def _projection(self, layer: int) -> torch.Tensor:
        return weight_of(self.oracle.part("projection", layer))

    def output(self, z: torch.Tensor, layer: int, head: int) -> torch.Tensor:
        return z @ self._projection(layer)[head * self.d_head : (head + 1) * self.d_head]

    def after(self, layer: int, attention: torch.Tensor) -> torch.Tensor:
        """What reaches the residual stream of an attention's output."""
        if self.family != "gemma3":
            return attention
        return self.oracle.part("layer", layer).post_attention_layernorm(attention)

    def copies(self, prompt: Prompt, layer: int, head: int, sign: int) -> list[bool]:
        after_block_0 = self.oracle.run(prompt.clean).seen["residual", 1, 0]
        read = {("residual", layer, 0): (prompt.where(None), after_block_0)}
        value = self.oracle.run(prompt.clean, read).seen["v", layer, head]
        found = []
        for at, token in enumerate(prompt.clean.tolist()):
            if token in (prompt.answer, prompt.foil):
                written = self.after(layer, sign * self.output(value[at], layer, head))
                found.append(token in self.unembedding(self.norm(written)).topk(5).indices)
        return found

    def attention(self, prompt: Prompt, node: Node, key: int) -> float:
        pattern = self.oracle.run(prompt.clean).seen["pattern", node.layer, node.head]
        shares = [pattern[query, key] for query in stands(prompt, node) if query >= key]
        return float(torch.stack(shares).mean()) if shares else float("nan")

    def adds(self, prompt: Prompt, node: Node) -> list[float]:
        """To the logits of answer and foil."""
        now = self.oracle.run(prompt.clean)
        output = self.output(now.seen["z", node.layer, node.head][-1], node.layer, node.head)
        attention = now.seen["attention", node.layer, 0][-1]
        output = self.after(node.layer, attention) - self.after(node.layer, attention - output)
        final: list[torch.Tensor] = []
        handle = self.norm.register_forward_pre_hook(lambda _, args: final.append(args[0][0, -1]))
        self.oracle.run(prompt.clean)
        handle.remove()
        gain = self.norm.weight + 1 if self.family == "gemma3" else self.norm.weight
        if hasattr(self.norm, "bias"):
            output = output - output.mean()
            scale = (final[0].var(unbiased=False) + 1e-5).sqrt()
        else:
            scale = final[0].pow(2).mean().sqrt()
        logits = self.unembedding.weight @ (gain * output / scale)
        return [float(logits[token] - logits.mean()) for token in (prompt.answer, prompt.foil)]


def stands(prompt: Prompt, node: Node) -> list[int]:
    if node.position == "other":
        return [at for at in range(len(prompt.clean)) if at not in prompt.positions.values()]
    return prompt.where(node.position).nonzero()[:, 0].tolist()


def mean_and_error(samples: list[float]) -> tuple[float | None, float | None]:
    found = [each for each in samples if each == each]
    if not found:
        return None, None
    return float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None


def agrees(found: Measured, node: Node, name: str, samples: list[float]) -> None:
    mean, error = mean_and_error(samples)
    assert found.heads[node].values[name] == pytest.approx(mean, abs=1e-5), (str(node), name)
    assert found.heads[node].errors[name] == pytest.approx(error, abs=1e-5), (str(node), name)


@torch.no_grad()
def test_copy_scores_are_the_share_of_names_among_their_own_top_five(network: Network, family: str, prompts: PromptSet):
    found = measure_heads(network, prompts, HEADS)
    slow, texts = Slow(family), prompts_of(prompts)
    scores: Mapping[str, list[float]] = {"copy": [], "negative copy": []}
    for name, sign in (("copy", 1), ("negative copy", -1)):
        for layer in range(3):
            for head in range(4):
                copied = [slow.copies(prompt, layer, head, sign) for prompt in texts]
                samples = [float(np.mean(each)) if each else float("nan") for each in copied]
                scores[name].append(np.nanmean(samples))
                for node in HEADS:
                    if (node.layer, node.head) == (layer, head):
                        agrees(found, node, name, samples)
        reference = found.reference[name]
        assert max(scores[name]) > 0
        assert reference.mean == pytest.approx(np.mean(scores[name]))
        assert reference.p95 == pytest.approx(np.quantile(scores[name], 0.95))
        assert reference.chance == pytest.approx(5 / VOCABULARY)


@torch.no_grad()
def test_attention_is_the_mean_pattern_from_where_a_head_stands(network: Network, family: str, prompts: PromptSet):
    found = measure_heads(network, prompts, HEADS)
    slow, texts = Slow(family), prompts_of(prompts)
    for node in HEADS:
        for name in prompts.positions:
            samples = [slow.attention(prompt, node, prompt.positions[name]) for prompt in texts]
            if name == node.position or not np.isfinite(samples).any():
                assert f"attention to {name}" not in found.heads[node].values
            else:
                agrees(found, node, f"attention to {name}", samples)
        agrees(found, node, "attention to first token", [slow.attention(prompt, node, 0) for prompt in texts])
        own, even = [], []
        for prompt in texts:
            pattern = slow.oracle.run(prompt.clean).seen["pattern", node.layer, node.head]
            own.append(float(np.mean([float(pattern[at, at]) for at in stands(prompt, node)])))
            even.append(float(np.mean([1 / (at + 1) for at in stands(prompt, node)])))
        agrees(found, node, "attention to own token", own)
        agrees(found, node, "even share", even)


@torch.no_grad()
def test_attribution_is_what_a_head_adds_to_the_logits_and_is_compared_with_its_attention(
    network: Network, family: str, prompts: PromptSet
):
    found = measure_heads(network, prompts, HEADS)
    slow, texts = Slow(family), prompts_of(prompts)
    for node in HEADS:
        if node.position not in ("end", None):
            assert "direct logit attribution" not in found.heads[node].values
            continue
        adds = [slow.adds(prompt, node) for prompt in texts]
        agrees(found, node, "direct logit attribution to answer", [each[0] for each in adds])
        agrees(found, node, "direct logit attribution to foil", [each[1] for each in adds])
        agrees(found, node, "direct logit attribution", [each[0] - each[1] for each in adds])
        points = []
        for prompt, mine in zip(texts, adds, strict=True):
            pattern = slow.oracle.run(prompt.clean).seen["pattern", node.layer, node.head][-1]
            for token, added in zip((prompt.answer, prompt.foil), mine, strict=True):
                if (prompt.clean == token).any():
                    points.append((float(pattern[prompt.clean == token].sum()), added))
        assert len(points) == 9
        expected = np.corrcoef(np.array(points).T)[0, 1]
        assert found.heads[node].values["output follows attention"] == pytest.approx(expected, abs=1e-4)
        assert 0 < (found.heads[node].errors["output follows attention"] or 0) < 1


@torch.no_grad()
def test_off_task_scores_are_the_attention_on_repeated_tokens(network: Network, family: str, prompts: PromptSet):
    found = measure_heads(network, prompts, HEADS, seed=3)
    tokens, first = repeated_tokens(network, 3)
    half = (tokens.shape[1] - first) // 2
    assert (first, half) == (1, 15)
    again = range(first + half, first + 2 * half)
    pairs = {
        "previous token": [(query, query - 1) for query in range(first + 1, first + 2 * half)],
        "duplicate token": [(query, query - half) for query in again],
        "induction": [(query, query - half + 1) for query in again],
    }
    oracle = Oracle(random_model(family), family)
    runs = [oracle.run(row).seen for row in tokens]
    for name, places in pairs.items():
        means = []
        for layer in range(3):
            for head in range(4):
                samples = [
                    float(np.mean([float(seen["pattern", layer, head][place]) for place in places])) for seen in runs
                ]
                means.append(np.mean(samples))
                for node in HEADS:
                    if (node.layer, node.head) == (layer, head):
                        agrees(found, node, name, samples)
        assert found.reference[name].mean == pytest.approx(np.mean(means), abs=1e-5)
        assert found.reference[name].p95 == pytest.approx(np.quantile(means, 0.95), abs=1e-5)
        assert found.reference[name].chance == pytest.approx(np.mean([1 / (query + 1) for query, _ in places]))


def test_repeated_tokens_are_different_ordinary_tokens_said_twice():
    model = load_model("tiny")
    tokens, first = repeated_tokens(model, 0)
    assert first == 1 and (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    one, two = tokens[:, 1:].chunk(2, dim=1)
    assert torch.equal(one, two) and one.shape[1] >= 10
    assert all(len(set(row)) == len(row) for row in one.tolist())
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.added_tokens_decoder}
    assert special and not special & set(one.flatten().tolist())
    assert len(set(one.flatten().tolist())) > one.shape[1]
    assert torch.equal(tokens, repeated_tokens(model, 0)[0])
    assert not torch.equal(tokens, repeated_tokens(model, 1)[0])


def test_without_room_for_repeated_tokens_nothing_is_said_off_the_task(prompts: PromptSet, monkeypatch):
    model = build_network(random_model("gpt2"), None, "gpt2")
    monkeypatch.setattr(head_measures, "REPEATED", 2)
    assert repeated_tokens(model, 0)[0].tolist() == [[0]] * head_measures.SEQUENCES
    found = measure_heads(model, prompts, HEADS[:1])
    assert found.heads[HEADS[0]].values["induction"] is None
    assert found.heads[HEADS[0]].errors["induction"] is None
    assert set(found.reference) == {"copy", "negative copy"}


def test_prompts_that_say_neither_answer_nor_foil_have_no_copying(network: Network, prompts: PromptSet):
    others = replace(prompts, answer=torch.full((6,), 57), foil=torch.full((6,), 58))
    found = measure_heads(network, others, HEADS[:1])
    values = found.heads[HEADS[0]].values
    assert values["copy"] is None and values["negative copy"] is None and values["output follows attention"] is None
    assert values["direct logit attribution"] is not None
    assert "copy" not in found.reference and "induction" in found.reference


def test_one_prompt_has_no_errors_and_no_correlation(network: Network, prompts: PromptSet):
    measures = measure_heads(network, prompts[:1], HEADS[:1]).heads[HEADS[0]]
    assert measures.values["copy"] is not None and measures.values["output follows attention"] is None
    of_prompts = set(measures.errors) - {"previous token", "duplicate token", "induction"}
    assert {measures.errors[name] for name in of_prompts} == {None}


def test_chunks_and_blocks_change_nothing(network: Network, prompts: PromptSet, monkeypatch):
    whole = measure_heads(network, prompts, HEADS)
    monkeypatch.setitem(chunks.ROWS, "cpu", 20)
    monkeypatch.setattr(copying, "_BLOCK", 7)
    told: list[tuple[int, int]] = []
    cut = measure_heads(network, prompts, HEADS, progress=lambda *step: told.append(step))
    for node in HEADS:
        assert cut.heads[node].values == pytest.approx(whole.heads[node].values, abs=1e-5)
        assert cut.heads[node].errors == pytest.approx(whole.heads[node].errors, abs=1e-5)
    assert told[-1] == (300, 300) and told == sorted(told) and len(set(told)) > 5


def test_a_head_that_writes_nothing_copies_nothing():
    built = MODELS["copier"]()
    node = parse_node("a1.h3@end")
    assert str(node.at(None)) in built.silent
    values = measure_heads(built.network, built.prompts(12, 0), [node]).heads[node].values
    assert values["copy"] == values["negative copy"] == values["direct logit attribution"] == 0
    assert values["output follows attention"] is None
    assert values["attention to io"] == pytest.approx(values["even share"])


def test_no_heads_are_nothing_and_unknown_ones_are_refused(network: Network, prompts: PromptSet):
    assert measure_heads(network, prompts, []) == Measured({}, {})
    with pytest.raises(InputError, match="unknown position 'bb': did you mean 'b'"):
        measure_heads(network, prompts, [parse_node("a0.h0@bb")])
    with pytest.raises(InputError, match="has heads 0 to 3"):
        measure_heads(network, prompts, [parse_node("a0.h4@end")])
    with pytest.raises(InputError, match="only heads can"):
        measure_heads(network, prompts, [parse_node("m0@end")])
