"""What a training keeps on disk: what it is of, its saves, its checkpoints; and how a save is taken up again.

`training.json` says what is trained from what; `resume/step-20/` is a Hugging Face folder with `optimizer.safetensors`
and `state.json`. The former save goes only when the next one is whole.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from neuroplast.errors import InputError, StorageError, first_line
from neuroplast.models.folder import check_folder
from neuroplast.models.network import Network
from neuroplast.models.sources import quiet_transformers
from neuroplast.storage import atomic_folder, hash_state, load_json, load_tensors, write_json, write_tensors
from neuroplast.training.data import Example

EXPECTED = (SafetensorError, OSError, ImportError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)
"""What the libraries say of a folder whose files are damaged."""


def save_checkpoint(model: Network, folder: Path) -> None:
    """Writes a normal Hugging Face folder: config, safetensors, tokenizer."""
    with atomic_folder(folder) as temporary:
        _write_model(model, temporary)


def _write_model(model: Network, folder: Path) -> None:
    with quiet_transformers():
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def write_save(
    folder: Path, step: int, model: Network, optimizer: torch.optim.Optimizer, history: Sequence[Mapping[str, Any]]
) -> None:
    """Saves all that a training goes on from, then removes the former save."""
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    former = last_save(folder)
    with atomic_folder(folder / "resume" / f"step-{step}") as temporary:
        _write_model(model, temporary)
        write_tensors(temporary / "optimizer.safetensors", moments, {})
        write_json(temporary / "state.json", {"history": history})
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def last_save(folder: Path) -> Path | None:
    """The newest whole save; what a kill left half-written has another name, half-removed is never the newest."""
    steps = [name for path in (folder / "resume").glob("step-*") if (name := path.name.removeprefix("step-")).isdigit()]
    return folder / "resume" / f"step-{max(steps, key=int)}" if steps else None


def claim(folder: Path, settings: Mapping[str, Any], examples: Sequence[Example], module: PreTrainedModel) -> None:
    """Writes down what is trained from what, or checks that the folder's run is the same.

    Raises:
        InputError: it is another.
    """
    ours = {
        **settings,
        "examples_sha256": hashlib.sha256(repr(list(examples)).encode()).hexdigest(),
        "start_sha256": hash_state(module.state_dict()),
    }
    path = folder / "training.json"
    if not path.is_file():
        return write_json(path, ours)
    former = load_note(path)
    different = sorted(key for key in ours if former.get(key) != ours[key])
    if different:
        raise InputError(f"{folder} holds a training with another {different[0]}; choose another --out")


def load_note(path: Path) -> dict[str, Any]:
    """Reads `training.json`.

    Raises:
        StorageError: it is damaged.
    """
    try:
        found = load_json(path)
    except StorageError:
        found = None
    if not isinstance(found, dict):
        raise StorageError(f"{path} is damaged; remove it, then run the same command again")
    return found


def restore(module: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> list[dict[str, Any]]:
    """Takes up a save, weights and moments; gives its history.

    Raises:
        StorageError: a file of it is missing or damaged; the weights are as they were then.
    """
    try:
        check_folder(folder)
        history = list(load_json(folder / "state.json")["history"])
        if history[-1]["step"] != int(folder.name.removeprefix("step-")):
            raise ValueError("its history ends at another step")
        with quiet_transformers():
            saved = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, dtype=module.dtype, use_safetensors=True
            ).state_dict()
        shapes = {name: weight.shape for name, weight in module.state_dict().items()}
        if {name: weight.shape for name, weight in saved.items()} != shapes:
            raise ValueError("its weights are those of another model")
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_tensors(folder / "optimizer.safetensors").items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value.clone()
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    except (*EXPECTED, InputError, StorageError) as error:
        raise StorageError(f"{folder} is damaged: {first_line(error)}") from error
    module.load_state_dict(saved)
    return history
