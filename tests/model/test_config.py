"""Configs from dictionaries and TOML: types, unknown keys, overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mafnet.config import (
    PRESETS,
    ConfigError,
    ModelConfig,
    apply_overrides,
    from_dict,
    load_toml,
    to_dict,
)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_the_round_trip(name: str) -> None:
    assert from_dict(ModelConfig, to_dict(PRESETS[name])) == PRESETS[name]


def test_unknown_key_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"model: unknown key 'chanels'; valid keys: .*channels"):
        from_dict(ModelConfig, {"chanels": 64}, "model")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": "64"}, r"config.channels: expected int, got '64'"),
        ({"channels": True}, r"config.channels: expected int, got True"),
        ({"channels": 0}, r"channels must be at least 1, got 0"),
        ({"lstm": "gru"}, r"config.lstm: expected one of 'deform', 'plain', 'none', got 'gru'"),
        ({"sa_scale": "big"}, r"config.sa_scale: expected float"),
        ({"ca_kernel": 5}, r"ca_kernel must be 1 or 3, got 5"),
        ({"deform_groups": 3}, r"deform_groups = 3 must divide the 16 channels"),
        ({"lstm_at": "lr", "offset_at": "lr"}, r"offset_at = 'lr' needs lstm_at = 'hr'"),
        ({"self_attention_window": 0}, r"self_attention_window must be at least 1"),
    ],
)
def test_wrong_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values)


def test_an_int_is_a_float_and_none_is_spelt() -> None:
    config = from_dict(ModelConfig, {"sa_scale": 1, "self_attention_window": "none"})
    assert config.sa_scale == 1.0 and isinstance(config.sa_scale, float)
    assert config.self_attention_window is None


def test_overrides_reach_into_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('output = "a"\n[data]\npatch = 48\n')
    values = apply_overrides(
        load_toml(path), ["data.patch=32", "output=runs/b", "model.causal=true"]
    )
    assert values == {"output": "runs/b", "data": {"patch": 32}, "model": {"causal": True}}


def test_bad_override() -> None:
    with pytest.raises(ConfigError, match="override 'patch': expected key=value"):
        apply_overrides({}, ["patch"])


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file not found: .*none\.toml"):
        load_toml(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"config file .*bad\.toml"):
        load_toml(bad)
