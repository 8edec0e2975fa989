"""Everything that reads what others wrote, fed with valid files that were damaged: it may refuse, and nothing else.

A *reader* has some valid inputs and a function that reads one. Hypothesis draws which input, and a few damages to it:
of its structure (a value becomes a hostile one, a name goes, two change places) or of its bytes. What a reader raises
beside the errors of the library is a crash; so is an input that takes longer than `LONGEST` seconds.
"""

import json
import signal
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from neuroplast.errors import NeuroplastError
from synthetic_run import write_run

LONGEST = 10
Form = Literal["json", "jsonl", "toml", "text", "safetensors"]
Damage = tuple[int, int, int]
"""What is done, where, and with what; each counts round and round what there is."""

DEEP = 1500
HOSTILE = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "-0.0",
        "0.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e400",
        "1e308",
    ),
    *("1e-320", "9" * 400, "9" * 5000, "-" + "9" * 400, str(2**63), str(2**31), "1000000", "17.5", '""', '" "', '"x"'),
    *(
        '"\\ud800"',
        '"\\u0000"',
        '"\\n\\t"',
        '"../../etc/passwd"',
        '"/etc/passwd"',
        '"nan"',
        '"1e400"',
        '"base"',
        '"end"',
    ),
    *('"a0.h0"', '"a0.h0@end"', '"a1.h0->logits"', '"m1"', '"kernels/evil"', '"sdpa"', '"model.safetensors"'),
    *(
        '"' + "long" * 2000 + '"',
        '"\\u202e<script>"',
        "[]",
        "{}",
        "[[]]",
        "[null]",
        "[0]",
        "[0, 1]",
        "[NaN, 1]",
        "[1, 0]",
    ),
    *('{"a": 1, "a": 2}', '{"value": null, "why": 3}', '{"": {}}', '{"mean": 1e308}', '["a", "a"]', "[[0.0, 0.0]]"),
    *("[" * 150 + "]" * 150, "[" * DEEP + "]" * DEEP, '{"a":' * 90 + "1" + "}" * 90, '{"a":' * DEEP + "1" + "}" * DEEP),
)
"""Values, as JSON spells them."""
NAMES = (
    "",
    "x",
    "end",
    "a0.h0",
    "a0.h0<q>@s2",
    "logits",
    "m0->logits",
    "\ud800",
    "a" * 3000,
    "neuroplast",
    "a\nb",
    "../x",
    "0",
)
TOKENS = (
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"=",
        b"->",
        b"@",
    ),
    *(
        b"<q>",
        b"a.b.c = 1\n",
        b"[table]\n",
        b"[[table]]\n",
        b"nan",
        b"inf",
        b"1979-05-27T07:32:00Z",
        b"12:00:00",
        b"'''",
    ),
    *(
        b'"""',
        b"{a = 1}",
        b"9" * 5000,
        b"[" * DEEP,
        b"a." * 1500,
        b"\xed\xa0\x80",
        b"\xe2\x80\xae",
        "Ⅷ²٣".encode(),
        b"+",
    ),
    *(
        b" ",
        b"-1",
        b"1e400",
        b"GiB",
        b"true",
        b"#",
        b"(0, 1)",
        b"L1H1",
        b"each",
        b"other",
        b"heads@",
        b"all",
        b"1.5",
        b"e",
    ),
)


@dataclass(frozen=True)
class Sample:
    """A valid input."""

    content: bytes
    form: Form
    name: str = ""
    """Which file it is, where a reader has several."""


@dataclass(frozen=True)
class Reader:
    """Something that reads."""

    samples: tuple[Sample, ...]
    read: Callable[[str, bytes], object]
    """Given the name of the sample's file, and what is in it now."""


class Hung(BaseException):
    """An input took too long."""


@dataclass
class Tally:
    """What was fed."""

    fed: int = 0
    refused: int = 0
    distinct: set[int] = field(default_factory=set)
    last: tuple[str, bytes] = ("", b"")


def damaged(sample: Sample, damages: Sequence[Damage]) -> bytes:
    """A sample after some damages: those of its structure first."""
    content = sample.content
    if sample.form == "json":
        content = _change_json(content, damages)
    elif sample.form == "jsonl":
        lines = content.split(b"\n")
        for each in damages:
            row = each[1] % len(lines)
            lines[row] = _change_json(lines[row], [each]) if lines[row] else lines[row]
        content = b"\n".join(lines)
    elif sample.form == "toml":
        content = _change_lines(content, damages)
    elif sample.form == "safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = _change_json(content[8 : 8 + length], damages)
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    for kind, where, what in damages:
        if kind % 14 >= 8 or sample.form == "text":
            content = _change_bytes(content, kind, where, what)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with a key or an index of it."""
    inner = [value]
    while inner:
        each = inner.pop()
        for key in each if isinstance(each, dict) else range(len(each)):
            yield each, key
            if isinstance(each[key], dict | list):
                inner.append(each[key])


def _change_json(content: bytes, damages: Sequence[Damage]) -> bytes:
    try:
        return _changed_json(content, damages)
    except (ValueError, RecursionError):
        return content  # an earlier damage has seen to it


def _changed_json(content: bytes, damages: Sequence[Damage]) -> bytes:
    structural = [each for each in damages if each[0] % 14 < 8]
    if not structural:
        return content
    top = [json.loads(content)]
    for kind, where, what in structural:
        found = list(_places(top))
        holder, key = found[where % len(found)]
        hostile = f"@{what % len(HOSTILE)}@"
        other, of = found[what % len(found)]
        match kind % 14:
            case 0 | 1 | 2:
                holder[key] = hostile
            case 3 if holder is not top:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[NAMES[what % len(NAMES)]] = holder.pop(key)
            case 5 if isinstance(holder, dict):
                holder[f"{key}@"] = hostile  # its name twice
            case 6:
                holder[key] = json.loads(json.dumps(other[of])) if isinstance(other[of], dict | list) else other[of]
            case _ if isinstance(holder, list):
                holder.append(hostile)
            case _:
                holder[NAMES[what % len(NAMES)]] = hostile
    text = json.dumps(top[0]).replace('@": ', '": ')
    for number, value in enumerate(HOSTILE):
        if f"@{number}@" in text:
            text = text.replace(f'"@{number}@"', value)
    return text.encode("utf-8", "surrogatepass")


def _change_lines(content: bytes, damages: Sequence[Damage]) -> bytes:
    lines = content.split(b"\n")
    for kind, where, what in damages:
        row = where % len(lines)
        key, equals, _ = lines[row].partition(b" = ")
        token = TOKENS[what % len(TOKENS)]
        match kind % 14:
            case 0 | 1 | 2 if equals:
                value = HOSTILE[what % len(HOSTILE)].encode() if what % 3 else token
                lines[row] = key + equals + value.replace(b"NaN", b"nan").replace(b"Infinity", b"inf")
            case 3 if len(lines) > 1:
                del lines[row]
            case 4:
                lines.insert(row, lines[what % len(lines)])
            case 5 if equals:
                lines[row] = lines[what % len(lines)].partition(b" = ")[0] + lines[row][len(key) :]
            case 6:
                lines.insert(row, token)
            case _:
                pass
    return b"\n".join(lines)


def _change_bytes(content: bytes, kind: int, where: int, what: int) -> bytes:
    at = where % (len(content) + 1)
    to = min(len(content), at + what % 40)
    match kind % 6:
        case 0:
            return content[:at] + bytes([what % 256]) + content[at + 1 :]
        case 1:
            return content[:at] + content[to:]
        case 2:
            return content[:to] + content[at:]
        case 3:
            return content[:at]
        case _:
            return content[:at] + TOKENS[what % len(TOKENS)] + content[at:]


@contextmanager
def limited(seconds: int = LONGEST) -> Iterator[None]:
    """Raises `Hung` inside the block when it takes longer."""

    def ring(number: int, frame: object) -> None:
        raise Hung

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def fuzz(reader: Reader, n: int, tally: Tally, start: int | None = None) -> None:
    """Feeds a reader; the first crash is shrunk and raised, and `tally.last` is then its input.

    Args:
        reader: what is fed.
        n: how many inputs.
        tally: counts them.
        start: of Hypothesis's draws; None draws the same ones every time.
    """

    def feed(drawn: bytes) -> None:
        sample = reader.samples[drawn[0] % len(reader.samples)]
        content = damaged(sample, list(struct.iter_unpack(">BHH", drawn[1 : 1 + (len(drawn) - 1) // 5 * 5])))
        tally.fed += 1
        tally.distinct.add(hash((sample.name, content)))
        tally.last = (sample.name, content)
        try:
            with limited():
                reader.read(sample.name, content)
        except NeuroplastError as error:
            tally.refused += 1
            assert "\n" not in str(error), "an error of several lines"

    run = settings(
        max_examples=n,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        derandomize=start is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(st.binary(min_size=6, max_size=21))(feed))
    (run if start is None else seed(start)(run))()


def _in_folder(
    folder: Path, files: dict[str, bytes], read: Callable[[Path, str], object]
) -> Callable[[str, bytes], object]:
    """Reads a folder in which one file is another than it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    changed: list[str] = []

    def feed(name: str, content: bytes) -> None:
        for former in changed:
            if former != name and former in files:
                (folder / former).write_bytes(files[former])
        changed[:] = [name]
        (folder / name).write_bytes(content)
        read(folder, name)

    return feed


def _settings(folder: Path) -> Reader:
    from neuroplast.study.plan import StudyConfig, build_config, load_config

    text = StudyConfig().toml().encode()
    short = b'task = "ioi"\npoisons = ["subject_duplication"]\nseeds = [0, 1]\nepochs = [1, 2]\npreset = "quick"\n'
    read = _in_folder(folder, {}, lambda folder, name: build_config("quick", load_config(folder / name)))
    return Reader((Sample(text, "toml", "study.toml"), Sample(short, "toml", "study.toml")), read)


def _assignments(folder: Path) -> Reader:
    from neuroplast.study.plan import build_config

    samples = (b"seeds=[1, 2]", b"learning_rate = 1e-3", b'task="ioi"', b"poisons = []", b"epochs=[0.5,1]", b"out.x=1")
    return Reader(
        tuple(Sample(each, "text") for each in samples),
        lambda _, content: build_config("quick", assignments=[content.decode(errors="replace")]),
    )


def _task(folder: Path) -> Reader:
    from neuroplast.tasks.custom import load_custom_task, read_task

    rows = [
        {"clean": f"The {n} cat and", "counterfactual": f"The {n} dog or", "answer": " a", "foil": " b"}
        | ({"marks": {"s2": 4, "s1+1": 6}, "template": "t", "group": "g", "split": split, "more_answers": [" c"]})
        for n, split in enumerate(["train", "eval", "eval"])
    ]
    plain = [{key: row[key] for key in ("clean", "counterfactual", "answer", "foil")} for row in rows]

    def read(folder: Path, name: str) -> None:
        read_task(folder / name, lambda line, problem: None)
        load_custom_task(folder / name)

    samples = [Sample("\n".join(map(json.dumps, each)).encode(), "jsonl", "my.jsonl") for each in (rows, plain)]
    return Reader(tuple(samples), _in_folder(folder, {}, read))


def _circuit(folder: Path) -> Reader:
    from neuroplast.circuits.files import build_document, load_circuit
    from synthetic_run import stage_circuit

    ours = build_document(stage_circuit("base", "m"))
    theirs = {key: ours[key] for key in ("cfg", "nodes", "edges")}
    samples = [Sample(json.dumps(each).encode(), "json", "circuit.json") for each in (ours, theirs)]

    def read(folder: Path, name: str) -> None:
        # What is read can be written, and is then the same.
        found = load_circuit(folder / name)
        json.dumps(build_document(found), allow_nan=False, ensure_ascii=False).encode()

    return Reader(tuple(samples), _in_folder(folder, {}, read))


def _run(folder: Path) -> Reader:
    from neuroplast.report.looks import load_looks
    from neuroplast.report.paper import cross_model_table
    from neuroplast.report.places import load_places
    from neuroplast.report.prompts import load_prompts
    from neuroplast.report.reading import load_results
    from neuroplast.report.seeds import load_over_seeds
    from neuroplast.report.timeline import build_ways
    from neuroplast.report.trajectories import load_followed, load_plasticity

    run = write_run(folder / "run", ladder=0)
    stage = "stages/poisoned/subject_duplication"
    (run / stage / "comparison.json").write_text(json.dumps(comparison_of(f"{stage}/comparison.json")))
    results = load_results(run)
    readers: dict[str, Callable[[Path], object]] = {
        f"{stage}/trajectory.json": lambda run: build_ways(run, results, load_followed(run, results)),
        "plasticity.json": lambda run: (load_plasticity(run, results), load_over_seeds(run)),
        "stages/base/heads.json": lambda run: load_looks(run, results.stages[:1]),
        f"{stage}/comparison.json": lambda run: (
            load_places(run, results.stages, has_circuit=True),
            cross_model_table(run, results),
        ),
        "prompts/measured.jsonl": lambda run: load_prompts(run, results.stages[:1]),
    }
    small = write_run(folder / "small", ladder=0, poisons=())
    summary = json.loads((small / "summary.json").read_bytes())
    summary["stages"] = summary["stages"][:2]
    (small / "summary.json").write_text(json.dumps(summary))
    whole = ("summary.json", "manifest.json", "study.toml", "stages/base/measures.json", "stages/base/criteria.json")
    whole += ("stages/tuned/measures.json", "stages/tuned/train.jsonl")
    forms: dict[str, Form] = {".json": "json", ".jsonl": "jsonl", ".toml": "toml"}
    samples: list[Sample] = []
    feeds: dict[str, Callable[[str, bytes], object]] = {}
    for at, names, read in (
        (small, whole, lambda run, _: load_results(run)),
        (run, readers, lambda run, name: readers[name](run)),
    ):
        files = {name: (at / name).read_bytes() for name in names}
        samples += [Sample(content, forms[Path(name).suffix], name) for name, content in files.items()]
        feeds |= dict.fromkeys(names, _in_folder(at, files, read))
    samples += [samples[0]] * 3  # the summary most of all
    return Reader(tuple(samples), lambda name, content: feeds[name](name, content))


def comparison_of(name: str) -> Any:
    """That of a real run, its lists cut short."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "smollm2_run.tar.xz") as archive:
        document = json.loads(archive.extractfile(name if name in archive.getnames() else f"./{name}").read())

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value[:2]] if isinstance(value, list) else value

    return short(document)


def _checkpoint(folder: Path) -> Reader:
    from neuroplast.models.folder import check_folder
    from neuroplast.models.sources import TINY

    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"metadata": {"total_size": 8}, "weight_map": {"a.weight": shards[0], "b.weight": shards[1]}}
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_bytes()) | {
        "tokenizer_file": None,
        "chat_template": "x",
    }
    config = json.loads((TINY / "config.json").read_bytes()) | {"text_config": {"num_hidden_layers": 2}}
    documents = {
        "model.safetensors.index.json": index,
        "config.json": config | {"attn_implementation": None, "auto_map": {"AutoConfig": "evil.Evil"}},
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": {"eos_token": {"content": "x", "lstrip": False}},
    }
    files = {name: json.dumps(each).encode() for name, each in documents.items()}
    samples = [Sample(content, "json", name) for name, content in files.items()]
    read = _in_folder(folder, files | dict.fromkeys(shards, b""), lambda folder, _: check_folder(folder))
    return Reader((*samples, samples[0]), read)


def _adapter(folder: Path) -> Reader:
    from neuroplast.models.adapters import load_adapter_config

    config = {
        **{
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny",
            "target_modules": ["c_attn"],
            "r": 3,
            "lora_alpha": 7,
        },
        **{
            "rank_pattern": {"h.0": 2},
            "alpha_pattern": {},
            "layers_to_transform": [0, 1],
            "modules_to_save": ["lm_head"],
        },
        **{"trainable_token_indices": {"wte": [1]}, "init_lora_weights": True, "auto_mapping": None, "task_type": "x"},
    }
    read = _in_folder(
        folder, {"adapter_model.safetensors": b""}, lambda folder, _: load_adapter_config(folder).options()
    )
    return Reader((Sample(json.dumps(config).encode(), "json", "adapter_config.json"),), read)


def _tensors(folder: Path) -> Reader:
    import torch

    from neuroplast.report.measured import load_measured
    from neuroplast.report.patch import load_patch
    from neuroplast.storage import write_tensors

    described = {
        **{"model": "tiny", "sign": "s", "rows": json.dumps(["a0.h0", "m1"])},
        "settings": json.dumps({"model": "tiny", "method": "path", "senders": "heads", "receivers": "logits"}),
    }
    write_tensors(folder / "effects.safetensors", {name: torch.ones(2) for name in ("mean", "low", "high")}, described)
    content = (folder / "effects.safetensors").read_bytes()

    def read(folder: Path, name: str) -> None:
        load_patch(folder)
        load_measured(folder / name, {"mean": (2,), "low": (None,)})

    return Reader((Sample(content, "safetensors", "effects.safetensors"),), _in_folder(folder, {}, read))


def _claims(folder: Path) -> Reader:
    from neuroplast.storage import claimed, is_begun, load_jsonl

    provenance = {"model": {"name": "tiny", "weights": "ab"}, "settings": {"n": 3, "senders": ["a0.h0"]}}

    def read(folder: Path, name: str) -> None:
        assert is_begun(folder, name, "audit")
        load_jsonl(folder / name)
        with claimed(folder, name, "audit", provenance):
            pass

    return Reader((Sample(json.dumps(provenance).encode(), "json", "audit.json"),), _in_folder(folder, {}, read))


def _names(folder: Path) -> Reader:
    from neuroplast.components import parse_edge, parse_group, parse_node
    from neuroplast.errors import InputError

    def read(_: str, content: bytes) -> None:
        text = content.decode(errors="surrogateescape")
        parses = (parse_node, parse_edge, parse_group)
        for parse in parses:
            try:
                found = parse(text)
            except InputError:
                continue
            if parse is not parse_group:
                assert parse(str(found)) == found
        parse_node(text)

    samples = (
        b"a23.h3",
        b"a23.h3<q>@end",
        b"L2H3",
        b"(2, 3)",
        b"m11",
        b"a0.h1+m0@s2",
        b"a20.h0->a23.h3<q>",
        b"m3->logits",
    )
    return Reader(tuple(Sample(each, "text") for each in samples), read)


def _selections(folder: Path) -> Reader:
    import torch

    from architectures import random_model
    from neuroplast.interventions.selection import (
        position_mask,
        select_destinations,
        select_receivers,
        select_senders,
        select_sites,
    )
    from neuroplast.models.build import build_network
    from neuroplast.tasks.prompts import PromptSet

    model = build_network(random_model("gpt2"), None, "gpt2")
    clean, choices = torch.randint(1, 20, (2, 6)), torch.tensor([1, 2])
    positions = {"s2": torch.tensor([1, 2]), "end": torch.tensor([5, 5])}
    prompts = PromptSet("random", (), clean, clean, choices, choices + 1, positions)

    def read(_: str, content: bytes) -> None:
        text = content.decode(errors="surrogateescape")
        refused: list[NeuroplastError] = []
        for select in (select_senders, select_receivers, select_destinations, select_sites, position_mask):
            try:
                position_mask(prompts, text) if select is position_mask else select(text, model, prompts)
            except NeuroplastError as error:
                refused.append(error)
        if len(refused) == 5:
            raise refused[0]

    samples = (b"heads@s2, m1, a0.h1+a0.h2@end", b"all", b"heads@each", b"q, k@other", b"logits", b"a1.h1<q>@3", b"end")
    return Reader(tuple(Sample(each, "text") for each in samples), read)


def _sizes(folder: Path) -> Reader:
    from neuroplast.memory import parse_size, show_size

    samples = (b"4GiB", b"800MB", b"2g", b"123456", b" 1.5 TiB ", b"0.25kb")
    return Reader(
        tuple(Sample(each, "text") for each in samples),
        lambda _, content: show_size(parse_size(content.decode(errors="surrogateescape"))),
    )


READERS: dict[str, Callable[[Path], Reader]] = {
    "settings": _settings,
    "assignments": _assignments,
    "task": _task,
    "circuit": _circuit,
    "run": _run,
    "checkpoint": _checkpoint,
    "adapter": _adapter,
    "tensors": _tensors,
    "claims": _claims,
    "names": _names,
    "selections": _selections,
    "sizes": _sizes,
}
"""By name, how a reader is made in a folder of its own."""
