"""Tiles: they partition the picture, and give what the whole picture gives."""

import numpy as np
import pytest
import torch

from pydenoise.imaging import map_tiles, tile_windows
from pydenoise.imaging.tiles import axis_spans
from pydenoise.models import FFDNet


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 34, 47, 48, 64, 65, 100, 257])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 6), (32, 0), (14, 6), (0, 6)])
def test_spans_partition_the_axis_and_keep_their_margins(size, tile, overlap):
    windows = tile_windows(size, 5, tile, overlap)
    spans = [rows for rows, _ in windows][:: max(1, len({columns for _, columns in windows}))]
    assert spans[0].low == 0
    assert spans[-1].high == size
    for span in spans:
        assert 0 <= span.start <= span.low < span.high <= span.stop <= size
        assert span.start % 2 == 0
        assert tile == 0 or span.stop - span.start <= tile
        assert span.start == 0 or span.low - span.start >= overlap
        assert span.stop == size or span.stop - span.high >= overlap
    for left, right in zip(spans, spans[1:], strict=False):
        assert left.high == right.low


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(31, 4, "tile"), (-2, 4, "tile"), (32, 3, "overlap"), (32, -2, "overlap"), (32, 16, "leaves nothing")],
)
def test_bad_tiles(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tile_windows(100, 100, tile, overlap)


@pytest.mark.parametrize("size", [(61, 83), (64, 40), (20, 100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiled_equals_untiled(size, dtype):
    torch.manual_seed(1)
    model = FFDNet(3, 8, 3).eval()
    sigma = torch.full((1, 1, 1, 1), 0.1)
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (*size, 3)).astype(dtype)

    def run(x):
        return model(x, sigma) + 0.5

    with torch.inference_mode():
        whole = map_tiles(pixels, run, tile=0, overlap=0)
        tiled = map_tiles(pixels, run, tile=32, overlap=model.receptive_radius)
    assert whole.std() > 0
    assert np.abs(tiled.astype(int) - whole).max() <= 1  # rounding to integers, after another order of additions


def test_too_small_an_overlap_shows():
    """The comparison above can fail: without margins, tiles differ from the whole."""
    torch.manual_seed(1)
    model = FFDNet(1, 8, 3).eval()
    sigma = torch.full((1, 1, 1, 1), 0.1)
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 64, 1)).astype(np.uint16)
    with torch.inference_mode():
        whole = map_tiles(pixels, lambda x: model(x, sigma) + 0.5, tile=0, overlap=0)
        tiled = map_tiles(pixels, lambda x: model(x, sigma) + 0.5, tile=32, overlap=0)
    assert np.abs(tiled.astype(int) - whole).max() > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_identity_keeps_every_sample_value(dtype):
    pixels = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(-1, 16, 1)
    seen = []
    result = map_tiles(pixels, lambda x: x, tile=64, overlap=4, on_tile=lambda: seen.append(1))
    assert result.dtype == dtype
    assert np.array_equal(result, pixels)
    assert len(seen) == len(tile_windows(*pixels.shape[:2], 64, 4))


def test_results_are_clipped():
    pixels = np.full((4, 4, 1), 200, np.uint8)
    assert (map_tiles(pixels, lambda x: x * 2) == 255).all()
    assert (map_tiles(pixels, lambda x: -x) == 0).all()


def test_result_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected a result of shape"):
        map_tiles(np.zeros((4, 4, 1), np.uint8), lambda x: x[..., 1:])


def test_only_one_tile_is_in_floating_point():
    shapes = []
    map_tiles(np.zeros((200, 300, 3), np.uint8), lambda x: shapes.append(tuple(x.shape)) or x, tile=64, overlap=8)
    assert max(height * width for _, _, height, width in shapes) <= 64 * 64


@pytest.mark.parametrize("align", [2, 8, 16])
@pytest.mark.parametrize("size", range(60, 90))
def test_starts_are_multiples(size, align):
    spans = axis_spans(size, 48, 16, align)
    assert all(span.start % align == 0 for span in spans)
    assert [span.low for span in spans] == [0, *(span.high for span in spans[:-1])] and spans[-1].high == size
    assert (
        all(span.stop - span.start == 48 for span in spans[:-1]) and 48 - align < spans[-1].stop - spans[-1].start <= 48
    )
