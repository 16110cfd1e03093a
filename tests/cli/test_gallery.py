"""``pydenoise gallery``: its entries, the sheet, what is refused."""

import subprocess
import sys

import numpy as np
import pytest

from pydenoise.cli import gallery
from pydenoise.cli.gallery_entries import ENTRIES, Entry, Panel
from pydenoise.imaging import read_picture

pytest.importorskip("rich")
pytest.importorskip("PIL")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "sheet.png"


@pytest.mark.parametrize("own", ENTRIES, ids=lambda own: own.name)
def test_entries(own):
    """Pictures with captions."""
    for module, _ in own.packages:
        pytest.importorskip(module)
    panels = own.make(1)
    assert panels and own.title
    for panel in panels:
        assert panel.caption and panel.scale >= 1
        assert panel.picture.dtype == np.uint8 and panel.picture.shape[2:] in ((), (3,))
        assert panel.picture.std() > 5


def test_names_are_different():
    assert len({own.name for own in ENTRIES}) == len(ENTRIES)


def test_the_sheet_is_written(cli, target):
    code, out, err = cli("gallery", "--only", "digits", "--seed", 3, "--threads", 1, "-o", target)
    assert (code, err) == (0, "") and f"wrote {target}" in out.replace("\n", "")
    sheet = read_picture(target).pixels
    cli("gallery", "--only", "digits", "--seed", 3, "-o", target)
    assert np.array_equal(read_picture(target).pixels, sheet)
    assert sheet.shape[1] == gallery.WIDTH and (sheet < 64).any()


def test_layout():
    """Every panel is there, whole; what does not fit beside begins a new row, and a wide one widens the sheet."""
    shades = [np.full((20, 30, 3), (shade, 0, 255), np.uint8) for shade in (50, 90, 130)]
    panels = [Panel(picture, "words " * 30, scale=15) for picture in shades]
    sheet = gallery.contact_sheet([(Entry("a", "A title", lambda seed: []), panels)])
    for shade in (50, 90, 130):
        assert (sheet == (shade, 0, 255)).all(2).sum() == 300 * 450
    rows, _ = np.nonzero((sheet == (130, 0, 255)).all(2))
    assert rows.min() > 300, "two of 450 pixels stand beside each other, the third below"
    wide = gallery.contact_sheet([(Entry("b", "B", lambda seed: []), [Panel(np.zeros((4, 2000), np.uint8), "wide")])])
    assert wide.shape[1] == 2000 + 2 * gallery.MARGIN and (wide == 0).all(2).sum() >= 8000


def test_what_is_refused(refused, tmp_path, monkeypatch):
    assert "--only: invalid choice: 'portrait'" in refused("gallery", "--only", "portrait")
    assert "--seed: expected a whole number" in refused("gallery", "--seed", "-1")
    assert "unknown extension" in refused("gallery", "-o", tmp_path / "sheet.xyz")
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert "scikit-image" in refused("gallery", "--only", "panorama", "-o", tmp_path / "sheet.png")


def test_the_parser_needs_no_torch():
    code = "import sys, pydenoise.cli.gallery; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
