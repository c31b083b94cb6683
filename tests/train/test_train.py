"""Training: stages, freezing, exact resume, guards; on a small model and random packed data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_model import TINY
from torch import Tensor

from mafnet import ConfigError, MAFnet, train
from mafnet.checkpoint import CheckpointError
from mafnet.config import from_dict, to_dict
from mafnet.data import PackedData
from mafnet.train import TrainConfig, Trainer, TrainingError, known_flow_error, photometric_error

PATCH, FRAMES = 16, 3
SIDE = 4 * PATCH + 16


def smooth(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Pictures (count, side, side, 3) uint8 with detail at several scales."""
    out = np.zeros((count, side, side, 3))
    for step in (5, 9):
        coarse = rng.random((count, side // step + 1, side // step + 1, 3))
        out += np.kron(coarse, np.ones((1, step, step, 1)))[:, :side, :side]
    return (out * 127).astype(np.uint8)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> PackedData:
    rng = np.random.default_rng(0)
    clips = [smooth(rng, 6 * FRAMES, SIDE).reshape(6, FRAMES, SIDE, SIDE, 3) for _ in range(2)]
    flow = np.zeros((6, FRAMES, PATCH, PATCH, 2), np.float16)
    valid = np.ones((6, FRAMES, PATCH, PATCH), bool)
    packed = PackedData(clips[0], clips[1], flow, flow, valid, tuple(smooth(rng, 2, 200)))
    monkeypatch.setattr(train, "pack", lambda config: packed)
    return packed


def config(folder: Path, stages: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    model = {**to_dict(TINY), "lstm_at": "lr"}
    values = {
        "data": {"patch": PATCH, "frames": FRAMES},
        "stages": [{"batch": 2, "patch": PATCH, "warmup": 2, **s} for s in stages],
        "output": str(folder),
        "model": model,
        "log_every": 2,
        "save_every": 2,
        "autocast": "none",
        **changes,
    }
    return from_dict(TrainConfig, values, "test")


ALL_STAGES = [
    {"kind": "image", "steps": 3},
    {"kind": "flow", "steps": 3, "freeze": ["features", "attention"]},
    {"kind": "clip", "steps": 5},
]


def weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("autocast", ["bf16", "none"])
def test_three_stages_give_weights_that_load(tmp_path: Path, autocast: str) -> None:
    path = Trainer(config(tmp_path, ALL_STAGES, autocast=autocast)).run()
    net = MAFnet.from_pretrained(path)
    assert net.config.lstm_at == "lr" and net.degradation == "BI"
    with torch.no_grad():
        assert net(torch.rand(1, 2, 3, 8, 8)).isfinite().all()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rows] == ["image", "flow", "clip", "clip"]
    assert all(np.isfinite(r["norm"]) for r in rows)
    before, after = (weights(tmp_path / f"stage{i}.safetensors") for i in ("0-image", "2-clip"))
    assert any(not torch.equal(before[k], after[k]) for k in before if "flow_branch.fuse" in k)


def test_a_run_goes_on_from_weights(tmp_path: Path) -> None:
    first = Trainer(config(tmp_path / "first", ALL_STAGES[:1])).run()
    stage = {"kind": "clip", "steps": 1, "lr": 1e-12, "ema": 0.0}
    second = Trainer(config(tmp_path / "second", [stage], start_from=str(first))).run()
    before, after = weights(first), weights(second)
    assert all(torch.allclose(before[k], after[k], rtol=0, atol=1e-9) for k in before)


def test_weights_of_another_model_are_no_start(tmp_path: Path) -> None:
    MAFnet(TINY).save_pretrained(tmp_path / "hr.safetensors")  # its LSTM runs at HR
    start = config(tmp_path, ALL_STAGES, start_from=str(tmp_path / "hr.safetensors"))
    with pytest.raises(CheckpointError, match=r"hr\.safetensors: (missing|unexpected) head"):
        Trainer(start)


def test_learning_lowers_the_loss(tmp_path: Path, data: PackedData) -> None:
    """On crops drawn afresh, against the untrained network, which is about bicubic."""
    steps = [{"kind": "image", "steps": 100, "lr": 1e-2, "batch": 4, "ema": 0.9}]
    trained = MAFnet.from_pretrained(Trainer(config(tmp_path, steps)).run())
    torch.manual_seed(0)
    untrained = MAFnet(trained.config).eval()
    lr, hr = data.image_batch(np.random.default_rng(9), 8, PATCH)

    def error(net: MAFnet) -> float:
        single = MAFnet(replace(net.config, flow_branch=False, lstm="none"))
        single.load_state_dict({k: net.state_dict()[k] for k in single.state_dict()})
        with torch.no_grad():
            return float((single(lr.unsqueeze(1))[:, 0] - hr).abs().mean())

    assert error(trained) < 0.95 * error(untrained)


def test_frozen_modules_stay_as_they_are(tmp_path: Path) -> None:
    frozen = ["features", "attention", "flow_branch.net"]
    Trainer(
        config(
            tmp_path,
            [{"kind": "image", "steps": 2}, {"kind": "clip", "steps": 3, "freeze": frozen}],
        )
    ).run()
    before, after = (weights(tmp_path / f"stage{i}.safetensors") for i in ("0-image", "1-clip"))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert not [k for k in moved if k.startswith(tuple(frozen))]
    assert [k for k in moved if k.startswith("head")]


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 4, 5, 7, 9])
def test_a_killed_run_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Bit-equal weights, whether the kill falls between two saves, on one, or between stages."""
    whole = weights(Trainer(config(tmp_path / "whole", ALL_STAGES)).run())
    count = 0
    original = train.Stage._update

    def dying(self: train.Stage, norm: Tensor) -> None:
        nonlocal count
        count += 1
        if count == killed_at:
            raise Killed
        original(self, norm)

    monkeypatch.setattr(train.Stage, "_update", dying)
    with pytest.raises(Killed):
        Trainer(config(tmp_path / "killed", ALL_STAGES)).run()
    monkeypatch.setattr(train.Stage, "_update", original)
    resumed = weights(Trainer(config(tmp_path / "killed", ALL_STAGES)).run())
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []


def test_resuming_with_another_model_is_refused(tmp_path: Path) -> None:
    Trainer(config(tmp_path, ALL_STAGES[:1])).run()
    other = {**to_dict(TINY), "lstm_at": "lr", "growth": 6}
    with pytest.raises(ConfigError, match=r"state\.pt: was saved for another model"):
        Trainer(config(tmp_path, ALL_STAGES[:1], model=other)).run()


def test_gradients_that_are_not_finite_are_skipped_and_then_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(out: Tensor, truth: Tensor) -> Tensor:
        return (out - truth).sum() * float("nan")

    monkeypatch.setattr(train, "charbonnier", nan)
    with pytest.raises(
        TrainingError, match=r"10 gradients in a row were not finite.*stage 0 \(image\)"
    ):
        Trainer(config(tmp_path, [{"kind": "image", "steps": 30}])).run()


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        (
            [{"kind": "image", "steps": 1, "freeze": ["fetures"]}],
            {},
            r"freeze: no module 'fetures'; .*features",
        ),
        ([{"kind": "image", "steps": 0}], {}, r"test.stages\[0\]: steps must be at least 1, got 0"),
        (
            [{"kind": "picture", "steps": 1}],
            {},
            r"stages\[0\].kind: expected one of 'image', 'flow', 'clip'",
        ),
        ([{"kind": "image", "steps": 1}], {"outptu": "x"}, r"test: unknown key 'outptu'"),
        ([{"kind": "image", "steps": 1}], {"preset": "tiny"}, r"preset: expected one of paper"),
        (
            [{"kind": "image", "steps": 1}],
            {"model": {"chanels": 3}},
            r"model: unknown key 'chanels'",
        ),
        (
            [{"kind": "flow", "steps": 1}],
            {"model": {"flow_branch": False}},
            r"a flow stage needs flow_branch = true",
        ),
    ],
)
def test_wrong_configs(
    tmp_path: Path, stages: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(tmp_path, stages, **changes)).run()


def test_known_flow_error_counts_valid_pixels_alone() -> None:
    flow, truth = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    truth[0, 0, 0] = torch.tensor([3.0, 4.0])
    truth[0, 1, 1] = 100.0
    valid = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    # sqrt(25 + 1e-6) and 1e-3 over two valid pixels
    assert known_flow_error(flow, truth, valid).item() == pytest.approx((5 + 1e-3) / 2, rel=1e-5)
    assert known_flow_error(flow, truth, 0 * valid).item() == 0


def test_photometric_error_is_least_for_the_true_flow() -> None:
    """Frame t + 1 shows frame t moved one pixel right: the flow back is -1 in x, forth +1."""
    torch.manual_seed(0)
    world = torch.rand(3, 12, 20)
    frames = torch.stack([world[:, :, 4 - t : 16 - t] for t in range(3)]).unsqueeze(0)
    back, forth = torch.zeros(1, 2, 12, 12, 2), torch.zeros(1, 2, 12, 12, 2)
    back[..., 0], forth[..., 0] = -1, 1
    right = photometric_error(frames, back, forth).item()
    still = photometric_error(frames, 0 * back, 0 * forth).item()
    wrong = photometric_error(frames, forth, back).item()
    assert right < 0.2 * still and right < 0.2 * wrong
