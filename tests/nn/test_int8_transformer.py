"""Int8TransformerBlock and Int8Transformer2D: against diffusers' float modules."""

import pytest
import torch
from torch import nn

from pydenoise.nn import Int8Transformer2D, Int8TransformerBlock
from pydenoise.quantization import Arguments, Scheme, calibrate, snr_db
from pydenoise.quantization.plan import plan_layer

attention = pytest.importorskip("diffusers.models.attention")
transformers = pytest.importorskip("diffusers.models.transformers.transformer_2d")

CASES = {
    "cross-attention": dict(cross_attention_dim=24),
    "self-attention only": dict(activation_fn="gelu"),
    "twice self-attention": dict(double_self_attention=True, activation_fn="gelu-approximate"),
    "twice cross-attention": dict(cross_attention_dim=24, only_cross_attention=True, attention_bias=True),
}


def make_block(**options):
    torch.manual_seed(0)
    return attention.BasicTransformerBlock(32, 4, 8, **options).eval()


def make_model(**options):
    torch.manual_seed(0)
    options = {"num_layers": 2, "norm_num_groups": 8, "cross_attention_dim": 24, **options}
    return transformers.Transformer2DModel(4, 8, 32, **options).eval()


def states(batch=2, tokens=9, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, 24)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_block_against_diffusers(options):
    block = make_block(**options)
    int8 = Int8TransformerBlock.from_float(block)
    for batch, tokens in ((2, 15), (1, 1), (0, 4), (2, 15)):
        x = torch.randn(batch, tokens, 32)
        context = states(batch) if "cross_attention_dim" in options else None
        y = int8(x, encoder_hidden_states=context)
        assert y.shape == x.shape
        if batch:
            expected = block(x, encoder_hidden_states=context)
            assert snr_db(expected, y) > 40
            half = int8(x.bfloat16(), encoder_hidden_states=None if context is None else context.bfloat16())
            assert half.dtype == torch.bfloat16 and snr_db(expected, half) > 33


@torch.no_grad()
def test_float_layers():
    block, x = make_block(**CASES["cross-attention"]), torch.randn(2, 7, 32)
    expected = block(x, encoder_hidden_states=states())
    int8 = Int8TransformerBlock.from_float(block, "float")
    assert snr_db(expected, int8(x, encoder_hidden_states=states())) > 100
    mixed = Int8TransformerBlock.from_float(
        block, lambda request: "float" if request.names[0] in ("attn2.to_k", "ff.net.2") else "per_token"
    )
    assert type(mixed.attn2.to_kv) is type(mixed.ff.proj_out) is nn.Linear
    assert snr_db(expected, mixed(x, encoder_hidden_states=states())) > 40


@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_model_against_diffusers(linear):
    model = make_model(use_linear_projection=linear)
    int8 = Int8Transformer2D.from_float(model)
    for size in ((5, 3), (4, 4), (5, 3)):
        x = torch.randn(2, 32, *size)
        expected, y = model(x, states(), return_dict=False)[0], int8(x, states(), return_dict=False)[0]
        assert y.is_contiguous(memory_format=torch.channels_last) and snr_db(expected, y) > 40
    assert torch.equal(int8(x, key_values=int8.key_values(states())), y)
    assert torch.equal(int8(x, encoder_hidden_states=states()), y)
    assert int8(x[:0], states(0)).shape == (0, 32, 5, 3)


@torch.no_grad()
def test_block_inside_a_float_model():
    """The int8 block takes the float one's place."""
    model, x = make_model(), torch.randn(2, 32, 4, 3)
    keep = torch.arange(9).expand(2, -1) < 5
    expected = model(x, states(), encoder_attention_mask=keep, timestep=torch.tensor([3, 3])).sample
    model.transformer_blocks[0] = Int8TransformerBlock.from_float(model.transformer_blocks[0])
    y = model(x, states(), encoder_attention_mask=keep, timestep=torch.tensor([3, 3])).sample
    assert snr_db(expected, y) > 40


@torch.no_grad()
def test_calibrated_plans():
    """Static, smoothed plans of each layer, with q, k and v planned as the one layer that they become."""
    model, x = make_model(), torch.randn(2, 32, 6, 6) * torch.logspace(-0.5, 0.5, 32).reshape(-1, 1, 1)
    statistics = calibrate(model, [Arguments((x, states()), {})], timestep_argument=None).layers
    asked = []

    def plan(request):
        asked.extend(request.names)
        scheme = Scheme("per_tensor", clip="search", smooth=0.5, bias_correction=True)
        return plan_layer(request.layer, statistics[request.names[0]], scheme)

    int8 = Int8Transformer2D.from_float(model, plan)
    assert sorted(asked) == sorted(statistics)
    assert snr_db(model(x, states()).sample, int8(x, states())) > 28


@torch.no_grad()
def test_masks():
    model, x = make_model(), torch.randn(2, 32, 4, 3)
    int8 = Int8Transformer2D.from_float(model)
    keep = torch.arange(9).expand(2, -1) < torch.tensor([[4], [7]])
    expected = model(x, states(), encoder_attention_mask=keep).sample
    y = int8(x, states(), encoder_attention_mask=keep)
    assert snr_db(expected, y) > 40 and snr_db(y, int8(x, states())) < 60
    added = (1 - keep.float())[:, None] * -10000.0
    for mask in (added, added[:, None], keep[:, None], keep[:, None, None]):
        assert torch.allclose(int8(x, states(), encoder_attention_mask=mask), y, atol=1e-6)
    changed = states()
    changed[:, 7:] = 0
    assert torch.equal(int8(x, changed, encoder_attention_mask=keep), y)  # nothing of dropped tokens gets through
    own = torch.ones(2, 12)
    own[:, 5:] = 0
    expected = model(x, states(), attention_mask=own).sample
    assert snr_db(expected, int8(x, states(), attention_mask=own)) > 40


def test_copies_and_checkpoints(stands, on_meta):
    model, x = make_model(), torch.randn(1, 32, 3, 5)
    stands(Int8Transformer2D.from_float(model), lambda: Int8Transformer2D.from_float(on_meta(model)), x, states(1))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(norm_type="ada_norm", num_embeds_ada_norm=10), "norm_type.*'ada_norm'"),
        (dict(norm_type="ada_norm_zero", num_embeds_ada_norm=10), "norm_type"),
        (dict(attention_type="gated", cross_attention_dim=24), "fuser"),
        (dict(positional_embeddings="sinusoidal", num_positional_embeddings=8), "pos_embed"),
        (dict(activation_fn="swiglu"), "ff.net.0"),
    ],
)
def test_refused_blocks(options, word):
    with pytest.raises(ValueError, match=word):
        Int8TransformerBlock.from_float(make_block(**options))


def test_errors():
    with pytest.raises(TypeError, match="BasicTransformerBlock"):
        Int8TransformerBlock.from_float(nn.ReLU())
    with pytest.raises(TypeError, match="Transformer2DModel"):
        Int8Transformer2D.from_float(nn.ReLU())
    int8, x = Int8TransformerBlock.from_float(make_block(**CASES["cross-attention"])), torch.randn(2, 5, 32)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        int8(x)
    with pytest.raises(ValueError, match="encoder_attention_mask"):
        int8(x, encoder_hidden_states=states(), encoder_attention_mask=torch.ones(3))
    with pytest.raises(ValueError, match="hidden_states"):
        int8(x[0])
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        Int8TransformerBlock.from_float(make_block(double_self_attention=True))(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        Int8Transformer2D.from_float(make_model())(
            torch.randn(1, 32, 2, 2), states(1), cross_attention_kwargs={"gligen": 1}
        )
    with pytest.raises(ValueError, match="attn1.to_q.*norms compute affine"):
        Int8TransformerBlock.from_float(make_block(), Scheme("per_token", symmetric=True))


@torch.no_grad()
def test_compile_and_export():
    int8, args = Int8Transformer2D.from_float(make_model()), (torch.randn(1, 32, 3, 4), states(1))
    assert torch.equal(torch.compile(int8, backend="eager", fullgraph=True)(*args), int8(*args))
    assert torch.equal(torch.export.export(int8, args).module()(*args), int8(*args))
