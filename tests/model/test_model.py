"""What MAFnet promises: shapes, time, context, switches and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import TINY, build, run
from tolerances import assert_rounding_only, assert_same
from torch import Tensor, nn

from mafnet import ChannelStatistics, ConfigError, MAFnet
from mafnet.layers import DeformableConvLSTM, FeaturePyramidFlow, SpyNet, bicubic_upscale_x4
from mafnet_ops import channel_statistics, deform_align

VARIANTS: dict[str, dict[str, Any]] = {
    "hr": {},
    "lr": {"lstm_at": "lr"},
    "offset_lr": {"offset_at": "lr"},
    "paper_like": {
        "self_attention_window": None,
        "lstm_skip": False,
        "skip": "none",
        "direction": "forward",
        "global_fusion": False,
        "ca_kernel": 3,
    },
    "causal": {"direction": "causal", "lstm_at": "lr"},
    "shared": {"share_attention": True, "flow_shared": True, "lstm_at": "lr"},
    "bilinear": {"skip": "bilinear", "sa_mask_from": "feature"},
    "no_channel_attention": {"channel_attention": False},
    "no_spatial_attention": {"spatial_attention": False},
    "no_self_attention": {"self_attention": False},
    "no_flow_branch": {"flow_branch": False},
    "no_flow_branch_lr": {"flow_branch": False, "lstm_at": "lr"},
    "plain_lstm": {"lstm": "plain"},
    "no_lstm": {"lstm": "none"},
    "single_frame": {"lstm": "none", "flow_branch": False},
    "spynet": {"flow_net": "spynet", "lstm_at": "lr"},
    "recon_blocks": {"lstm_at": "lr", "recon_blocks": 2},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_runs_and_trains_all_its_parameters(name: str) -> None:
    net = build(**VARIANTS[name])
    frames = torch.rand(2, 3, 3, 9, 13)
    out = net(frames)
    assert out.shape == (2, 3, 3, 36, 52)
    out.square().mean().backward()
    still = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert still == []
    silent = [k for k, p in net.named_parameters() if p.grad is not None and not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 1, 1), (1, 1, 3, 5, 1), (1, 2, 3, 1, 6), (2, 1, 3, 7, 7)]
)
@pytest.mark.parametrize("name", ["hr", "lr", "offset_lr", "spynet"])
def test_any_size_and_length(name: str, shape: tuple[int, ...]) -> None:
    out = run(build(**VARIANTS[name]), torch.rand(shape))
    assert out.shape == (*shape[:3], 4 * shape[3], 4 * shape[4])
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "switch", [None, "spatial_attention", "channel_attention", "self_attention"]
)
def test_shared_attention_is_computed_once_for_both_branches(switch: str | None) -> None:
    """Each of its modules runs once, with the bits that two runs per branch give."""
    options = {} if switch is None else {switch: False}
    attention = build(share_attention=True, lstm_at="lr", **options).attention
    x = torch.randn(3, TINY.channels, 9, 7)
    statistics = channel_statistics(x)
    expected = attention(x, statistics), attention.in_parallel(x, statistics)
    calls: list[str] = []
    for name, module in attention.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    both = attention.for_both_branches(x, statistics)
    assert sorted(calls) == sorted(name for name, _ in attention.named_children())
    for a, e in zip(both, expected):
        assert_same(a, e)


def test_untrained_network_gives_about_bicubic() -> None:
    torch.manual_seed(0)
    net = MAFnet(TINY)
    frames = torch.rand(1, 2, 3, 8, 10)
    cubic = bicubic_upscale_x4(frames[0])
    assert (run(net, frames)[0] - cubic).abs().mean() < 0.05


def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    net = build()
    frames = torch.rand(2, 3, 3, 9, 8)
    both = run(net, frames)
    torch.testing.assert_close(run(net, frames[1:]), both[1:], rtol=1e-5, atol=1e-6)


def influence(net: MAFnet, frame: int, count: int = 5) -> list[bool]:
    """Which output frames change when input frame ``frame`` does."""
    torch.manual_seed(1)
    frames = torch.rand(1, count, 3, 8, 8)
    changed = frames.clone()
    changed[:, frame] = torch.rand(3, 8, 8)
    difference = (run(net, frames) - run(net, changed)).abs().amax((0, 2, 3, 4))
    return [bool(d > 1e-7) for d in difference]


def test_bidirectional_network_sees_all_frames() -> None:
    assert influence(build(), 2) == [True] * 5


def test_causal_network_never_looks_ahead() -> None:
    assert influence(build(direction="causal"), 2) == [False, False, True, True, True]


def test_forward_network_looks_one_frame_ahead_by_flow_alone() -> None:
    assert influence(build(direction="forward"), 3) == [False, False, True, True, True]


def test_single_frame_network_sees_one_frame() -> None:
    assert influence(build(lstm="none", flow_branch=False), 2) == [i == 2 for i in range(5)]


def test_flow_branch_alone_sees_the_neighbours() -> None:
    assert influence(build(lstm="none"), 2) == [False, True, True, True, False]


@pytest.mark.parametrize("name", ["hr", "lr", "single_frame"])
def test_center_only_is_the_middle_of_the_whole(name: str) -> None:
    net = build(**VARIANTS[name])
    frames = torch.rand(1, 5, 3, 8, 9)
    torch.testing.assert_close(
        run(net, frames, center_only=True), run(net, frames)[:, 2:3], rtol=1e-5, atol=1e-6
    )


def test_time_reversal_of_a_bidirectional_network_swaps_only_the_fuse() -> None:
    """Both directions share one set of weights: with a symmetric fuse, reversing time reverses the output."""
    net = build(flow_branch=False, lstm_at="lr")
    recurrence = net.head.recurrence
    assert recurrence is not None and recurrence.fuse is not None
    with torch.no_grad():
        forward, backward = recurrence.fuse.weight.chunk(2, 1)
        backward.copy_(forward.clone())
    frames = torch.rand(1, 4, 3, 8, 8)
    torch.testing.assert_close(
        run(net, frames.flip(1)), run(net, frames).flip(1), rtol=1e-5, atol=1e-6
    )


def test_statistics_from_outside_are_used_and_equal_the_own_ones() -> None:
    net = build()
    frames = torch.rand(1, 2, 3, 9, 9)
    statistics = net.channel_statistics(frames)
    assert statistics.mean.shape == (1, 2, 8)
    own = run(net, frames)
    torch.testing.assert_close(run(net, frames, statistics=statistics), own)
    others = ChannelStatistics(statistics.mean + 1, statistics.max + 1)
    assert not torch.allclose(run(net, frames, statistics=others), own)


def test_a_tile_with_the_frame_statistics_equals_the_whole_inside() -> None:
    """Windows aligned, statistics shared: a tile differs from the whole only near its cut edges."""
    net = build(lstm="none", flow_branch=False, spatial_attention=False)
    frames = torch.rand(1, 1, 3, 16, 48)
    frames[..., 40:] += 20  # what only the whole frame knows
    whole = run(net, frames)
    tile = run(net, frames[..., :32], statistics=net.channel_statistics(frames))
    torch.testing.assert_close(tile[..., : 4 * 16], whole[..., : 4 * 16], rtol=1e-4, atol=1e-5)
    without = run(net, frames[..., :32])
    assert (without[..., : 4 * 16] - whole[..., : 4 * 16]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = build()
    frames = torch.rand(1, 3, 3, 9, 8)
    reference = run(net, frames)
    out = run(net.to(dtype), frames.to(dtype))
    assert out.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (out.double() - reference.double()).abs().max() < 32 * eps


def test_channels_last_gives_the_same() -> None:
    net = build()
    frames = torch.rand(1, 3, 3, 9, 8)
    reference = run(net, frames)
    out = run(net.to(memory_format=torch.channels_last), frames)  # type: ignore[call-overload]
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (
            torch.rand(1, 3, 8, 8),
            ValueError,
            r"frames: expected \(B, T, 3, H, W\).*got \(1, 3, 8, 8\)",
        ),
        (torch.rand(1, 2, 4, 8, 8), ValueError, r"got \(1, 2, 4, 8, 8\)"),
        (torch.rand(1, 0, 3, 8, 8), ValueError, r"T, H, W >= 1"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), TypeError, "floating-point.*uint8"),
    ],
)
def test_wrong_frames(frames: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(build(), frames)


def test_wrong_statistics() -> None:
    net = build()
    statistics = ChannelStatistics(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"statistics: expected \(B, T, C\) = \(1, 2, 8\)"):
        run(net, torch.rand(1, 2, 3, 8, 8), statistics=statistics)


def test_unknown_preset() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown preset 'huge'; presets: paper, base, lite, large"
    ):
        MAFnet.from_preset("huge")


# ---------------------------------------------------------------------------------------------- layers


def shifted_pair(dx: int, dy: int, channels: int = 4, size: int = 32) -> tuple[Tensor, Tensor]:
    """Feature maps a, b with a(p) = b(p + (dx, dy)) away from the border."""
    torch.manual_seed(2)
    world = torch.rand(1, channels, size + 16, size + 16)
    world = nn.functional.avg_pool2d(world, 5, 1, 2)
    a = world[..., 8 : 8 + size, 8 : 8 + size]
    b = world[..., 8 - dy : 8 - dy + size, 8 - dx : 8 - dx + size]
    return a, b


def test_untrained_flow_is_zero() -> None:
    a, b = shifted_pair(2, 1)
    flow = FeaturePyramidFlow(4, 8, 3, shared=False)(a, b)
    assert flow.shape == (1, 32, 32, 2)
    assert not flow.any()


def test_flow_network_learns_known_shifts_and_their_sign() -> None:
    """A few hundred steps on integer shifts: x and y come out in the project's order and sign."""
    torch.manual_seed(0)
    net = FeaturePyramidFlow(4, 16, 3, shared=True)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    shifts = [(2, 0), (-2, 0), (0, 2), (0, -2), (1, -2), (-1, 1)]
    pairs = [shifted_pair(*s) for s in shifts]
    a, b = (torch.cat([p[i] for p in pairs]) for i in range(2))
    truth = torch.tensor(shifts, dtype=torch.float32).view(-1, 1, 1, 2)
    for _ in range(150):
        error = (net(a, b) - truth)[:, 6:-6, 6:-6].square().sum(-1).add(1e-4).sqrt().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    assert error.item() < 0.5 * truth.square().sum(-1).sqrt().mean().item()


def test_deformable_lstm_follows_a_known_shift() -> None:
    """With the flow as base offset the identity-initialised alignment carries the state to where it moved."""
    torch.manual_seed(0)
    lstm = DeformableConvLSTM(4, 2, 10.0, align=True, offset_stride=1).eval()
    assert lstm.align is not None
    with torch.no_grad():
        lstm.align.weight.zero_()
        lstm.align.init_identity()
        state = torch.rand(1, 4, 12, 12)
        flow = torch.zeros(1, 12, 12, 2)
        flow[..., 0] = 3  # the state for column x lay at column x + 3
        raw = torch.zeros(1, 27 * 2, 12, 12)
        h, c = lstm._align(state, 2 * state, raw, flow)
    torch.testing.assert_close(h[..., :9], state[..., 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(c[..., :9], 2 * state[..., 3:], rtol=1e-4, atol=1e-4)


def test_lstm_gradients_reach_every_frame_and_the_offsets() -> None:
    net = build(lstm_at="lr")
    frames = torch.rand(1, 4, 3, 8, 8, requires_grad=True)
    net(frames)[:, 0].square().sum().backward()
    assert frames.grad is not None
    assert (frames.grad.abs().amax((0, 2, 3, 4)) > 0).all()
    assert net.head.recurrence is not None
    assert net.head.recurrence.lstm.head_out.weight.grad is not None
    assert net.head.recurrence.lstm.head_out.weight.grad.abs().max() > 0


def test_spynet_loads_the_public_state_dict_and_measures_in_pixels() -> None:
    """Key names and shapes of the public weights (BasicSR's naming): 6 levels of 5 convolutions 7 x 7."""
    net = SpyNet()
    expected = {"mean": (1, 3, 1, 1), "std": (1, 3, 1, 1)}
    widths = [8, 32, 64, 32, 16, 2]
    for level in range(6):
        for layer in range(5):
            name = f"basic_module.{level}.basic_module.{2 * layer}"
            expected[f"{name}.weight"] = (widths[layer + 1], widths[layer], 7, 7)
            expected[f"{name}.bias"] = (widths[layer + 1],)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected
    assert sum(p.numel() for p in net.parameters()) == 1_440_300
    # A network whose last level adds one pixel in x gives that flow, whatever the padding to 32 does to the size.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.basic_module[5].basic_module[8].bias[0] = 1.0  # type: ignore[index, union-attr]
        flow = net(torch.rand(1, 3, 40, 64), torch.rand(1, 3, 40, 64))
    assert flow.shape == (1, 40, 64, 2)
    torch.testing.assert_close(flow[..., 0], torch.ones(1, 40, 64))
    assert not flow[..., 1].any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9)])
def test_bicubic_skip_is_matlabs(size: tuple[int, int]) -> None:
    from mafnet.data.degrade import imresize

    torch.manual_seed(0)
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    expected = imresize(image[0].permute(1, 2, 0).numpy(), 4.0)
    out = bicubic_upscale_x4(image)[0].permute(1, 2, 0).numpy()
    assert abs(out - expected).max() < 1e-12


def test_bicubic_skip_stays_fp32_under_autocast() -> None:
    image = torch.rand(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bicubic_upscale_x4(image), bicubic_upscale_x4(image.float()))
        assert bicubic_upscale_x4(image).dtype == torch.float32


def test_both_states_of_the_lstm_are_aligned_by_the_same_offsets() -> None:
    """As a call for each, with its own half of the weight."""
    torch.manual_seed(0)
    lstm = DeformableConvLSTM(8, 4, max_residue=3.0, align=True, offset_stride=1).double()
    assert lstm.align is not None and lstm.align.bias is not None
    nn.init.normal_(lstm.align.bias)
    h, c = torch.rand(2, 2, 8, 9, 10, dtype=torch.float64) * 2 - 1
    raw = torch.randn(2, 108, 9, 10, dtype=torch.float64)
    flow = 2 * torch.randn(2, 9, 10, 2, dtype=torch.float64)
    aligned = lstm._align(h, c, raw, flow)
    weights, biases = lstm.align.weight.chunk(2), lstm.align.bias.chunk(2)
    for state, weight, bias, actual in zip((h, c), weights, biases, aligned):
        expected = deform_align(state, raw, weight, bias, flow, max_residue_magnitude=3.0)
        assert_rounding_only(actual, expected, 4 * 72 + 1, 10)
