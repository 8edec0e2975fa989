"""What reads files of others, each with valid samples for `fuzzing`."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Form, Reader, Sample
from neuroplast.errors import NeuroplastError
from synthetic_run import write_run


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
    from neuroplast.locks import claimed
    from neuroplast.storage import is_begun, load_jsonl

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
