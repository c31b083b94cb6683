"""The `mafnet` command: one subcommand per task, each a few lines that call the library."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mafnet_ops import __version__

OWN_PACKAGES = ("mafnet", "mafnet_ops")
INTERRUPTED = 130  # what a shell reports for Ctrl-C


class UsageError(Exception):
    """The arguments cannot be followed, said in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 0, 1 after a one-line error, 130 after Ctrl-C.

    Every exception class defined in mafnet or mafnet_ops becomes the one line; any other exception
    is a bug and keeps its traceback.
    """
    arguments = build_parser().parse_args(argv)
    handler: Callable[[argparse.Namespace], int | None] = arguments.handler
    try:
        return handler(arguments) or 0
    except KeyboardInterrupt:
        print("mafnet: interrupted; nothing was written under the output's name", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OWN_PACKAGES:
            raise
        print(f"mafnet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mafnet", description="Video super-resolution with MAFnet: four times the size."
    )
    parser.add_argument("--version", action="version", version=f"mafnet {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_upscale(commands)
    _add_demo(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_degrade(commands)
    _add_metrics(commands)
    _add_export(commands)
    doctor = commands.add_parser("doctor", help="say which backend runs each operator, and why")
    doctor.set_defaults(handler=_doctor)
    return parser


def _add_upscale(commands: Any) -> None:
    p = commands.add_parser(
        "upscale",
        help="upscale a video, a folder of frames or an image",
        description="Upscale IN by 4 into OUT. Audio and subtitles are copied, time stamps kept. "
        "OUT appears only when it is whole. Pixels are those of the input (LR) unless said.",
    )
    p.add_argument("input", type=Path, metavar="IN", help="video, folder of frames, or image")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no notes")
    _add_model(p)
    work = p.add_argument_group("work and memory")
    work.add_argument(
        "--chunk",
        type=_positive,
        metavar="N",
        help="new frames per window (default: by frame size)",
    )
    work.add_argument(
        "--overlap",
        type=_natural,
        metavar="N",
        help="frames of context on each side of a window (default: what the model can use)",
    )
    work.add_argument(
        "--tile",
        type=_tile,
        metavar="auto|N|0",
        help="tiles of N pixels; 0: whole frames; auto (default): tiles where frames are large",
    )
    work.add_argument(
        "--tile-overlap",
        type=_positive,
        metavar="N",
        help="context around a tile (default 32); both are rounded up to attention windows",
    )
    work.add_argument("--threads", type=_threads, metavar="N", help="CPU threads")
    cut = p.add_argument_group("what to read")
    cut.add_argument("--start", type=_time, metavar="TIME", help="seconds or [HH:]MM:SS[.mmm]")
    cut.add_argument("--end", type=_time, metavar="TIME", help="first moment left out")
    cut.add_argument(
        "--damaged",
        choices=("error", "keep"),
        default="error",
        help="cut short or damaged input: stop (default), or upscale what can be decoded",
    )
    out = p.add_argument_group("encoding of videos")
    out.add_argument("--codec", metavar="NAME", help="encoder (default libx264, WebM libvpx-vp9)")
    out.add_argument("--crf", type=float, metavar="Q", help="quality (default 16 for libx264)")
    out.add_argument("--preset", metavar="NAME", help="the encoder's speed preset")
    out.add_argument("--pix-fmt", metavar="NAME", help="default: the source's kind")
    out.add_argument("--audio", choices=("copy", "none"), default="copy", help="default copy")
    p.set_defaults(handler=_upscale)


def _upscale(a: argparse.Namespace) -> None:
    from mafnet.video import EncodeSettings, UpscaleOptions, upscale

    encode = EncodeSettings(a.codec, a.crf, a.preset, a.pix_fmt, a.audio == "copy", a.threads)
    options = UpscaleOptions(
        model=a.model,
        device=a.device,
        dtype=a.dtype,
        chunk=a.chunk,
        overlap=a.overlap,
        tile=a.tile,
        tile_overlap=a.tile_overlap,
        start=a.start,
        end=a.end,
        damaged=a.damaged,
        overwrite=a.overwrite,
        progress=not a.quiet,
        threads=a.threads,
        encode=encode,
    )
    report = upscale(a.input, a.output, options)
    if a.quiet:
        return
    for note in report.notes:
        print(f"mafnet: note: {note}", file=sys.stderr)
    width, height = report.size
    print(
        f"{a.output}: {report.frames} frames of {width}x{height} in {report.seconds:.1f} s "
        f"({report.seconds / report.frames:.2f} s a frame, {report.arithmetic})"
    )


def _add_demo(commands: Any) -> None:
    p = commands.add_parser(
        "demo", help="upscale the bundled clip and compare with its ground truth"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("mafnet-demo"), metavar="DIR")
    _add_model(p)
    p.set_defaults(handler=_demo)


def _demo(a: argparse.Namespace) -> None:
    from mafnet.demo import run_demo

    run_demo(a.output, a.model, a.device, a.dtype)


def _add_model(p: argparse.ArgumentParser) -> None:
    model = p.add_argument_group("model")
    model.add_argument("--model", default="lite", metavar="NAME|PATH", help="default lite")
    model.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "fp16", "bf16"),
        help="arithmetic; auto is fp16 on CUDA, bf16 on CPUs with AVX512-BF16 or AMX, fp32 elsewhere",
    )


def _add_train(commands: Any) -> None:
    p = commands.add_parser("train", help="train from a recipe")
    p.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="TOML recipe")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces a recipe's value")
    p.set_defaults(handler=_train)


def _train(a: argparse.Namespace) -> None:
    from mafnet.train import main_train

    print(main_train(a.config, a.overrides))


def _add_eval(commands: Any) -> None:
    p = commands.add_parser(
        "eval",
        help="score a model on test clips",
        description="PSNR and SSIM on Y beside bicubic, per clip and in the mean. A clip is a "
        "folder with GT and BIx4 (or BDx4) folders of PNG files.",
    )
    p.add_argument("folders", nargs="+", metavar="CLIP_DIR")
    p.add_argument("--model", default="lite", metavar="NAME|PATH", help="default lite")
    p.add_argument("--degradation", choices=("BI", "BD"), default="BI")
    p.add_argument("--chunk", type=_positive, default=15, metavar="N", help="frames per window")
    p.add_argument("--overlap", type=_natural, default=1, metavar="N", help="context frames")
    p.add_argument("--limit", type=_positive, metavar="N", help="only the first N frames of a clip")
    p.add_argument(
        "--copies",
        action="store_true",
        help="add the control: every neighbour replaced by a copy of the frame itself",
    )
    p.add_argument("-o", "--output", metavar="FILE", help="write the scores there too")
    p.set_defaults(handler=_eval)


def _eval(a: argparse.Namespace) -> None:
    from mafnet.evaluate import main_eval

    main_eval(a.model, a.folders, a.chunk, a.overlap, a.degradation, a.copies, a.limit, a.output)


def _add_degrade(commands: Any) -> None:
    p = commands.add_parser("degrade", help="make low-resolution images, as papers do")
    p.add_argument("input", type=Path, metavar="IN_DIR", help="folder of images")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT_DIR")
    p.add_argument(
        "--mode",
        choices=("BI", "BD"),
        default="BI",
        help="BI: MATLAB bicubic (default); BD: Gaussian blur of sigma 1.6, then every 4th pixel",
    )
    p.add_argument("--overwrite", action="store_true", help="write into a folder that has files")
    p.set_defaults(handler=_degrade)


def _degrade(a: argparse.Namespace) -> None:
    from PIL import Image

    from mafnet.data.degrade import bd_downscale, bi_downscale

    downscale = bi_downscale if a.mode == "BI" else bd_downscale
    paths = _images(a.input)
    if a.output.is_dir() and any(a.output.iterdir()) and not a.overwrite:
        raise UsageError(f"{a.output}: not empty; give --overwrite to write there")
    if a.output.exists() and a.output.samefile(a.input):
        raise UsageError(f"{a.output}: output and input are the same")
    if not a.output.parent.is_dir():
        raise UsageError(f"{a.output}: the folder {a.output.parent} does not exist")
    a.output.mkdir(exist_ok=True)
    for path in paths:
        image = _read_rgb(path)
        if min(image.shape[:2]) < 4:
            raise UsageError(f"{path}: expected at least 4x4 pixels, got {image.shape[1::-1]}")
        Image.fromarray(downscale(image)).save(a.output / f"{path.stem}.png")
    print(f"{a.output}: {len(paths)} images, {a.mode} x1/4")


def _add_metrics(commands: Any) -> None:
    p = commands.add_parser(
        "metrics",
        help="PSNR and SSIM of two folders of images",
        description="PSNR and SSIM on Y (BT.601), no border crop, per image and their mean.",
    )
    p.add_argument("upscaled", type=Path, metavar="SR_DIR")
    p.add_argument("truth", type=Path, metavar="GT_DIR")
    p.set_defaults(handler=_metrics)


def _metrics(a: argparse.Namespace) -> None:
    from mafnet.metrics import psnr_y, ssim_y

    upscaled = {path.stem: path for path in _images(a.upscaled)}
    truth = {path.stem: path for path in _images(a.truth)}
    if upscaled.keys() != truth.keys():
        lone = sorted(upscaled.keys() ^ truth.keys())
        where = a.truth if lone[0] in upscaled else a.upscaled
        raise UsageError(f"{where}: no image named {lone[0]} ({len(lone)} without a partner)")
    scores = []
    for name, path in upscaled.items():
        one, other = _read_rgb(path), _read_rgb(truth[name])
        if one.shape != other.shape:
            raise UsageError(
                f"{path}: expected {other.shape[1]}x{other.shape[0]} as in {truth[name]}, "
                f"got {one.shape[1]}x{one.shape[0]}"
            )
        scores.append((psnr_y(one, other), ssim_y(one, other)))
        print(f"{name}  {scores[-1][0]:.3f} dB  {scores[-1][1]:.5f}")
    psnr, ssim = np.mean(scores, axis=0)
    print(f"mean of {len(scores)}  {psnr:.3f} dB  {ssim:.5f}")


def _add_export(commands: Any) -> None:
    p = commands.add_parser(
        "export",
        help="write a model as ONNX",
        description="Write a model for clips of T frames of any height and width as ONNX.",
    )
    p.add_argument("--model", default="lite", metavar="NAME|PATH", help="default lite")
    p.add_argument(
        "--onnx",
        type=Path,
        required=True,
        metavar="FILE",
        help="where to; needs pip install 'mafnet[onnx]'",
    )
    p.add_argument("--frames", type=_positive, default=5, metavar="T", help="of a clip (default 5)")
    p.add_argument("--opset", type=_positive, default=20, metavar="N", help="of ONNX (default 20)")
    p.add_argument(
        "--no-deform-conv",
        action="store_true",
        help="ONNX without DeformConv: GridSample in its place, for runtimes that lack it",
    )
    p.set_defaults(handler=_export)


def _export(a: argparse.Namespace) -> None:
    from mafnet import MAFnet, export

    net = MAFnet.from_pretrained(a.model)
    export.export_onnx(net, a.onnx, a.frames, a.opset, not a.no_deform_conv)
    print(f"{a.onnx}: ONNX, opset {a.opset}, clips of {a.frames} frames")


def _doctor(_: argparse.Namespace) -> int | None:
    from mafnet_ops.doctor import main as doctor_main

    result: int | None = doctor_main()
    return result


def _images(folder: Path) -> list[Path]:
    from mafnet.video.images import list_frames

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    return list_frames(folder)


def _read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    from mafnet.video.images import load_picture

    planes = load_picture(path).rgb
    return planes.permute(1, 2, 0).mul(255).add(0.5).floor().byte().numpy()


def _positive(text: str) -> int:
    return _integer(text, 1)


def _threads(text: str) -> int:
    """No more than there are processors: thousands crash OpenMP, and more than these help nobody."""
    return min(_positive(text), os.cpu_count() or 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _tile(text: str) -> int | None:
    return None if text == "auto" else _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return int(text)


def _time(text: str) -> float:
    """Seconds, or [HH:]MM:SS with decimals."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected seconds or [HH:]MM:SS[.mmm], got {text!r}")
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
