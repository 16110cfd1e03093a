"""``pydenoise gallery``: one contact sheet of what the samplers can do, with captions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pydenoise.cli.gallery_chains
import pydenoise.cli.gallery_restoration  # noqa: F401  both put their entries on the list
from pydenoise.cli.denoise import positive
from pydenoise.cli.gallery_entries import ENTRIES, Entry, Panel
from pydenoise.cli.sample import seed_number
from pydenoise.cli.targets import check_picture_target

if TYPE_CHECKING:
    import numpy as np

WIDTH = 1260  # screen pixels of the sheet; a wider picture makes it wider
MARGIN = 12
TITLE, CAPTION = 20, 13  # font sizes
LINE = 1.35  # height of a line, in font sizes
NARROWEST = 150  # of a caption


def add_parser(subparsers) -> None:
    """Add the ``gallery`` command."""
    names = [own.name for own in ENTRIES]
    parser = subparsers.add_parser(
        "gallery",
        help="draw what the samplers can do on one sheet",
        description="Run the samplers of pydenoise.samplers on real data - the digits denoiser that ships with "
        "pydenoise, digits of scikit-learn, photographs of scikit-image, a magnetic resonance image of nibabel - and "
        "draw one contact sheet with captions.",
    )
    add = parser.add_argument
    add("--only", choices=names, nargs="+", metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seed", type=seed_number, default=0, metavar="S", help="of the noise (default: 0)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("-o", "--out", type=Path, default=Path("gallery.png"), metavar="OUT", help="the sheet (default: gallery.png)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything, then run the entries and draw; returns the exit code."""
    from pydenoise.imaging import Picture, require, write_picture

    console = require("rich.console", "rich", "the command line").Console(highlight=False)
    require("PIL.ImageDraw", "Pillow", "the sheet")
    chosen = [own for own in ENTRIES if args.only is None or own.name in args.only]
    for own in chosen:
        for module, package in own.packages:
            require(module, package, f"the gallery's {own.name}", extra="demo")
    check_picture_target(args.out)
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    parts = []
    with console.status("") as status:
        for own in chosen:
            status.update(own.name)
            parts.append((own, own.make(args.seed)))
    write_picture(args.out, Picture(contact_sheet(parts)))
    console.print(f"wrote {args.out}", markup=False, soft_wrap=True)
    return 0


def contact_sheet(parts: Sequence[tuple[Entry, Sequence[Panel]]]) -> "np.ndarray":
    """The sheet, [H, W, 3] uint8: each entry's title, and below it its panels side by side as far as they go."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    fonts = {size: ImageFont.load_default(size=size) for size in (TITLE, CAPTION)}
    drawn = [(own.title, [_Drawn(panel, fonts[CAPTION]) for panel in panels]) for own, panels in parts]
    width = max([WIDTH, *(panel.width + 2 * MARGIN for _, panels in drawn for panel in panels)])
    places, top = [], MARGIN
    for title, panels in drawn:
        places.append((title, MARGIN, top))
        top += round(TITLE * LINE)
        for row in _rows(panels, width):
            left = MARGIN
            for panel in row:
                places.append((panel, left, top))
                left += panel.width + MARGIN
            top += max(panel.height for panel in row) + MARGIN
        top += MARGIN
    canvas = Image.new("RGB", (width, top), "white")
    pen = ImageDraw.Draw(canvas)
    for what, x, y in places:
        if isinstance(what, str):
            pen.text((x, y), what, fill="black", font=fonts[TITLE])
        else:
            what.draw(canvas, pen, x, y)
    return np.asarray(canvas)


class _Drawn:
    """A panel at its size on the sheet, its caption in lines."""

    def __init__(self, panel: Panel, font):
        from PIL import Image

        pixels = panel.picture.repeat(panel.scale, 0).repeat(panel.scale, 1)
        self._image, self._font = Image.fromarray(pixels).convert("RGB"), font
        self.width = max(self._image.width, NARROWEST)
        self._lines = _wrapped(panel.caption, font, self.width)
        self.height = self._image.height + 2 + round(len(self._lines) * CAPTION * LINE)

    def draw(self, canvas, pen, x: int, y: int) -> None:
        canvas.paste(self._image, (x, y))
        for number, line in enumerate(self._lines):
            pen.text((x, y + self._image.height + 2 + round(number * CAPTION * LINE)), line, fill="black",
                     font=self._font)  # fmt: skip


def _wrapped(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _rows(panels: Sequence[_Drawn], width: int) -> list[list[_Drawn]]:
    rows: list[list[_Drawn]] = []
    left = width
    for panel in panels:
        if left + panel.width + MARGIN > width:
            rows.append([])
            left = MARGIN
        rows[-1].append(panel)
        left += panel.width + MARGIN
    return rows
