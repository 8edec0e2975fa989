"""The intervention engine: measured ÷ arithmetic floor, and ÷ TransformerLens hooks, in one run.

    python benchmarks/engine.py --model smollm2-135m --prompts 64
    python benchmarks/engine.py --scaling

The floor is the time that the matrix products which a result needs would take at this machine's own matrix-product
rate, measured between the repeats. `docs/performance.md` explains what is counted. Edge attribution is held
against two forward passes and one backward pass of the plain model (its fastest attention, no gradients of
weights), timed in turn with it. The peer is what people write today: TransformerLens, with hooks, one forward
pass a head and step (`pip install 'neuroplast[peers]'`); a few heads are timed and scaled to all. The last line is
one JSON object.

`--scaling` measures time and peak memory for 32 to 512 prompts under budgets of 2 and 6 GiB, each in a process of
its own; it ends with exit code 1 where a peak is above its budget, or a prompt takes a tenth more time than at 32.

`--model gpt2-shape` takes a model with the shape of GPT-2 small and random weights, and the tokenizer of `tiny`: for
timings where no weights of GPT-2 are at hand.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import neuroplast as npl
from neuroplast.components import Node
from neuroplast.interventions.chunks import build_chunk
from neuroplast.memory import parse_size, reuse_freed_memory, show_size
from neuroplast.models.attention import ATTENTION
from neuroplast.models.network import Network, logits_at
from neuroplast.tasks.prompts import PromptSet

BUDGETS = ("2GiB", "6GiB")
SIZES = (32, 64, 128, 256, 512)
WORK: dict[str, Callable[..., Any]] = {
    "heads_to_logits": npl.path_patch,
    "heads_to_queries": lambda model, prompts, **more: npl.path_patch(
        model, prompts, receivers=late_queries(model), **more
    ),
    "eap": lambda model, prompts, **more: npl.attribute_edges(model, prompts, method="eap", **more),
}
NO_PEER = (
    "TransformerLens gives grouped queries one key and one value input a group: edges into a single query head's key "
    "or value do not exist there"
)


def late_queries(model: Network) -> tuple[Node, ...]:
    """The queries at END of two late heads; of smollm2-135m those of a23.h3 and a29.h1, its name movers."""
    places = ((model.n_layers * 7 // 9, 3), (model.n_layers - 1, 1))
    return tuple(Node("head", layer, head % model.n_heads, "end", "q") for layer, head in places)


def load(name: str, device: str = "cpu") -> Network:
    """A model by name, or one of the shape of GPT-2 small with random weights."""
    if name != "gpt2-shape":
        return npl.load_model(name, device=device, say=lambda line: print(line, file=sys.stderr))
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return npl.build_network(GPT2LMHeadModel(GPT2Config()).to(device), npl.load_model("tiny").tokenizer, name)


def weights(parts: Iterable[nn.Module]) -> int:
    """Weights of all linear maps under some modules: half the operations that a row costs."""
    return sum(
        part.weight.numel()
        for each in parts
        for part in each.modules()
        if isinstance(getattr(part, "weight", None), Tensor)
        and part.weight.ndim == 2
        and not isinstance(part, nn.Embedding)
    )


class Operations:
    """Multiplications and additions of the matrix products that results need; nothing else is counted."""

    def __init__(self, model: Network, prompts: PromptSet) -> None:
        self.model, self.heads = model, model.n_heads * len(prompts)
        self.tokens = int((prompts.positions["end"] + 1).sum())
        self.layer = [weights([layer]) for layer in model.layers]
        attention = [weights([attention]) for attention in model.attentions]
        self.mlp = [whole - own for whole, own in zip(self.layer, attention, strict=True)]
        self.head_out = model.d_head * model.d_model

    def run(self, layers: int) -> float:
        """A forward pass over every token, up to a layer."""
        return 2 * self.tokens * sum(self.layer[:layers])

    def read_out(self, rows: int) -> float:
        """Two logits a row."""
        return 2 * rows * 2 * self.model.d_model

    def frozen(self, top: int) -> float:
        """All heads below a layer, as rows that go up to it: MLPs, and each head's own output once."""
        return sum(2 * self.heads * ((layer + 1) * self.mlp[layer] + self.head_out) for layer in range(top))

    def heads_to_logits(self) -> float:
        """Two runs, every head's row up to the top, two logits a row."""
        layers = self.model.n_layers
        return 2 * self.run(layers) + self.frozen(layers) + self.read_out(layers * self.heads)

    def heads_to_queries(self, receivers: Sequence[Node]) -> float:
        """Every head's row up to some heads' queries at END, and one-token suffixes from there."""
        layers, tops = self.model.n_layers, sorted(node.layer or 0 for node in receivers)
        total = self.run(layers) + self.run(tops[-1]) + self.frozen(tops[-1])
        alive = 0
        for layer in range(tops[0], layers):
            total += 2 * alive * self.layer[layer]
            if layer in tops:
                # The query of every sender below; for those that first reach a receiver here, its output and the MLP.
                born = layer * self.heads - alive
                total += 2 * layer * self.heads * self.head_out + 2 * born * (self.head_out + self.mlp[layer])
                alive += born
        return total + self.read_out(alive)


def matrix_rate(model: Network) -> float:
    """Operations a second of this machine's matrix products, at the widest linear map of the model's layers."""
    shapes = [
        part.weight.shape
        for part in model.layers[0].modules()
        if isinstance(getattr(part, "weight", None), Tensor) and part.weight.ndim == 2
    ]
    rows, (inner, outer) = 4096, max(shapes, key=lambda shape: shape.numel())
    options = {"device": model.device, "dtype": model.module.dtype}
    a, b = torch.randn(rows, inner, **options), torch.randn(inner, outer, **options)
    seconds = statistics.median(timed(lambda: [a @ b for _ in range(4)], model) for _ in range(12))
    return 4 * 2 * rows * inner * outer / seconds


def timed(work: Callable[[], Any], model: Network) -> float:
    """Seconds that something takes."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


@contextmanager
def plain_attention(model: Network) -> Generator[None]:
    """The model as it comes, with the library's default attention."""
    model.module.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.module.set_attn_implementation(ATTENTION)


def two_forwards_one_backward(model: Network, prompts: PromptSet) -> None:
    """What edge attribution needs of the plain model, and nothing else."""
    chunk = build_chunk(prompts, torch.arange(len(prompts)), model.device)
    rows, module = torch.arange(len(prompts), device=model.device), model.module
    tokens, head = chunk.prompts.clean, model.module.get_output_embeddings()
    with plain_attention(model):
        with torch.no_grad():
            logits_at(module, chunk.prompts.counterfactual, rows, chunk.end)
        leaf = module.get_input_embeddings()(tokens).detach().requires_grad_()
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, chunk.end][None],))
        logits = module(inputs_embeds=leaf, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
        handle.remove()
        difference = logits[rows, chunk.prompts.answer] - logits[rows, chunk.prompts.foil]
        torch.autograd.grad(difference.sum(), leaf)


class Peer:
    """TransformerLens hook loops on the same weights."""

    def __init__(self, model: Network, prompts: PromptSet) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge: Any = TransformerBridge.boot_transformers(
            model.name, hf_model=model.module, tokenizer=model.tokenizer
        )
        self.model, self.prompts = model, prompts
        self.rows, self.end = torch.arange(len(prompts)), prompts.positions["end"]
        self.names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
        self.clean, self.other = self.z_of(prompts.clean), self.z_of(prompts.counterfactual)
        self.before = self.difference({})

    def z_of(self, tokens: Tensor) -> dict[str, Tensor]:
        """Every head's value."""
        kept: dict[str, Tensor] = {}
        hooks = [(name, lambda z, hook, name=name: kept.update({name: z.clone()})) for name in self.names]
        self.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        return kept

    def difference(self, hooks: dict[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
        """LD on the clean prompts, with hooks."""
        listed = [(name, lambda value, hook, act=act: act(value)) for name, act in hooks.items()]
        logits = self.bridge.run_with_hooks(self.prompts.clean, fwd_hooks=listed)[self.rows, self.end].float()
        return logits[self.rows, self.prompts.answer] - logits[self.rows, self.prompts.foil]

    def frozen(self, layer: int, head: int) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """Hooks that freeze every head and send one at END."""
        name = self.names[layer]
        part = slice(head * self.model.d_head, (head + 1) * self.model.d_head)

        def send(_: Tensor) -> Tensor:
            z = self.clean[name].clone()
            z.flatten(2)[self.rows, self.end, part] = self.other[name].flatten(2)[self.rows, self.end, part]
            return z

        keep = {each: lambda _, each=each: self.clean[each] for each in self.names}
        return keep | {name: send}

    def to_logits(self, layer: int, head: int) -> float:
        """One head's mean effect."""
        return float((self.difference(self.frozen(layer, head)) - self.before).mean())

    def to_queries(self, layer: int, head: int) -> float:
        """One head's mean effect through the queries of two late heads."""
        read: dict[str, Tensor] = {}
        receivers = {f"blocks.{node.layer}.attn.hook_q": node.head for node in late_queries(self.model)}
        keeps = {name: lambda q, name=name: read.update({name: q.clone()}) for name in receivers}
        self.difference(self.frozen(layer, head) | keeps)

        def put(q: Tensor, name: str, receiver: int | None) -> Tensor:
            q = q.clone()
            q[self.rows, self.end, receiver] = read[name][self.rows, self.end, receiver]
            return q

        sets = {name: lambda q, name=name, at=at: put(q, name, at) for name, at in receivers.items()}
        return float((self.difference(sets) - self.before).mean())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything at one size and prints the table."""
    model = load(options.model, options.device)
    prompts = npl.tasks.ioi.prompts(model, n=options.prompts, seed=0)
    count = Operations(model, prompts)
    runs = {name: lambda run=run: run(model, prompts) for name, run in WORK.items()}
    runs["plain"] = lambda: two_forwards_one_backward(model, prompts)
    rates: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found = {name: run() for name, run in runs.items()}
    for _ in range(options.repeats):
        for name, run in runs.items():
            rates.append(matrix_rate(model))
            seconds[name].append(timed(run, model))
    rate = statistics.median(rates)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{model.name} on {model.device}: {len(prompts)} prompts, {model.n_layers * model.n_heads} heads")
    print(f"matrix products   {rate / 1e9:8.1f} GFLOP/s  ({min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f})\n")
    floors = {
        "heads_to_logits": count.heads_to_logits() / rate,
        "heads_to_queries": count.heads_to_queries(late_queries(model)) / rate,
        "eap": statistics.median(seconds["plain"]),
    }
    document: dict[str, Any] = {}
    print(f"{'':<18}{'measured':>10}{'range':>20}{'floor':>10}{'÷ floor':>10}")
    for name, floor in floors.items():
        own = statistics.median(seconds[name])
        document[name] = {"over_floor": own / floor, "speedup_over_peer": None, "seconds": own, "floor_seconds": floor}
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:<18}{own:>9.2f}s{spread:>20}{floor:>9.2f}s{own / floor:>10.2f}")
    print("floor of eap: two forwards and one backward of the plain model, " + _range(seconds["plain"]))
    document["eap"]["why"] = {"speedup_over_peer": NO_PEER}
    _measure_peer(document, found, model, prompts, options.peer_heads)
    return document


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f} s"


@torch.no_grad()
def _measure_peer(document: dict[str, Any], found: dict[str, Any], model: Network, prompts: PromptSet, n: int) -> None:
    try:
        peer = Peer(model, prompts)
    except ImportError:
        print("\nTransformerLens is not installed: pip install 'neuroplast[peers]'")
        return
    print(f"\nTransformerLens, {n} heads timed and scaled to all")
    for name, run in {"heads_to_logits": peer.to_logits, "heads_to_queries": peer.to_queries}.items():
        effects = found[name].by_head().mean(dim=2)
        places = [divmod(int(index), model.n_heads) for index in effects.abs().flatten().topk(n).indices]
        values: list[float] = []
        seconds = timed(lambda run=run, places=places, values=values: values.extend(run(*at) for at in places), model)
        # Heads from the last receiver on cannot reach it; nobody need run them.
        last = model.n_layers if name == "heads_to_logits" else model.n_layers - 1
        whole = seconds / n * last * model.n_heads
        error = max(abs(float(effects[at]) - value) for at, value in zip(places, values, strict=True))
        speedup = whole / document[name]["seconds"]
        document[name] |= {"speedup_over_peer": speedup, "max_difference_from_peer": error}
        print(f"{name:<18}{whole:>9.0f}s   {speedup:.0f} × ours; largest difference of mean effects {error:.1e}")
    print(f"{'eap':<18} not possible: {NO_PEER}")


def run_alone(options: argparse.Namespace) -> None:
    """One row of the scaling table, in this process."""
    import resource

    name, n, memory = options.alone
    model = load(options.model)
    prompts = npl.tasks.ioi.prompts(model, n=int(n), seed=0)
    WORK[name](model, prompts[:64], memory=memory)  # memory's first use costs as much as the work in it
    seconds = timed(lambda: WORK[name](model, prompts, memory=memory), model)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def measure_scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory by the number of prompts and the budget, each in a process of its own."""
    document: dict[str, Any] = {"kept": True}
    print(f"{'':<18}{'budget':<8}{'prompts':>8}{'seconds':>10}{'a prompt':>10}{'÷ at 32':>9}{'peak':>11}")
    for name in options.scaling or WORK:
        for memory in BUDGETS:
            first = 0.0
            for n in SIZES:
                command = [sys.executable, __file__, "--model", options.model, "--alone", name, str(n), memory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, peak = json.loads(done.stdout.splitlines()[-1])
                first = first or seconds / n
                document[f"{name} {memory} {n}"] = {"seconds": seconds, "peak_bytes": peak}
                row = f"{name:<18}{memory:<8}{n:>8}{seconds:>10.1f}{seconds / n:>10.3f}{seconds / n / first:>9.2f}"
                print(row + f"{show_size(peak):>11}", flush=True)
                document["kept"] &= peak <= parse_size(memory) and seconds / n <= 1.1 * first
    return document


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-heads", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scaling", nargs="*", choices=WORK, help="of these, or of all")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reuse_freed_memory()
    if options.alone:
        return run_alone(options)
    document = measure(options) if options.scaling is None else measure_scaling(options)
    print(json.dumps(document))
    sys.exit(not document.get("kept", True))


if __name__ == "__main__":
    main()
