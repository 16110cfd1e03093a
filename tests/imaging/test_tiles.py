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


# -------------------------------------------------------------------------------------------------------------- cubes


def blur(x):
    """Mean of 3 x 3 pixels and 3 bands: looks one sample far along every axis."""
    cube = torch.nn.functional.pad(x.unsqueeze(1), (1, 1, 1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool3d(cube, 3, stride=1).squeeze(1)


def make_cube(shape, dtype=np.float32):
    values = np.random.default_rng(0).random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else (values * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(("bands", "band_overlap"), [(0, 0), (5, 1), (10, 2), (40, 2)])
@pytest.mark.parametrize("shape", [(30, 41, 23), (7, 50, 6), (1, 1, 2)])
def test_windows_of_bands_equal_the_whole(shape, bands, band_overlap, batch):
    cube = make_cube(shape)
    whole = map_tiles(cube, blur, tile=0, overlap=0)
    seen = []

    def run(x):
        seen.append(tuple(x.shape))
        return blur(x)

    options = {"tile": 16, "overlap": 2, "bands": bands, "band_overlap": band_overlap, "batch": batch}
    tiles = []
    tiled = map_tiles(cube, run, **options, on_tile=lambda: tiles.append(1))
    np.testing.assert_allclose(tiled, whole, atol=1e-6)
    assert sum(count for count, *_ in seen) == len(tiles)
    assert max(count for count, *_ in seen) <= batch
    assert {depth for _, depth, *_ in seen} == {min(bands or shape[2], shape[2])}, "a network has one number of bands"
    assert max(height * width for *_, height, width in seen) <= 16 * 16


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.dtype(">u2")])
def test_samples_of_other_kinds_keep_their_values(dtype):
    cube = make_cube((20, 30, 5), np.uint16 if np.dtype(dtype).kind == "u" else dtype).astype(dtype)
    cube = cube - np.int16(16384) if dtype is np.int16 else cube
    options = {"dtype": torch.float64} if dtype is np.float64 else {}
    result = map_tiles(cube, lambda x: x, tile=8, overlap=2, **options)
    assert np.array_equal(result, cube)
    assert result.dtype == np.dtype(dtype).newbyteorder("=")
    seen = []
    map_tiles(cube, lambda x: seen.append(x.abs().max().item()) or x, tile=0, scale=100.0)
    assert seen == [pytest.approx(np.abs(cube.astype(float)).max() / 100)]


def test_signed_results_are_clipped_to_the_dtype():
    cube = np.array([[[-30000, 30000]]], np.int16)
    assert map_tiles(cube, lambda x: x * 2, scale=1.0).tolist() == [[[-32768, 32767]]]


@pytest.mark.parametrize("shape", [(61, 83, 7), (20, 100, 3), (8, 8, 2)])
@pytest.mark.parametrize("batch", [1, 4])
def test_blending_is_a_partition_of_one(shape, batch):
    cube = make_cube(shape)
    options = {"tile": 16, "overlap": 4, "align": 1, "bands": 4, "band_overlap": 1, "batch": batch, "blend": True}
    if shape[2] < 4:
        options |= {"bands": 0, "band_overlap": 0}
    np.testing.assert_allclose(map_tiles(cube, lambda x: x, **options), cube, atol=1e-6)
    counts = make_cube(shape, np.uint16)
    assert np.array_equal(map_tiles(counts, lambda x: x, **options), counts)


def test_blending_hides_seams():
    """Results that differ from tile to tile: cropped, they jump; blended, they change step by step."""
    cube = np.zeros((64, 64, 1), np.float32)

    def steps(blend):
        number = iter(range(1000))
        result = map_tiles(cube, lambda x: x + next(number) % 3, tile=16, overlap=4, blend=blend)[:, :, 0]
        return np.abs(np.diff(result, axis=1)).max()

    assert steps(False) >= 1
    assert steps(True) <= 2 / 8 + 1e-6


def test_results_go_into_a_mapped_file(tmp_path):
    cube = make_cube((50, 40, 6))
    np.save(tmp_path / "in.npy", cube)
    source = np.load(tmp_path / "in.npy", mmap_mode="r")
    for blend in (False, True):
        out = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float32, shape=cube.shape)
        options = {"tile": 16, "overlap": 2, "blend": blend}
        assert map_tiles(source, blur, **options, out=out) is out
        out.flush()
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), map_tiles(cube, blur, **options))
    private = np.load(tmp_path / "in.npy", mmap_mode="c")
    private[:] += 1  # exists in this process alone: letting go of pages must not lose it
    np.testing.assert_array_equal(map_tiles(private, lambda x: x, tile=16, overlap=2), cube + 1)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((4, 4, 1), np.int64), {}, "pixels: expected samples of uint8"),
        (np.zeros((4, 4, 1), complex), {}, "pixels: expected samples of uint8"),
        (np.zeros((4, 4), np.uint8), {}, "pixels: expected \\[H, W, C\\]"),
        (np.zeros((4, 0, 1), np.uint8), {}, "pixels: expected \\[H, W, C\\]"),
        (np.zeros((4, 4, 9), np.uint8), {"bands": -1}, "bands: expected a multiple of 1"),
        (np.zeros((4, 4, 9), np.uint8), {"bands": 4, "band_overlap": 2}, "bands: 4 leaves nothing"),
        (np.zeros((4, 4, 1), np.uint8), {"batch": 0}, "batch: expected at least 1"),
        (np.zeros((4, 4, 1), np.uint8), {"scale": 0.0}, "scale: expected a positive number"),
        (np.zeros((4, 4, 1), np.uint8), {"scale": float("nan")}, "scale: expected a positive number"),
        (np.zeros((4, 4, 1), np.uint8), {"out": np.zeros((4, 4, 2), np.uint8)}, "out: expected"),
        (np.zeros((4, 4, 1), np.uint8), {"out": np.zeros((4, 4, 1), np.float32)}, "out: expected"),
    ],
)
def test_bad_cubes_and_options(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        map_tiles(pixels, lambda x: x, **options)


def test_the_source_is_not_overwritten():
    cube = make_cube((8, 8, 2))
    with pytest.raises(ValueError, match="out: may not be pixels itself"):
        map_tiles(cube, lambda x: x, out=cube)
