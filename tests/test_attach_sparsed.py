"""attach_sparsed and detach_sparsed: transformers, diffusers, and modules that call scaled_dot_product_attention."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention_by_another_name
from torch.testing import assert_close

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.samplers import masked

pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
PADDED = torch.ones(2, 200, dtype=torch.long)
PADDED[1, 150:] = 0


def bert(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=256, **options)
    return transformers.BertModel(config).eval()


def modern_bert():
    transformers = pytest.importorskip("transformers")
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(**SMALL, num_attention_heads=2, local_attention=32, **tokens)
    return transformers.ModernBertModel(config).eval()


def llama(causal=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = transformers.LlamaModel(config).eval()
    for layer in model.layers:
        layer.self_attn.is_causal = causal
    return model


TEXT = {"bert": bert, "modern bert": modern_bert, "llama": llama}
TOKENS = torch.randint(0, 49, (2, 200), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Self-attention that has imported the function by a name of its own."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)

    def forward(self, x, attn_mask=None, fail=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention_by_another_name(q, k, v, attn_mask)
        if fail is not None:
            raise fail
        return x + y.transpose(1, 2).flatten(2)


class Network(nn.Module):
    """Two blocks, and torch's own layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.third = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x, fail=None):
        return self.third(self.second(self.first(x), fail=fail))


def unet(**options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8, **options,
    ).eval()  # fmt: skip


def call_unet(model):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return model(x, torch.tensor(3), text).sample


def call_text(model, mask=None):
    return model(input_ids=TOKENS, attention_mask=mask).last_hidden_state


def call_network(model, **options):
    return model(torch.randn(2, 100, 32, generator=torch.Generator().manual_seed(0)), **options)


MODELS = {
    "bert": (bert, call_text, "transformers"),
    "bert, padded": (bert, lambda model: call_text(model, PADDED), "transformers"),
    "modern bert, padded": (modern_bert, lambda model: call_text(model, PADDED), "transformers"),
    "llama, grouped queries": (llama, call_text, "transformers"),
    "part of a module": (lambda: nn.ModuleDict({"text": bert()}), lambda m: call_text(m["text"]), "transformers"),
    "U-Net": (unet, call_unet, "diffusers"),
    "module": (lambda: Network().eval(), call_network, "sdpa"),
}


def state_of(model):
    """Whatever of a model attaching could change, but weights."""
    modules = []
    for name, module in model.named_modules():
        plain = {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_")}
        hooks = [len(value) for key, value in module.__dict__.items() if "hooks" in key and hasattr(value, "__len__")]
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        modules.append((name, id(module), type(module), plain, sorted(module.__dict__), hooks, implementation))
    return list(model.state_dict()), modules


def generate(handle, run, steps=5, **options):
    outputs = []
    for step in range(steps):
        with handle.step(step, steps, **options):
            outputs.append(run(handle.model))
    return outputs


# ------------------------------------------------------------------------------------------------------ all kinds


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attach_generate_detach(name):
    """Dense steps give the model's outputs, sparse ones others; afterwards nothing is left."""
    make, run, kind = MODELS[name]
    model = make()
    expected, before = run(model), state_of(model)
    handle = pdn.attach_sparsed(model, select=0.2, block_size=16, kind="sdpa" if kind == "sdpa" else "auto")
    assert handle.kind == kind and list(model.state_dict()) == before[0]
    for _ in range(2):  # a second generation starts anew
        outputs = generate(handle, run)
        for output in outputs[:3]:
            assert_close(output, expected)
        assert not torch.allclose(outputs[3], expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(outputs[3], outputs[4])
    report = handle.report()
    assert (report.dense_steps, report.sparse_steps) == (3, 2) and report.layers
    for entry in report.layers:
        assert (entry.dense_calls, entry.sparse_calls, entry.pattern_step) == (3, 2, 2)
        assert 0 < entry.density < 1 and 0 < entry.recall < 1
        assert handle.pattern(entry.layer).density == entry.density
    with handle.dense():
        assert_close(run(model), expected)
    pdn.detach_sparsed(model)
    assert state_of(model) == before
    assert torch.equal(run(model), expected)
    assert handle.report().to_json() == report.to_json()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_everything_selected_is_the_model(name):
    make, run, kind = MODELS[name]
    model = make()
    expected = run(model)
    handle = pdn.attach_sparsed(model, select=1.0, block_size=16, kind=kind)
    for output in generate(handle, run):
        assert_close(output, expected)
    assert handle.report().recall == pytest.approx(1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_copies_are_attached_on_their_own(name):
    make, run, kind = MODELS[name]
    model = make()
    expected = run(model)
    handle = pdn.attach_sparsed(model, select=0.2, block_size=16, kind=kind)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="does not know the denoising step"):
        run(twin)
    generate(handle, run)
    pdn.detach_sparsed(twin)
    assert torch.equal(run(twin), expected)
    assert handle.report().sparse_steps == 2 and not torch.allclose(generate(handle, run)[-1], expected, 1e-3, 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_call_without_a_step_is_an_error(name):
    make, run, kind = MODELS[name]
    model = make()
    handle = pdn.attach_sparsed(model, block_size=16, kind=kind)
    with pytest.raises(RuntimeError, match=r"does not know the denoising step.*handle.step\(step, num_steps"):
        run(model)
    handle.detach()
    run(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    make, run, kind = MODELS[name]
    model = make()
    handle = pdn.attach_sparsed(model, skip=0, select=0.2, block_size=16, kind=kind)
    for step in range(3):
        with handle.step(step, 3):
            output = run(model)
    model.zero_grad()
    (output * torch.randn(output.shape)).sum().backward()
    projections = [
        p for n, p in model.named_parameters() if any(k in n for k in ("query", "qkv", "q_proj", "attn1.to_q"))
    ]
    assert projections and all(p.grad is not None and p.grad.abs().sum() > 0 for p in projections)


def test_guidance_and_samplers():
    """The handle is what samplers take: patterns for both branches, and with everything selected the same text."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, num_attention_heads=2, max_position_embeddings=256)
    model = transformers.BertForMaskedLM(config).eval()
    options = {"gen_length": 32, "block_length": 16, "steps": 8, "cfg_scale": 0.5}
    prompts = [TOKENS[0, :90], TOKENS[1, :60]]
    expected = masked.SemiAutoregressive(model, 49, **options).generate(prompts)
    for select in (0.3, 1.0):
        handle = pdn.attach_sparsed(model, select=select, block_size=16)
        result = masked.SemiAutoregressive(model, 49, sparsity=handle, **options).generate(prompts)
        report = handle.report()
        assert (report.num_steps, report.dense_steps, report.sparse_steps) == (8, 3, 5)
        assert [e.branch for e in report.layers] == ["conditional"] * 2 + ["unconditional"] * 2 and not report.changes
        assert {e.sparse_calls for e in report.layers} == {5}
        handle.detach()
    assert torch.equal(result.sequences, expected.sequences)


def test_our_own_model_in_a_sampler():
    """SparseD sees the padding of a batch, and which tokens are new."""
    model = pdn.models.MaskedLM(49, width=32, layers=2, heads=2, hidden=32).eval()
    prompts = [TOKENS[0, :90], TOKENS[1, :60]]
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa")
    masked.SemiAutoregressive(model, 49, gen_length=32, steps=8, sparsity=handle).generate(prompts)
    report = handle.report()
    assert [e.layer for e in report.layers] == ["layers.0.attention", "layers.1.attention"]
    assert {(e.dense_calls, e.sparse_calls) for e in report.layers} == {(3, 5)}
    kept = handle.pattern("layers.0.attention").to_dense()
    assert kept.shape == (2, 2, 8, 8) and not kept[1, :, :, 6:].any()  # 60 + 32 tokens end in block 5


# ---------------------------------------------------------------------------------------------------- transformers


@torch.no_grad()
def test_bert_attends_as_the_op_does():
    """The second layer's output from its own queries and keys: nothing is lost between model and op."""
    model, seen = bert(), {}
    handle = pdn.attach_sparsed(model, skip=0, select=0.3, block_size=16)
    layer = model.encoder.layer[1].attention.self
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.update(x=args[0], y=out[0]), with_kwargs=True)
    for step in range(3):
        with handle.step(step, 3, new_tokens=100):
            call_text(model, PADDED)
    q, k, v = (f(seen["x"]).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    mask = handle.pattern("encoder.layer.1.attention.self")
    lengths = PADDED.sum(1)
    expected = PF.block_sparse_attention(q, k, v, mask, key_lengths=lengths)
    assert_close(seen["y"], expected.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_masks_of_transformers():
    model = bert()
    left = PADDED.flip(1)
    handle = pdn.attach_sparsed(model, block_size=16)
    with handle.step(0, 5), pytest.raises(ValueError, match="encoder.layer.0.attention.self.*on the left"):
        call_text(model, left)
    handle.detach()
    expected = call_text(model, left)
    handle = pdn.attach_sparsed(model, block_size=16, other_masks="dense")
    assert_close(generate(handle, lambda m: call_text(m, left))[-1], expected)
    assert handle.report().masked_calls == {f"encoder.layer.{i}.attention.self": 5 for i in (0, 1)}


def test_causal_attention_is_refused_by_name():
    model = llama(causal=True)
    before = state_of(model)
    with pytest.raises(ValueError, match="model: .*bidirectional.*'layers.0.self_attn' is causal.*1 other modules"):
        pdn.attach_sparsed(model)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="'encoder.layer.0.attention.self' is causal"):
        pdn.attach_sparsed(bert(is_decoder=True))
    model = llama()
    handle = pdn.attach_sparsed(model, block_size=16)
    model.layers[1].self_attn.is_causal = True  # too late to be seen when attaching
    with handle.step(0, 5), pytest.raises(ValueError, match="is_causal: .*layer 'layers.1.self_attn' is causal"):
        call_text(model)


@torch.no_grad()
def test_layers_left_alone():
    model = modern_bert()
    expected = call_text(model)
    handle = pdn.attach_sparsed(model, block_size=16, select=0.2)
    assert_close(generate(handle, call_text)[0], expected)
    report = handle.report()
    assert [e.layer for e in report.layers] == ["layers.0.attn"]
    assert report.left_alone == {"layers.1.attn": "attends to a sliding window of 17"}
    assert "left alone: layers.1.attn: attends to a sliding window of 17" in str(report)
    handle.detach()
    model = bert()
    expected = call_text(model)
    handle = pdn.attach_sparsed(model, block_size=16, select=0.2, keep=["encoder.layer.*"])
    assert_close(generate(handle, call_text)[-1], expected)
    assert handle.report().left_alone["encoder.layer.1.attention.self"] == "named in keep"


@torch.no_grad()
def test_a_model_that_shares_the_config_keeps_its_attention():
    model = bert()
    other = type(model)(model.config).eval()
    expected = call_text(other)
    handle = pdn.attach_sparsed(model, block_size=16)
    assert_close(call_text(other), expected)
    handle.detach()
    assert torch.equal(call_text(other), expected)


def test_attention_dropout_is_an_error():
    model = bert().train()
    handle = pdn.attach_sparsed(model, block_size=16)
    with handle.step(0, 5), pytest.raises(ValueError, match="dropout_p: .*'encoder.layer.0.attention.self' passes 0.1"):
        call_text(model)


@torch.no_grad()
def test_transformers_under_compile():
    model = bert()
    handle = pdn.attach_sparsed(model, block_size=16, select=0.2)
    expected = generate(handle, call_text)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    outputs = generate(handle, lambda _: call_text(compiled))
    assert_close(outputs, expected)
    assert {(e.dense_calls, e.sparse_calls) for e in handle.report().layers} == {(3, 2)}
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- diffusers


@torch.no_grad()
def test_diffusers_leaves_cross_attention_alone():
    model = unet()
    handle = pdn.attach_sparsed(model, block_size=16)
    generate(handle, call_unet, new_tokens=0)
    report = handle.report()
    assert all(entry.layer.endswith("attn1") for entry in report.layers) and len(report.layers) == 4
    assert {name[-5:] for name in report.left_alone} == {"attn2"} and len(report.left_alone) == 4
    assert {entry.shape[4] for entry in report.layers} == {256, 64}  # pixels of two resolutions
    kept = handle.pattern(report.layers[0].layer)
    assert (kept.kv_counts == 5).all()  # one selection over all blocks: max(1, int(16 * 0.3) + 1)
    with pytest.raises(ValueError, match="new_tokens: .*images have no prompt, got 5"):
        handle.begin_step(0, 5, new_tokens=5)


def test_a_processor_with_scores_of_its_own_is_an_error():
    from diffusers.models.attention_processor import AttnProcessor

    model = unet()
    model.set_attn_processor(AttnProcessor())
    handle = pdn.attach_sparsed(model, block_size=16)
    with handle.step(0, 5), pytest.raises(RuntimeError, match="attn1', AttnProcessor, does not call.*AttnProcessor2_0"):
        call_unet(model)


# ------------------------------------------------------------------------------------------------------------ sdpa


def test_names_of_calls():
    model = Network().eval()
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa")
    generate(handle, call_network)
    assert [e.layer for e in handle.report().layers] == ["first", "second", "third.self_attn"]

    class Twice(Block):
        def forward(self, x):
            return super().forward(super().forward(x))

    handle = pdn.attach_sparsed(nn.Sequential(Twice()).eval(), block_size=16, kind="sdpa", select=0.2)
    generate(handle, call_network)
    assert [e.layer for e in handle.report().layers] == ["0", "0#2"]


@torch.no_grad()
def test_sdpa_understands_padding():
    """torch's own layers add their padding mask per head, transformers expands it over the queries."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    beyond = torch.arange(100) >= torch.tensor([[100], [70]])
    for model, run in (
        (model, lambda model: call_network(model, src_key_padding_mask=beyond)[~beyond]),
        (bert(), lambda model: call_text(model, PADDED)),
    ):
        expected = run(model)
        handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", select=1)
        for output in generate(handle, run):
            assert_close(output, expected)
        kept = handle.pattern(handle.report().layers[0].layer).to_dense()
        assert kept[0].all() and not kept[1].all()


@torch.no_grad()
def test_multihead_attention_by_itself():
    """Its fast path and its path with weights do not call scaled_dot_product_attention."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x, **options):
            return self.mixer(x, x, x, **options)[0]

    model = Model().eval()
    expected = call_network(model, need_weights=False)
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", select=0.2)
    outputs = generate(handle, lambda model: call_network(model, need_weights=False))
    assert_close(outputs[0], expected)
    assert not torch.allclose(outputs[-1], expected, 1e-3, 1e-3)
    assert [e.layer for e in handle.report().layers] == ["mixer"]
    with handle.step(0, 5), pytest.raises(RuntimeError, match="'mixer' was asked for its attention weights"):
        call_network(model)


def test_sdpa_keeps_cross_attention_and_what_is_named():
    class Cross(nn.Module):
        def forward(self, x):
            return x + F.scaled_dot_product_attention(x, x[:, :30], x[:, :30])

    model = nn.Sequential(Block(), Cross(), Block()).eval()
    expected = call_network(model)
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", keep="2")
    assert_close(generate(handle, call_network)[0], expected)
    report = handle.report()
    assert [e.layer for e in report.layers] == ["0"]
    assert report.left_alone["2"] == "named in keep" and "different lengths" in report.left_alone["1"]


def test_one_head_without_a_dimension_of_heads():
    class Plain(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, scale=0.1)

    model = Plain()
    expected = call_network(model)
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", select=1)
    for output in generate(handle, call_network):
        assert_close(output, expected)
    assert handle.report().layers[0].shape == (2, 1, 100, 32, 100)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_exceptions_restore_attention(error):
    model = Network().eval()
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", select=0.2)
    with pytest.raises(type(error)), handle.step(0, 5):
        call_network(model, fail=error)
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
    q = torch.randn(1, 2, 40, 16)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)  # SparseD would refuse
    assert not torch.allclose(generate(handle, call_network)[-1], generate(handle, call_network)[0])


def test_other_threads_keep_their_attention():
    """While the model runs in one thread, attention elsewhere is torch's."""
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            assert done.wait(20)
            return F.scaled_dot_product_attention(x, x, x)

    q, results = torch.randn(1, 2, 40, 16), []

    def elsewhere():
        assert inside.wait(20)
        results.append(F.scaled_dot_product_attention(q, q, q, is_causal=True))
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    model = Waits()
    handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa")
    with handle.step(0, 5):
        call_network(model)
    thread.join()
    assert_close(results[0], F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert [e.dense_calls for e in handle.report().layers] == [1]


def test_checkpointing_runs_the_same_attention_again():
    """The recomputation in the backward happens outside of the model's forward."""
    from torch.utils.checkpoint import checkpoint

    class Saves(nn.Module):
        def __init__(self, saves):
            super().__init__()
            self.block, self.saves = Block(), saves

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False) if self.saves else self.block(x)

    x, grads = torch.randn(2, 100, 32), []
    state = Saves(False).state_dict()
    for saves in (False, True):
        model = Saves(saves)
        model.load_state_dict(state)
        handle = pdn.attach_sparsed(model, block_size=16, kind="sdpa", skip=0, select=0.2)
        for step in range(3):
            with handle.step(step, 3):
                model.zero_grad()
                (model(x) ** 2).sum().backward()
        grads.append(model.block.qkv.weight.grad)
    assert_close(*grads)


def test_a_forward_without_attention_is_an_error():
    model = nn.Linear(32, 32)
    handle = pdn.attach_sparsed(model, kind="sdpa")
    with handle.step(0, 5), pytest.raises(RuntimeError, match="no call of F.scaled_dot_product_attention"):
        call_network(model)


# ---------------------------------------------------------------------------------------------------------- errors


def test_attached_twice_or_not_at_all():
    model = bert()
    handle = pdn.attach_sparsed(model)
    with pytest.raises(ValueError, match="model: this BertModel has SparseD attached already"):
        pdn.attach_sparsed(model)
    with pytest.raises(ValueError, match="model: its part '0' has SparseD attached already"):
        pdn.attach_sparsed(nn.Sequential(model))
    handle.detach()
    with pytest.raises(ValueError, match="detached already"):
        handle.detach()
    with pytest.raises(ValueError, match="model: this BertModel has no SparseD attached"):
        pdn.detach_sparsed(model)


def test_a_forward_that_was_replaced_later_is_not_lost():
    model = Block()
    handle = pdn.attach_sparsed(model, kind="sdpa")
    ours, model.forward = model.forward, lambda x: x
    with pytest.raises(RuntimeError, match="'Block' was replaced after attach_sparsed"):
        handle.detach()
    model.forward = ours
    handle.detach()
    assert "forward" not in model.__dict__


BAD = [
    (lambda: "model", {}, TypeError, "model: expected a torch.nn.Module, got str"),
    (Block, {}, ValueError, "kind: 'auto'.*found neither.*'sdpa'"),
    (Block, {"kind": "triton"}, ValueError, "kind: expected one of 'auto', .*got 'triton'"),
    (Block, {"kind": "diffusers"}, ValueError, "kind: 'diffusers', but there is nothing of diffusers in this Block"),
    (Block, {"kind": "transformers"}, ValueError, "kind: 'transformers', but there is nothing"),
    (Block, {"kind": "sdpa", "keep": "third"}, ValueError, "keep: 'third' matches no module"),
    (Block, {"kind": "sdpa", "keep": [1]}, TypeError, "keep: .*int"),
    (Block, {"kind": "sdpa", "select": 0}, ValueError, "select: .*got 0"),
    (Block, {"kind": "sdpa", "select": 1.5}, ValueError, "select: .*got 1.5"),
    (Block, {"kind": "sdpa", "skip": 1.0}, ValueError, "skip: .*got 1.0"),
    (Block, {"kind": "sdpa", "skip": -1}, ValueError, "skip: .*got -1"),
    (Block, {"kind": "sdpa", "block_size": 100}, ValueError, "block_size: .*got 100"),
    (Block, {"kind": "sdpa", "schedule": "none"}, ValueError, "schedule: .*got 'none'"),
    (lambda: torch.compile(Block()), {"kind": "sdpa"}, ValueError, "model: .*compiled; attach.*before torch.compile"),
]


@pytest.mark.parametrize(
    "make, options, error, text", BAD, ids=lambda value: getattr(value, "__name__", str(value)[:40])
)
def test_bad_arguments(make, options, error, text):
    with pytest.raises(error, match=text):
        pdn.attach_sparsed(make(), **options)
