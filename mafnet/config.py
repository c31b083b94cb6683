"""Typed, frozen configuration, to and from TOML. An unknown key is an error that lists the valid ones."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """What a MAFnet is made of. The defaults are the ``base`` preset.

    The marks tell where a choice comes from: P the paper, R ours where the paper is silent.
    """

    # Features: two convolutions, residual dense blocks (P).
    channels: int = 64
    blocks: int = 3
    block_layers: int = 6
    growth: int = 32
    global_fusion: bool = (
        True  # R: concat of all block outputs -> 1x1 -> 3x3 -> + first convolution, as in RDN
    )

    # Attention (P; kernel, sharing and window R).
    channel_attention: bool = True
    ca_reduction: int = 16
    ca_kernel: int = 1  # the paper's 3 leaves 8/9 of its weights without gradient on a 1 x 1 map
    spatial_attention: bool = True
    sa_scale: float = 2.0
    sa_mask_from: Literal["m", "feature"] = "m"
    self_attention: bool = True
    self_attention_reduction: int = 8
    self_attention_window: int | None = 64  # None: the whole frame
    share_attention: bool = False  # one channel and one spatial attention for both branches

    # Attention-flow branch: stage-1 alignment.
    flow_branch: bool = True
    flow_net: Literal["featpyr", "spynet"] = "featpyr"
    flow_channels: int = 32
    flow_width: int = 48
    flow_levels: int = 4
    flow_shared: bool = False  # one residual network for all levels of featpyr

    # Deformable ConvLSTM: stage-2 alignment. "plain" drops the alignment, "none" the recurrence.
    lstm: Literal["deform", "plain", "none"] = "deform"
    lstm_at: Literal["hr", "lr"] = "hr"
    lstm_skip: bool = True  # R: the multi-attention branch also bypasses the recurrence
    offset_at: Literal["hr", "lr"] = "hr"  # with lstm_at = "hr": where the offset head runs
    deform_groups: int = 4
    max_residue: float = 10.0  # pixels, bound on the learnt part of an offset
    direction: Literal["bidirectional", "forward", "causal"] = "bidirectional"

    # Reconstruction.
    hr_channels: int = 16
    recon_blocks: int = 0
    skip: Literal["bicubic", "bilinear", "none"] = "bicubic"

    def __post_init__(self) -> None:
        for name in (
            "channels",
            "growth",
            "hr_channels",
            "flow_channels",
            "flow_width",
            "deform_groups",
        ):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        for name in (
            "blocks",
            "block_layers",
            "flow_levels",
            "ca_reduction",
            "self_attention_reduction",
        ):
            _require(
                getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}"
            )
        _require(self.ca_kernel in (1, 3), f"ca_kernel must be 1 or 3, got {self.ca_kernel}")
        window = self.self_attention_window
        _require(
            window is None or window >= 1, f"self_attention_window must be at least 1, got {window}"
        )
        lstm_channels = self.channels if self.lstm_at == "lr" else self.hr_channels
        _require(
            self.lstm != "deform" or lstm_channels % self.deform_groups == 0,
            f"deform_groups = {self.deform_groups} must divide the {lstm_channels} channels of the LSTM",
        )
        _require(
            self.offset_at == "hr" or self.lstm_at == "hr",
            "offset_at = 'lr' needs lstm_at = 'hr'; an LSTM at LR has its offsets there already",
        )


PRESETS: dict[str, ModelConfig] = {
    # As the paper and its figures give it; unidirectional, no skips of ours.
    "paper": ModelConfig(
        block_layers=8,
        growth=64,
        global_fusion=False,
        ca_kernel=3,
        sa_scale=1.0,
        self_attention_window=None,
        lstm_skip=False,
        deform_groups=8,
        direction="forward",
        hr_channels=64,
        skip="none",
    ),
    "base": ModelConfig(),
    # The light model that the paper leaves as future work.
    "lite": ModelConfig(
        channels=32,
        block_layers=4,
        growth=16,
        ca_reduction=8,
        self_attention_reduction=4,
        self_attention_window=32,
        share_attention=True,
        flow_channels=16,
        flow_width=24,
        flow_shared=True,
        lstm_at="lr",
    ),
    "large": ModelConfig(
        block_layers=8,
        growth=64,
        lstm_at="lr",
        deform_groups=8,
        hr_channels=64,
        recon_blocks=10,
    ),
}


# ---------------------------------------------------------------------------------- dictionaries and TOML

T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Build the dataclass ``cls`` from nested dictionaries, checking every key and type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; valid keys: {', '.join(sorted(fields))}"
        )
    hints = typing.get_type_hints(cls)
    arguments = {k: _convert(v, hints[k], f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).replace('__init__() ', '')}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in options:
            raise ConfigError(
                f"{where}: expected one of {', '.join(map(repr, options))}, got {value!r}"
            )
        return value
    if origin in (types.UnionType, typing.Union):  # T | None; "none" spells None, which TOML lacks
        if value is None or value == "none":
            return None
        return _convert(value, next(o for o in options if o is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(v, options[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        hint = dict  # its values are checked by whoever reads them
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary of a config dataclass, for JSON."""
    return dataclasses.asdict(config)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; a missing or malformed one raises :class:`ConfigError` that names it."""
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from None


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set dotted ``key=value`` pairs; the value is read as TOML, and as a string where it is none."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r}: expected key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.strip().split(".")
        table = values
        for name in path:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override {item!r}: {name} is not a table")
        table[last] = value
    return values
