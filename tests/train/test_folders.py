"""Readers of evaluation sets: order, pairing, what is scored, and what is missing, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mafnet.data import DataError
from mafnet.data.degrade import bd_downscale, bi_downscale
from mafnet.data.folders import (
    folder_of_clips,
    frame_folder,
    list_frames,
    paired_folders,
    vimeo_septuplets,
)


def write(path: Path, number: int, size: tuple[int, int] = (16, 12)) -> np.ndarray:
    """A picture whose content depends on ``number``; size is (width, height)."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def vid4(root: Path, clips: tuple[str, ...] = ("city", "walk"), frames: int = 4) -> Path:
    for clip in clips:
        for k in range(frames):
            gt = write(root / "GT" / clip / f"{k:08d}.png", k)
            path = root / "BIx4" / clip / f"{k:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(bi_downscale(gt)).save(path)
    return root


def test_frames_come_in_natural_order(tmp_path: Path) -> None:
    for k in (1, 2, 10, 11):
        write(tmp_path / f"{k}.png", k)
    (tmp_path / "notes.txt").write_text("no frame")
    names = [path.name for path in sorted(tmp_path.glob("*.png"))]
    assert names == ["1.png", "10.png", "11.png", "2.png"]
    with pytest.raises(DataError, match=r"steps of 1, found none for 3 after 2\.png"):
        list_frames(tmp_path)
    for k in range(3, 10):
        write(tmp_path / f"{k}.png", k)
    assert [path.stem for path in list_frames(tmp_path)] == [str(k) for k in range(1, 12)]


def test_even_steps_and_unnumbered_names_are_fine(tmp_path: Path) -> None:
    for k in (10, 20, 30, 40):
        write(tmp_path / "steps" / f"f{k}.png", k)
    for name in ("a", "c", "b2x"):
        write(tmp_path / "names" / f"{name}.png", 0)
    assert [path.stem for path in list_frames(tmp_path / "steps")] == ["f10", "f20", "f30", "f40"]
    assert [path.stem for path in list_frames(tmp_path / "names")] == ["a", "b2x", "c"]


def test_frame_folder_degrades_what_it_reads(tmp_path: Path) -> None:
    images = [write(tmp_path / "clip" / f"{k}.png", k, (18, 13)) for k in range(3)]
    clip = frame_folder(tmp_path / "clip")
    assert clip.name == "clip" and clip.scored == (0, 1, 2)
    np.testing.assert_array_equal(clip.gt(), np.stack([image[:12, :16] for image in images]))
    np.testing.assert_array_equal(clip.lr(), np.stack([bi_downscale(i) for i in images]))
    np.testing.assert_array_equal(clip.lr("BD"), np.stack([bd_downscale(i) for i in images]))


def test_folder_of_clips_keeps_clips_apart(tmp_path: Path) -> None:
    for clip in ("011", "2", "000"):
        for k in range(2):
            write(tmp_path / clip / f"{k}.png", k)
    clips = folder_of_clips(tmp_path)
    assert [clip.name for clip in clips] == ["000", "2", "011"]
    assert all(path.parent.name == clip.name for clip in clips for path in clip.gt_paths)


def test_pairs_in_both_layouts(tmp_path: Path) -> None:
    clips = paired_folders(vid4(tmp_path / "vid4"))
    assert [clip.name for clip in clips] == ["city", "walk"]
    assert clips[0].lr().shape == (4, 3, 4, 3) and clips[0].gt().shape == (4, 12, 16, 3)
    np.testing.assert_array_equal(clips[0].lr()[1], bi_downscale(clips[0].gt()[1]))
    single = tmp_path / "calendar"
    for kind in ("GT", "BIx4"):
        (single / kind).parent.mkdir(exist_ok=True)
        (tmp_path / "vid4" / kind / "city").rename(single / kind)
    (clip,) = paired_folders(single)
    assert clip.name == "calendar" and len(clip.gt_paths) == 4


def test_pairs_that_do_not_match_are_named(tmp_path: Path) -> None:
    root = vid4(tmp_path)
    (root / "BIx4" / "city" / "00000003.png").unlink()
    with pytest.raises(DataError, match=r"BIx4/city: expected a frame 00000003 .*GT/city"):
        paired_folders(root)
    (root / "GT" / "city" / "00000003.png").unlink()
    write(root / "BIx4" / "walk" / "00000004.png", 0, (4, 3))
    with pytest.raises(DataError, match=r"GT/walk: expected a frame 00000004 .*\(1 missing\)"):
        paired_folders(root)
    (root / "BIx4" / "walk" / "00000004.png").unlink()
    write(root / "BIx4" / "walk" / "00000001.png", 0, (4, 4))
    walk = paired_folders(root)[1]
    with pytest.raises(DataError, match=r"walk/00000001\.png: expected 4x3 pixels .* got 4x4"):
        walk.lr()
    for k in range(4):
        write(root / "BIx4" / "walk" / f"{k:08d}.png", 0, (5, 3))
    with pytest.raises(DataError, match=r"expected 4x3 pixels, a quarter of .* got 5x3"):
        walk.lr()


def septuplets(root: Path, names: tuple[str, ...] = ("00001/0001", "00002/0010")) -> Path:
    for name in names:
        for k in range(1, 8):
            write(root / "sequences" / name / f"im{k}.png", k)
    return root


def test_septuplets_use_the_middle_and_score_the_fourth(tmp_path: Path) -> None:
    root = septuplets(tmp_path)
    clips = vimeo_septuplets(root)
    assert [clip.name for clip in clips] == ["00001/0001", "00002/0010"]
    for frames in (1, 3, 5, 7):
        clip = vimeo_septuplets(root, frames=frames)[0]
        assert len(clip.gt_paths) == frames
        assert [clip.gt_paths[k].stem for k in clip.scored] == ["im4"]
    assert [path.stem for path in clips[0].gt_paths] == ["im2", "im3", "im4", "im5", "im6"]
    (tmp_path / "list.txt").write_text("00002/0010\n\n")
    assert [clip.name for clip in vimeo_septuplets(root, tmp_path / "list.txt")] == ["00002/0010"]


def test_incomplete_septuplets_are_named(tmp_path: Path) -> None:
    root = septuplets(tmp_path)
    (root / "sequences" / "00002" / "0010" / "im6.png").unlink()
    with pytest.raises(DataError, match=r"im6\.png: expected a frame of septuplet 00002/0010"):
        vimeo_septuplets(root)
    assert len(vimeo_septuplets(root, frames=3)) == 2
    (tmp_path / "list.txt").write_text("00009/0001\n")
    with pytest.raises(DataError, match=r"im2\.png: expected a frame of septuplet 00009/0001"):
        vimeo_septuplets(root, tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"frames: expected 1, 3, 5 or 7, got 4"):
        vimeo_septuplets(root, frames=4)


def test_missing_folders_and_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for call, words in (
        (lambda: frame_folder(tmp_path / "none"), r"none: expected a folder of frames"),
        (lambda: frame_folder(tmp_path / "empty"), r"empty: expected pictures"),
        (lambda: folder_of_clips(tmp_path / "none"), r"none: expected a folder of clips"),
        (lambda: folder_of_clips(tmp_path / "empty"), r"empty: expected a folder for each clip"),
        (lambda: paired_folders(tmp_path), r"GT: expected the folder of ground truth"),
        (lambda: vimeo_septuplets(tmp_path), r"sequences: expected the folder of Vimeo-90K"),
        (
            lambda: vimeo_septuplets(septuplets(tmp_path), tmp_path / "none.txt"),
            r"none\.txt: cannot be read",
        ),
    ):
        with pytest.raises(DataError, match=words):
            call()
    (tmp_path / "GT").mkdir()
    with pytest.raises(DataError, match=r"BIx4: expected the folder of low-resolution frames"):
        paired_folders(tmp_path)
    write(tmp_path / "bad" / "0.png", 0)
    (tmp_path / "bad" / "1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"1\.png: cannot be read as a picture"):
        frame_folder(tmp_path / "bad").gt()
