"""Write the README's results table from the figures that were measured with the bundled weights.

mafnet eval CLIPS --copies -o scores.json     # see mafnet/weights/README.md
python benchmarks/quality_table.py            # rewrites the table from mafnet/weights/lite.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "mafnet" / "weights" / "lite.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def render(figures: dict[str, Any]) -> str:
    """The table: PSNR and SSIM on Y, no border crop, beside bicubic and the control with copies of one frame."""
    lines = [
        "| `lite`, x4, BI, Y | frames | bicubic | ours | gain | what neighbours add |",
        "|---|---|---|---|---|---|",
    ]
    for s in figures["scores"]:
        gain = s["psnr_y"] - s["bicubic_psnr_y"]
        copies = s.get("copies_psnr_y")
        temporal = "not measured" if copies is None else f"{s['psnr_y'] - copies:+.2f} dB"
        lines.append(
            f"| {s['clip']} | {s['frames']} | {s['bicubic_psnr_y']:.2f} / {s['bicubic_ssim_y']:.4f} "
            f"| {s['psnr_y']:.2f} / {s['ssim_y']:.4f} | {gain:+.2f} dB | {temporal} |"
        )
    return "\n".join(lines)


def insert(readme: str, table: str) -> str:
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), render(json.loads(FIGURES.read_text()))))


if __name__ == "__main__":
    main()
