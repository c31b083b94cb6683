"""Training in stages, from one TOML file: single frames, then flow on known shifts, then whole clips.

Every stage starts from the averaged weights of the one before. A run that is killed and started again goes on from
its last saved state and ends as if it had not been: data order, optimiser, averages and random state are all in it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mafnet_ops import flow_warp

from . import checkpoint
from .config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    apply_overrides,
    from_dict,
    load_toml,
    to_dict,
)
from .data import DataConfig, PackedData, pack
from .losses import charbonnier
from .model import MAFnet

log = logging.getLogger("mafnet.train")


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    ``image`` trains the single-frame part on crops, ``flow`` the flow network on pairs with known motion, ``clip``
    the whole network on clips.
    """

    kind: Literal["image", "flow", "clip"]
    steps: int
    batch: int = 8
    patch: int = 48  # LR pixels; clips keep the side that they were packed with
    lr: float = 1e-3
    lr_final: float = 0.01  # fraction of lr at the end of the cosine
    warmup: int = 100
    freeze: tuple[str, ...] = ()  # modules that stay as they are, e.g. "features"
    flow_lr_factor: float = 0.25  # clip stage: the flow network moves slower
    frames_in_loss: int = 3  # clip stage: frames reconstructed per step, drawn anew each time
    video_share: float = 0.4  # clip stage: real clips against synthetic ones
    flow_weight: float = 0.02  # clip stage: end-point error where the motion is known
    photometric_weight: float = 0.1  # clip stage: warped neighbour against frame
    clip_norm: float = 1.0
    ema: float = 0.995

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patch", "frames_in_loss"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema}")


@dataclass(frozen=True)
class EvalConfig:
    """A clip that is measured while training: the first one of a folder that ``mafnet eval`` takes."""

    folder: str
    every: int = 500
    frames: int = 5  # the first of each measured window
    windows: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    ``model`` changes single keys of the preset; ``start_from`` names weights, or their file, to go on from.
    """

    data: DataConfig
    stages: tuple[StageConfig, ...]
    output: str
    preset: str = "lite"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    start_from: str | None = None
    attention_window: int | None = None  # while training: a window that divides the patch
    eval: EvalConfig | None = None
    seed: int = 1
    threads: int = 0  # 0: torch's default
    autocast: Literal["bf16", "none"] = "bf16"
    save_every: int = 200
    log_every: int = 50

    def model_config(self) -> ModelConfig:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        return from_dict(ModelConfig, {**to_dict(PRESETS[self.preset]), **self.model}, "model")


def main_train(config_path: str | Path, overrides: list[str]) -> Path:
    """Train as the TOML file says, with ``key=value`` overrides; returns the path of the final weights."""
    config = from_dict(
        TrainConfig, apply_overrides(load_toml(config_path), overrides), str(config_path)
    )
    return Trainer(config).run()


class Trainer:
    """Runs the stages of a config in its output folder: state.pt (to resume), log.jsonl, weights."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model_config = config.model_config()
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.data: PackedData = pack(config.data)
        self.rng = np.random.default_rng(config.seed)
        torch.manual_seed(config.seed)
        net = MAFnet(self.model_config)
        if config.start_from is not None:
            checkpoint.load_strict(net, checkpoint.load(config.start_from))
        self.averages = net.state_dict()  # what the next stage starts from
        self.stage_index = 0

    def run(self) -> Path:
        resumed = self._load_state()
        for index in range(self.stage_index, len(self.config.stages)):
            self.stage_index = index
            stage = _STAGES[self.config.stages[index].kind](self, self.config.stages[index])
            if resumed is not None:
                stage.load(resumed)
                resumed = None
            stage.run()
            self.averages.update(stage.ema.weights)
            self.stage_index = index + 1
            self._write(self.state_path, {"stage": self.stage_index, **self._state()})
            self.save_weights(f"stage{index}-{stage.stage.kind}", self.averages)
        return self.save_weights(self.config.preset, self.averages)

    # -------------------------------------------------------------------------------------------- state

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def save(self, stage: Stage) -> None:
        self._write(self.state_path, {"stage": self.stage_index, **self._state(), **stage.state()})

    def _state(self) -> dict[str, Any]:
        return {
            "averages": self.averages,
            "rng": json.dumps(self.rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
            "model": json.dumps(to_dict(self.model_config)),
        }

    def _load_state(self) -> dict[str, Any] | None:
        """Go back to the last saved state; returns it where a stage was under way."""
        if not self.state_path.exists():
            return None
        state = torch.load(self.state_path, weights_only=True)
        if state["model"] != json.dumps(to_dict(self.model_config)):
            raise ConfigError(
                f"{self.state_path}: was saved for another model; choose a new output folder"
            )
        self.averages = state["averages"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.stage_index = state["stage"]
        return state if "step" in state else None

    @staticmethod
    def _write(path: Path, state: dict[str, Any]) -> None:
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> Path:
        path = self.folder / f"{name}.safetensors"
        checkpoint.save(path, weights, self.model_config, "BI")
        return path

    def write_log(self, row: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


class Average:
    """Exponential moving average of a module's weights, with a short memory in the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            self.weights[key].lerp_(value, 1 - decay)


class Stage:
    """A stage's network, optimiser and loop; subclasses say which network, which parameters and which loss."""

    def __init__(self, trainer: Trainer, stage: StageConfig) -> None:
        self.trainer = trainer
        self.stage = stage
        self.step = 0
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.net = MAFnet(self.network_config(trainer.model_config))
        known = {k: trainer.averages[k] for k in self.net.state_dict()}
        self.net.load_state_dict(known)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name in stage.freeze:
            try:
                self.net.get_submodule(name).requires_grad_(False)
            except AttributeError:
                known_names = ", ".join(
                    n for n, _ in self.net.named_modules() if n.count(".") < 2 and n
                )
                raise ConfigError(f"freeze: no module {name!r}; modules: {known_names}") from None
        self.ema = Average(self.net, stage.ema)
        self.groups = list(self.parameter_groups())
        self.optimiser = torch.optim.Adam(
            [{"params": g["params"]} for g in self.groups], lr=stage.lr, betas=(0.9, 0.99)
        )

    def network_config(self, config: ModelConfig) -> ModelConfig:
        """The network that this stage runs; its parameters are a subset of the whole network's."""
        window = self.trainer.config.attention_window
        return (
            config if window is None else dataclasses.replace(config, self_attention_window=window)
        )

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        yield {"params": [p for p in self.net.parameters() if p.requires_grad], "factor": 1.0}

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        raise NotImplementedError

    def run(self) -> None:
        self.net.train()
        trained = [p for g in self.groups for p in g["params"]]
        name = f"stage {self.trainer.stage_index} ({self.stage.kind})"
        bar = tqdm(total=self.stage.steps, initial=self.step, desc=name, unit="step", mininterval=2)
        sums: dict[str, float] = {}
        started, count = time.monotonic(), 0
        while self.step < self.stage.steps:
            for group, own in zip(self.optimiser.param_groups, self.groups, strict=True):
                group["lr"] = self.learning_rate() * own["factor"]
            total, parts = self.loss()
            self.optimiser.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(trained, self.stage.clip_norm)
            self._update(norm)
            self.ema.update(self.net, self.step)
            self.step += 1
            count += 1
            bar.update()
            for key, value in {**parts, "norm": float(norm)}.items():
                sums[key] = sums.get(key, 0.0) + value
            if self.step % self.trainer.config.log_every == 0:
                means = {k: round(v / count, 6) for k, v in sums.items()}
                seconds = round((time.monotonic() - started) / count, 4)
                row = {"stage": self.stage.kind, "step": self.step, **means, "s_per_step": seconds}
                self.trainer.write_log(row)
                bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()})
                sums, started, count = {}, time.monotonic(), 0
            self._evaluate()
            if self.step % self.trainer.config.save_every == 0:
                self.trainer.save(self)
        bar.close()

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to ``lr_final``."""
        s = self.stage
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        warm = min(1.0, (self.step + 1) / max(1, s.warmup))
        return s.lr * warm * (cosine * (1 - s.lr_final) + s.lr_final)

    def _update(self, norm: Tensor) -> None:
        """One optimiser step, unless the gradient is not finite; ten of those in a row end the run."""
        if bool(torch.isfinite(norm)):
            self.optimiser.step()
            self.skipped = 0
            return
        self.skipped += 1
        log.warning("step %d: gradient not finite, skipped", self.step)
        if self.skipped >= 10:
            raise TrainingError(
                f"training stopped: 10 gradients in a row were not finite, the last at step {self.step} of stage "
                f"{self.trainer.stage_index} ({self.stage.kind})"
            )

    def _evaluate(self) -> None:
        config = self.trainer.config.eval
        if config is None or (self.step % config.every and self.step != self.stage.steps):
            return
        from .evaluate import clips_in, measure_windows

        net = MAFnet(self.measured_config())
        net.load_state_dict({k: self.ema.weights[k] for k in net.state_dict()})
        net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        clip = clips_in(Path(config.folder))[0]
        psnr = measure_windows(net, clip, config.frames, config.windows)
        log.info("step %d: %s psnr_y %.3f dB", self.step, config.folder, psnr)
        self.trainer.write_log(
            {"stage": self.stage.kind, "step": self.step, "psnr_y": round(psnr, 4)}
        )

    def measured_config(self) -> ModelConfig:
        """This stage's network with the windows of the final model."""
        window = self.trainer.model_config.self_attention_window
        return dataclasses.replace(self.net.config, self_attention_window=window)

    def autocast(self) -> torch.autocast:
        on = self.trainer.config.autocast == "bf16"
        return torch.autocast("cpu", torch.bfloat16, enabled=on)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "ema": self.ema.weights,
            "optimiser": self.optimiser.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.net.load_state_dict(state["net"])
        self.ema.weights = state["ema"]
        self.optimiser.load_state_dict(state["optimiser"])


class ImageStage(Stage):
    """Single frames through features, multi-attention and reconstruction."""

    def network_config(self, config: ModelConfig) -> ModelConfig:
        config = super().network_config(config)
        return dataclasses.replace(config, flow_branch=False, lstm="none")

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        lr, hr = self.trainer.data.image_batch(self.trainer.rng, self.stage.batch, self.stage.patch)
        with self.autocast():
            out = self.net(lr.unsqueeze(1))[:, 0]
        value = charbonnier(out, hr)
        return value, {"charbonnier": value.item()}


class FlowStage(Stage):
    """The flow network and its guide features on pairs with known motion; the features stay as they are."""

    def network_config(self, config: ModelConfig) -> ModelConfig:
        if not config.flow_branch or config.flow_net != "featpyr":
            raise ConfigError("a flow stage needs flow_branch = true and flow_net = 'featpyr'")
        return super().network_config(config)

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        branch = self.net.flow_branch
        assert branch is not None and branch.guide is not None
        params = [*branch.guide.parameters(), *branch.net.parameters()]
        self.net.requires_grad_(False)
        for p in params:
            p.requires_grad_(True)
        yield {"params": params, "factor": 1.0}

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        a, b, truth, valid = self._pairs()
        branch = self.net.flow_branch
        assert branch is not None and branch.guide is not None
        with self.autocast():
            with torch.no_grad():
                both = self.net.flow_features(torch.stack([a, b], 1))
            guide = branch.guide(both).unflatten(0, (a.shape[0], 2))
            flows = branch.net.pyramid(guide[:, 0], guide[:, 1])  # type: ignore[operator]
        value = torch.zeros(())
        for level, flow in enumerate(reversed(flows)):  # finest first
            size = (flow.shape[1], flow.shape[2])
            known = F.adaptive_avg_pool2d(valid.unsqueeze(1), size).squeeze(1)
            shrunk = F.adaptive_avg_pool2d((truth * valid.unsqueeze(-1)).permute(0, 3, 1, 2), size)
            shrunk = shrunk.permute(0, 2, 3, 1) / known.clamp(min=1e-6).unsqueeze(-1) / 2**level
            weight = 1.0 if level == 0 else 0.4 * 2**level
            value = value + weight * known_flow_error(flow, shrunk, known)
        epe = known_flow_error(flows[-1].detach(), truth, valid)
        still = known_flow_error(torch.zeros_like(truth), truth, valid)
        return value, {
            "flow_loss": value.item(),
            "epe": epe.item(),
            "epe_of_zero_flow": still.item(),
        }

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames a, b (n, 3, q, q), flow a -> b and where it is known: shifted stills and moving clips in turn."""
        data, rng, n = self.trainer.data, self.trainer.rng, self.stage.batch
        if self.step % 2 == 0:
            shifts = data.shift_pair_batch(rng, n)
            return *shifts, torch.ones(shifts.flow.shape[:3])
        clips = data.clip_batch(rng, max(1, n // 4), video_share=0.0)
        here, there = clips.lr[:, 1:].flatten(0, 1), clips.lr[:, :-1].flatten(0, 1)
        return here, there, clips.flow_prev[:, 1:].flatten(0, 1), clips.valid[:, 1:].flatten(0, 1)

    def _evaluate(self) -> None:
        """The picture does not change in this stage."""


class ClipStage(Stage):
    """The whole network on clips."""

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        branch = self.net.flow_branch
        flow = []
        if branch is not None:
            flow = [*branch.net.parameters()]
            flow += [] if branch.guide is None else [*branch.guide.parameters()]
        slow = {id(p) for p in flow}
        moving = [p for p in self.net.parameters() if p.requires_grad]
        yield {"params": [p for p in moving if id(p) not in slow], "factor": 1.0}
        if any(id(p) in slow for p in moving):
            yield {
                "params": [p for p in moving if id(p) in slow],
                "factor": self.stage.flow_lr_factor,
            }

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        s = self.stage
        batch = self.trainer.data.clip_batch(self.trainer.rng, s.batch, s.video_share)
        frames = batch.lr.shape[1]
        count = min(s.frames_in_loss, frames)
        select = sorted(self.trainer.rng.choice(frames, count, replace=False).tolist())
        with self.autocast():
            out = self.net.reconstruct(batch.lr, select)
        value = charbonnier(out.frames, batch.hr[:, select])
        parts = {"charbonnier": value.item()}
        if (
            out.flow_previous is not None
            and out.flow_next is not None
            and out.flow_next.requires_grad
        ):
            flows = torch.cat([out.flow_previous, out.flow_next])
            truth = torch.cat([batch.flow_prev[:, 1:], batch.flow_next[:, :-1]])
            valid = torch.cat([batch.valid[:, 1:], batch.valid[:, :-1]])
            epe = known_flow_error(flows, truth, valid)
            photometric = photometric_error(batch.lr, out.flow_previous, out.flow_next)
            value = value + s.flow_weight * epe + s.photometric_weight * photometric
            parts |= {"epe": epe.item(), "photometric": photometric.item()}
        return value, parts


_STAGES: dict[str, type[Stage]] = {"image": ImageStage, "flow": FlowStage, "clip": ClipStage}


def known_flow_error(flow: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Mean end-point error in LR pixels over the pixels whose motion is known."""
    error = ((flow - truth).square().sum(-1) + 1e-6).sqrt()
    return (error * valid).sum() / valid.sum().clamp(min=1)


def photometric_error(frames: Tensor, flow_previous: Tensor, flow_next: Tensor) -> Tensor:
    """Frames (B, T, 3, H, W) against their warped neighbours, plus 2 % total variation of the flow."""
    here = torch.cat([frames[:, 1:], frames[:, :-1]]).flatten(0, 1)
    there = torch.cat([frames[:, :-1], frames[:, 1:]]).flatten(0, 1)
    flow = torch.cat([flow_previous, flow_next]).flatten(0, 1)
    difference = flow_warp(there, flow, "bilinear", "border") - here
    variation = (flow[:, 1:] - flow[:, :-1]).abs().mean() + (
        flow[:, :, 1:] - flow[:, :, :-1]
    ).abs().mean()
    return (difference.square() + 1e-6).sqrt().mean() + 0.02 * variation
