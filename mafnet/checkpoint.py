"""Checkpoints: one .safetensors file that carries its model config and degradation. Loading is strict."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .config import ConfigError, ModelConfig, from_dict, to_dict

FORMAT = "mafnet-1"


class CheckpointError(ValueError):
    """Weights that cannot be used; the message names the file or the tensor."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    path: str
    tensors: dict[str, Tensor]
    config: ModelConfig
    degradation: str
    metadata: dict[str, str]


def _bundled() -> Path:
    return Path(str(resources.files("mafnet"))) / "weights"


def weights_available() -> tuple[str, ...]:
    """The names of the bundled weights."""
    return tuple(sorted(p.stem for p in _bundled().glob("*.safetensors")))


def resolve(name_or_path: str | Path) -> Path:
    """The file of bundled weights, of a path, or the one .safetensors file of a folder."""
    path = Path(name_or_path)
    if str(name_or_path) in weights_available():
        return _bundled() / f"{name_or_path}.safetensors"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{path}: expected one .safetensors file in the folder, found {len(files)}"
            )
        return files[0]
    if not path.is_file():
        names = ", ".join(weights_available()) or "none"
        raise CheckpointError(
            f"{name_or_path}: no such file, and no bundled weights (bundled: {names})"
        )
    return path


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    degradation: str,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it when whole."""
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(to_dict(config)),
        "degradation": degradation,
        **(extra or {}),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        safetensors.torch.save_file(whole, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(name_or_path: str | Path) -> Checkpoint:
    """Read a checkpoint file; anything wrong with it raises :class:`CheckpointError`."""
    path = resolve(name_or_path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise CheckpointError(
            f"{path}: not a mafnet checkpoint (its metadata holds no {FORMAT} config)"
        )
    try:
        config = from_dict(ModelConfig, json.loads(metadata["config"]))
    except (ConfigError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: bad model config: {error}") from None
    return Checkpoint(str(path), tensors, config, metadata.get("degradation", "unknown"), metadata)


def load_strict(module: nn.Module, loaded: Checkpoint) -> None:
    """Copy the tensors into ``module``; missing, unexpected and misshapen ones raise, named."""
    own = module.state_dict()
    problems = [f"missing {k}" for k in own if k not in loaded.tensors]
    problems += [f"unexpected {k}" for k in loaded.tensors if k not in own]
    for key, tensor in loaded.tensors.items():
        if key in own and own[key].shape != tensor.shape:
            problems.append(f"{key}: expected {tuple(own[key].shape)}, got {tuple(tensor.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{loaded.path}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(loaded.tensors)
