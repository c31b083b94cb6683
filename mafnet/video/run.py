"""`mafnet upscale`: one input, one output, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import VideoError
from .images import (
    READABLE,
    WRITABLE,
    Picture,
    list_frames,
    load_picture,
    save_picture,
    upscale_alpha,
)
from .read import VideoReader
from .stream import Frame, Plan, plan_window, upscale_frames
from .tile import SuperResolver
from .write import EncodeSettings, VideoWriter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UpscaleOptions:
    """All that `mafnet upscale` can be told; see its --help. None: chosen automatically."""

    model: str = "lite"
    device: str = "auto"
    dtype: str = "auto"
    chunk: int | None = None
    overlap: int | None = None
    tile: int | None = None
    tile_overlap: int | None = None
    start: float | None = None
    end: float | None = None
    damaged: str = "error"
    overwrite: bool = False
    progress: bool = True
    threads: int | None = None
    encode: EncodeSettings = field(default_factory=EncodeSettings)


@dataclass(frozen=True)
class UpscaleReport:
    """What was done: `seconds` is wall time of upscaling, decoding and encoding together.

    `arithmetic` is for people, such as "bf16 on cpu".
    """

    frames: int
    size: tuple[int, int]
    seconds: float
    arithmetic: str
    notes: tuple[str, ...]


def upscale(
    source: Path,
    target: Path,
    options: UpscaleOptions,
    net: SuperResolver | None = None,
    observe: Callable[[Frame, Tensor], None] | None = None,
) -> UpscaleReport:
    """Upscale a video, a folder of frames or an image into `target`.

    `net` replaces the model that `options.model` names. `observe` is shown every source frame with
    its (3, sH, sW) float32 result, in order, before it is encoded. Raises VideoError for input,
    output or options that cannot be handled, mafnet.CheckpointError for the model. The output
    appears under its name only when it is whole.
    """
    try:
        kind = check_paths(source, target, options.overwrite)
        if kind != "video" and (options.start is not None or options.end is not None):
            raise VideoError(f"{source}: --start and --end are for videos")
        if options.threads:
            torch.set_num_threads(options.threads)
        device = pick_device(options.device)
        if net is None:
            net = load_model(options.model, device)
        job = _Job(net, device, pick_dtype(options.dtype, device), options, observe)
        handler = {"video": _upscale_video, "folder": _upscale_folder, "image": _upscale_image}
        return handler[kind](source, target, job)
    except OSError as error:  # of the file system, where no one else has words for it
        raise VideoError(f"{error.filename or target}: {error.strerror or error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise VideoError(f"{source}: {_OUT_OF_MEMORY}") from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "alloc" in str(error):
            raise VideoError(f"{source}: {_OUT_OF_MEMORY}") from error
        raise


_OUT_OF_MEMORY = "out of memory; use a smaller --tile (such as 128) or --chunk"


def check_paths(source: Path, target: Path, overwrite: bool) -> str:
    """Kind of the input ("video", "folder", "image"), or VideoError before any work is done."""
    if not source.exists():
        raise VideoError(f"{source}: no such file or folder")
    if not target.parent.is_dir():
        raise VideoError(f"{target}: the output folder {target.parent} does not exist")
    if target.exists() and target.samefile(source):
        raise VideoError(f"{target}: output and input are the same")
    kind = _kind(source)
    if kind == "folder":
        if target.exists() and not target.is_dir():
            raise VideoError(f"{target}: a folder of frames needs a folder as output")
        if not target.exists() and target.suffix:
            raise VideoError(f"{target}: a folder of frames is written to a folder, not to a file")
        occupied = target.is_dir() and any(target.iterdir())
    else:
        if target.is_dir():
            raise VideoError(f"{target}: is a folder; name the output file")
        suffix = target.suffix.lower()
        if kind == "image" and suffix not in WRITABLE:
            raise VideoError(f"{target}: an image is written as {', '.join(sorted(WRITABLE))}")
        if kind == "video" and suffix in READABLE:
            raise VideoError(f"{target}: a video cannot be written as one image")
        occupied = target.exists()
    if occupied and not overwrite:
        raise VideoError(f"{target}: exists; give --overwrite to replace it")
    if not os.access(target.parent, os.W_OK):
        raise VideoError(f"{target}: the output folder {target.parent} is not writable")
    return kind


def load_model(name: str, device: torch.device) -> SuperResolver:
    from mafnet import MAFnet  # here: the video tool is usable, and tested, with any network

    net: Any = MAFnet.from_pretrained(name)
    return net.to(device, memory_format=torch.channels_last).eval()


def pick_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise VideoError(f"--device: {name!r} cannot be used: {reason}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: half precision where it is about twice as fast (CUDA; CPUs that multiply bf16), fp32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it (AVX512-BF16, AMX), and PyTorch can tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class _Job:
    net: SuperResolver
    device: torch.device
    dtype: torch.dtype
    options: UpscaleOptions
    observe: Callable[[Frame, Tensor], None] | None

    @property
    def arithmetic(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{name} on {self.device}"

    def plan(self, height: int, width: int) -> Plan:
        o = self.options
        return plan_window(self.net, height, width, o.chunk, o.overlap, o.tile, o.tile_overlap)

    def run(self, frames: Iterator[Frame], plan: Plan) -> Iterator[tuple[Frame, Tensor]]:
        for frame, upscaled in upscale_frames(self.net, frames, plan, self.device, self.dtype):
            if self.observe is not None:
                self.observe(frame, upscaled)
            yield frame, upscaled
            del frame, upscaled

    def bar(self, total: int | None, name: str) -> Any:
        hidden = None if self.options.progress else True  # None: only on a terminal
        return tqdm(total=total, unit="frame", desc=name, disable=hidden, leave=False)


def _upscale_video(source: Path, target: Path, job: _Job) -> UpscaleReport:
    o = job.options
    began = time.monotonic()
    with VideoReader(source, o.start, o.end, o.damaged == "keep", o.threads) as reader:
        info = reader.info
        size = info.width * job.net.scale, info.height * job.net.scale
        plan = job.plan(info.height, info.width)
        end = None if reader.end is None else reader.end - (reader.start or 0)
        with temporary_beside(target, remove=os.unlink) as temporary:
            writer = VideoWriter(temporary, target, info, size, o.encode, reader.shift, end)
            try:
                with job.bar(info.estimated_frames, source.name) as bar:
                    count = 0
                    for frame, upscaled in job.run(iter(reader), plan):
                        writer.write(upscaled, frame.pts, frame.duration)
                        del upscaled
                        count += 1
                        bar.update()
                writer.finish()
            except BaseException:
                writer.abandon()
                raise
            os.replace(temporary, target)
        notes = (*info.notes, *reader.notes, *writer.notes)
    return UpscaleReport(count, size, time.monotonic() - began, job.arithmetic, notes)


def _upscale_folder(source: Path, target: Path, job: _Job) -> UpscaleReport:
    paths = list_frames(source)
    began = time.monotonic()
    first = load_picture(paths[0])
    height, width = first.rgb.shape[1:]
    plan = job.plan(height, width)
    pictures: dict[int, Picture] = {}  # of the frames inside the window: depth, alpha, profile

    def frames() -> Iterator[Frame]:
        for index, path in enumerate(paths):
            picture = load_picture(path)
            if picture.rgb.shape[1:] != (height, width):
                got = f"{picture.rgb.shape[2]}x{picture.rgb.shape[1]}"
                raise VideoError(
                    f"{path}: expected {width}x{height} as in {paths[0].name}, got {got}"
                )
            rgb, picture.rgb = picture.rgb, torch.empty(0)
            pictures[index] = picture
            yield Frame(rgb, index)

    with temporary_beside(target, remove=shutil.rmtree) as temporary:
        temporary.mkdir()
        with job.bar(len(paths), source.name) as bar:
            count = 0
            for frame, upscaled in job.run(frames(), plan):
                picture = pictures.pop(frame.pts)
                picture.rgb = upscaled
                picture.alpha = upscale_alpha(picture.alpha, job.net.scale)
                save_picture(temporary / f"{paths[frame.pts].stem}.png", picture, ".png")
                count += 1
                bar.update()
        if count != len(paths):
            raise VideoError(f"{target}: {len(paths)} frames went in, {count} came out")
        _move_folder(temporary, target)
    size = width * job.net.scale, height * job.net.scale
    return UpscaleReport(count, size, time.monotonic() - began, job.arithmetic, ())


def _upscale_image(source: Path, target: Path, job: _Job) -> UpscaleReport:
    began = time.monotonic()
    picture = load_picture(source)
    height, width = picture.rgb.shape[1:]
    suffix = target.suffix.lower()
    if picture.alpha is not None and suffix in (".jpg", ".jpeg"):
        raise VideoError(f"{target}: {source.name} has alpha, JPEG holds none; write .png or .webp")
    frames = iter([Frame(picture.rgb, 0)])
    ((_, picture.rgb),) = job.run(frames, job.plan(height, width))
    picture.alpha = upscale_alpha(picture.alpha, job.net.scale)
    with temporary_beside(target, remove=os.unlink) as temporary:
        save_picture(temporary, picture, suffix)
        os.replace(temporary, target)
    size = width * job.net.scale, height * job.net.scale
    return UpscaleReport(1, size, time.monotonic() - began, job.arithmetic, ())


@contextmanager
def temporary_beside(target: Path, remove: Callable[[Path], None]) -> Iterator[Path]:
    """A free name in the target's folder, of its suffix; what is left there is removed."""
    name = f".{target.stem[:50]}.{secrets.token_hex(4)}.part{target.suffix}"
    temporary = target.parent / name
    try:
        yield temporary
    finally:
        if temporary.exists():
            remove(temporary)


def _move_folder(temporary: Path, target: Path) -> None:
    """Take the target's place; into an existing folder file by file, other files there stay."""
    if not target.exists():
        os.replace(temporary, target)
        return
    for path in sorted(temporary.iterdir()):
        os.replace(path, target / path.name)


def _kind(source: Path) -> str:
    if source.is_dir():
        return "folder"
    return "image" if source.suffix.lower() in READABLE else "video"
