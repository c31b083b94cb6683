"""Checkpoints: round trip, strict loading, clear errors, no half-written file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_model import TINY, build, run

from mafnet import CheckpointError, MAFnet, weights_available
from mafnet import checkpoint as checkpoint_module


def test_round_trip_keeps_weights_config_and_degradation(tmp_path: Path) -> None:
    net = build(lstm_at="lr")
    net.degradation = "BD"
    net.save_pretrained(tmp_path / "w.safetensors")
    again = MAFnet.from_pretrained(tmp_path / "w.safetensors")
    assert again.config == net.config and again.degradation == "BD" and not again.training
    frames = torch.rand(1, 2, 3, 7, 6)
    assert torch.equal(run(again, frames), run(net, frames))
    assert torch.equal(
        run(MAFnet.from_pretrained(tmp_path), frames), run(net, frames)
    )  # its folder


def saved(tmp_path: Path, change: str) -> Path:
    net = build()
    tensors = dict(net.state_dict())
    key = "features.conv_0.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["extra"] = torch.zeros(1)
    elif change == "shape":
        tensors[key] = torch.zeros(8, 3, 1, 1)
    path = tmp_path / "w.safetensors"
    checkpoint_module.save(path, tensors, net.config, "BI")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "missing features.conv_0.weight"),
        ("unexpected", "unexpected extra"),
        ("shape", r"features.conv_0.weight: expected \(8, 3, 3, 3\), got \(8, 3, 1, 1\)"),
    ],
)
def test_strict(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        MAFnet.from_pretrained(saved(tmp_path, change))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a checkpoint at all")
    with pytest.raises(
        CheckpointError, match=r"garbage\.safetensors: not a readable \.safetensors"
    ):
        MAFnet.from_pretrained(garbage)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors: not a mafnet checkpoint"):
        MAFnet.from_pretrained(foreign)
    whole = saved(tmp_path, "").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        MAFnet.from_pretrained(cut)


def test_no_such_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file, and no bundled weights"):
        MAFnet.from_pretrained("nowhere")
    with pytest.raises(
        CheckpointError, match=r"expected one \.safetensors file in the folder, found 0"
    ):
        MAFnet.from_pretrained(tmp_path)


def test_config_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"format": checkpoint_module.FORMAT, "config": '{"channels": 8, "novelty": 1}'}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"bad model config: .*unknown key 'novelty'"):
        MAFnet.from_pretrained(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = MAFnet(dataclasses.replace(TINY, lstm="none"))
    path = tmp_path / "w.safetensors"
    net.save_pretrained(path)
    before = path.read_bytes()

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_module.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        net.save_pretrained(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_bundled_weights_load_and_fit_in_three_megabytes() -> None:
    for name in weights_available():
        assert checkpoint_module.resolve(name).stat().st_size < 3_000_000
        net = MAFnet.from_pretrained(name)
        assert net.degradation in ("BI", "BD")
    assert "lite" in weights_available()
