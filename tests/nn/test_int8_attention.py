"""Int8AttentionBlock: against diffusers' and our own attention over pixels."""

import pytest
import torch
from torch import nn

from pydenoise.models.unet import Attention as OwnAttention
from pydenoise.nn import AttentionSpec, Int8AttentionBlock
from pydenoise.quantization import Scheme, snr_db

processors = pytest.importorskip("diffusers.models.attention_processor")

CASES = {
    "unet": dict(residual_connection=True),
    "rescaled": dict(residual_connection=True, rescale_output_factor=2**0.5),
    "no residual": dict(),
    "no bias, own scale": dict(residual_connection=True, bias=False, scale_qk=False),
}


def make(**options):
    torch.manual_seed(0)
    return processors.Attention(32, heads=4, dim_head=8, **{"norm_num_groups": 8, "bias": True, **options}).eval()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_against_diffusers(options):
    block = make(**options)
    int8 = Int8AttentionBlock.from_float(block)
    for batch, size in ((2, (5, 7)), (1, (1, 1)), (0, (3, 3)), (2, (5, 7))):
        x = torch.randn(batch, 32, *size)
        y = int8(x.contiguous(memory_format=torch.channels_last))
        assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
        if batch:
            assert snr_db(block(x), y) > 33
            assert snr_db(y, int8(x)) > 60  # other strides: the norm's sums round otherwise
            half = int8(x.bfloat16())
            assert half.dtype == torch.bfloat16 and snr_db(block(x), half) > 30


@torch.no_grad()
def test_own_block_and_spec():
    block, x = OwnAttention(64).eval(), torch.randn(2, 64, 5, 3)
    int8 = Int8AttentionBlock.from_float(block)
    assert snr_db(block(x), int8(x)) > 35
    qkv = torch.nn.Conv2d(64, 192, 1)
    qkv.load_state_dict(block.qkv.state_dict())
    spec = AttentionSpec(block.norm, (qkv,), block.proj, block.heads, names=("qkv", "proj"))
    again = Int8AttentionBlock.from_float(spec, {"qkv": "per_token", "proj": "per_token"})
    assert torch.equal(int8(x), again(x))


@torch.no_grad()
def test_float_layers():
    block, x = make(**CASES["rescaled"]), torch.randn(2, 32, 4, 4)
    assert snr_db(block(x), Int8AttentionBlock.from_float(block, "float")(x)) > 100
    int8 = Int8AttentionBlock.from_float(block, {"to_q": "per_token", "to_out.0": "float"})
    assert type(int8.to_out) is nn.Linear and snr_db(block(x), int8(x)) > 33


def test_copies_and_checkpoints(stands, on_meta):
    block, x = make(**CASES["rescaled"]), torch.randn(2, 32, 5, 3)
    stands(Int8AttentionBlock.from_float(block), lambda: Int8AttentionBlock.from_float(on_meta(block)), x)


class OtherProcessor(processors.AttnProcessor2_0):
    pass


@pytest.mark.parametrize(
    ("block", "word"),
    [
        (dict(qk_norm="layer_norm"), "norm_q"),
        (dict(norm_num_groups=None), "group_norm"),
        (dict(spatial_norm_dim=8), "spatial_norm"),
        (dict(kv_heads=2), "kv_heads"),
        (dict(processor=OtherProcessor()), "processor"),
        (dict(added_kv_proj_dim=16), "add_k_proj"),
    ],
)
def test_refused_blocks(block, word):
    with pytest.raises(ValueError, match=word):
        Int8AttentionBlock.from_float(make(**block))


def test_errors():
    with pytest.raises(TypeError, match="diffusers' Attention"):
        Int8AttentionBlock.from_float(nn.ReLU())
    int8, x = Int8AttentionBlock.from_float(make()), torch.randn(1, 32, 4, 4)
    with pytest.raises(ValueError, match="attention_mask"):
        int8(x, attention_mask=torch.ones(1, 16))
    with pytest.raises(ValueError, match="hidden_states"):
        int8(x[0])
    with pytest.raises(ValueError, match="norms compute affine"):
        Int8AttentionBlock.from_float(make(), Scheme("per_token", symmetric=True))
