"""Int8Upsample2D and Int8Downsample2D: against diffusers' float modules."""

import pytest
import torch
from torch import nn

from pydenoise.nn import FusedConv2d, Int8Downsample2D, Int8Upsample2D
from pydenoise.quantization import snr_db

upsampling = pytest.importorskip("diffusers.models.upsampling")
downsampling = pytest.importorskip("diffusers.models.downsampling")


def up(**options):
    return upsampling.Upsample2D(12, **{"use_conv": True, **options}).eval()


def down(**options):
    return downsampling.Downsample2D(12, **{"use_conv": True, **options}).eval()


@pytest.mark.parametrize("plans", ["per_pixel", "float"])
@torch.no_grad()
def test_upsampling(plans):
    block = up(out_channels=20)
    int8 = Int8Upsample2D.from_float(block, plans)
    for batch, size in ((2, (5, 3)), (0, (2, 2)), (1, (4, 6))):
        x = torch.randn(batch, 12, *size)
        assert int8(x).shape == (batch, 20, 2 * size[0], 2 * size[1])
        if batch:
            assert snr_db(block(x), int8(x)) > 35
            assert snr_db(block(x, (9, 11)), int8(x, (9, 11))) > 35
    assert int8(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(int8(x, (8, 12)), int8(x))


@pytest.mark.parametrize("padding", [0, 1])
@torch.no_grad()
def test_downsampling(padding):
    block = down(padding=padding, name="op")
    int8 = Int8Downsample2D.from_float(block)
    for batch, size in ((2, (6, 4)), (1, (7, 5)), (0, (4, 4))):
        x = torch.randn(batch, 12, *size)
        y = int8(x)
        assert y.shape == block(x).shape
        assert batch == 0 or snr_db(block(x), y) > 35


def test_copies_and_checkpoints(stands, on_meta):
    x = torch.randn(2, 12, 5, 4)
    block = up(name="Conv2d_0")
    stands(Int8Upsample2D.from_float(block, {"Conv2d_0": "per_pixel"}),
           lambda: Int8Upsample2D.from_float(on_meta(block)), x)  # fmt: skip
    block = down(padding=0)
    stands(Int8Downsample2D.from_float(block), lambda: Int8Downsample2D.from_float(on_meta(block)), x)


def test_errors():
    for block, word in ((up(use_conv=False), "use_conv"), (up(use_conv_transpose=True), "use_conv_transpose"),
                        (up(interpolate=False), "interpolate"),
                        (up(norm_type="ln_norm", eps=1e-5, elementwise_affine=True), "norm")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Int8Upsample2D.from_float(block)
    with pytest.raises(ValueError, match="use_conv"):
        Int8Downsample2D.from_float(down(use_conv=False))
    with pytest.raises(ValueError, match="needs an int8 layer"):
        Int8Downsample2D.from_float(down(padding=0), "float")
    with pytest.raises(TypeError, match="Upsample2D"):
        Int8Upsample2D.from_float(nn.ReLU())
    assert isinstance(Int8Downsample2D.from_float(down(), "float").conv, FusedConv2d)
