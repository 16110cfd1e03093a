"""Masked-diffusion samplers against the published algorithms, and what they promise beyond."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pydenoise as pdn
from pydenoise.samplers import masked

sys.path.insert(0, str(Path(__file__).parent))
import published  # noqa: E402
from models import EOS, EOT, MASK, VOCABULARY, TinyModel  # noqa: E402

PROMPT = torch.tensor([3, 1, 4, 1, 5, 9, 2])
PROMPTS = [PROMPT, torch.tensor([6, 5]), torch.tensor([], dtype=torch.int64), torch.arange(11)]
SIZES = {"gen_length": 16, "block_length": 8, "steps": 8}
pytestmark = pytest.mark.filterwarnings("ignore::pydenoise.FallbackWarning")  # float64 runs on the reference


def semi(model, **options) -> masked.SemiAutoregressive:
    return masked.SemiAutoregressive(model, MASK, **{**SIZES, **options})


# --------------------------------------------------------------------------------------------- semi-autoregressive


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("sizes", [(16, 8, 8), (16, 16, 5), (12, 4, 12), (6, 6, 1)], ids=str)
def test_gives_the_tokens_of_the_published_algorithm(sizes, cfg_scale, seed):
    model = TinyModel(seed)
    options = dict(zip(("gen_length", "block_length", "steps"), sizes, strict=True), cfg_scale=cfg_scale)
    result = semi(model, **options).generate(PROMPT)
    assert torch.equal(result.sequences[0], published.llada(model, PROMPT, mask=MASK, **options))
    assert result.nfe == (sizes[2] * (2 if cfg_scale else 1),) and result.model_calls == sizes[2]
    assert result.trajectory is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tabulated_logits(dtype):
    """A model that is a table by position: the most confident first, the rest as it stands; in other dtypes too."""
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(40, VOCABULARY, generator=generator) * 3).to(dtype)
    table[:, MASK] = -torch.inf

    def model(tokens):
        return table[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)

    exact = SimpleNamespace(logits=None)

    def plain(tokens):
        exact.logits = table[: tokens.shape[1]].double()[None]
        return exact

    result = semi(model, lm_head=None).generate(PROMPT)
    expected = published.llada(plain, PROMPT, mask=MASK, **SIZES)
    assert torch.equal(result.sequences[0], expected)
    assert torch.equal(result.generated[0], table[7:23].argmax(1))


def test_options_about_the_ends():
    """EOS impossible; both ends chosen last; and the published code's variant, which changes the end of turn only."""
    model = TinyModel(5, sharpness=2.0)
    model.lm_head.weight.data[EOS] *= 3
    model.lm_head.weight.data[EOT] *= 3
    ends = {"eos_token_id": EOS, "eot_token_id": EOT}
    plain = semi(model).generate(PROMPT).sequences[0]
    assert ((plain == EOS) | (plain == EOT)).any(), "else the test tests nothing"
    variants = {
        "logits": ({"logits_eos_inf": True}, {"without_eos": EOS}),
        "both": ({"confidence_eos_eot_inf": True}, {"unsure": (EOS, EOT)}),
        "repo": ({"confidence_eos_eot_inf": "repo"}, {"unsure": (EOT,)}),
    }
    results = []
    for own, theirs in variants.values():
        results.append(semi(model, **ends, **own).generate(PROMPT).sequences[0])
        assert torch.equal(results[-1], published.llada(model, PROMPT, mask=MASK, **SIZES, **theirs))
    assert not (results[0] == EOS).any()
    assert not torch.equal(results[1], results[2])
    drop_in = masked.generate(
        model, PROMPT[None], steps=8, gen_length=16, block_length=8, mask_id=MASK, confidence_eos_eot_inf=True, **ends
    )
    assert torch.equal(drop_in[0], results[2])


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 1.0}, {"temperature": 0.8}, {"remasking": "random"}], ids=str)
def test_a_batch_gives_each_what_it_gets_alone(options):
    model = TinyModel(2)
    sampler = semi(model, **options)
    seeds = [11, 12, 13, 14]
    together = sampler.generate(PROMPTS, seed=seeds)
    assert together.lengths == (23, 18, 16, 27) and together.prompt_lengths == (7, 2, 0, 11)
    for b, prompt in enumerate(PROMPTS):
        alone = sampler.generate([prompt], seed=[seeds[b]])
        assert torch.equal(alone.generated[0], together.generated[b])
        assert torch.equal(together.sequences[b, : len(prompt)], prompt), "the prompt is untouched"
    # padded on either side: the same
    for side in ("left", "right"):
        rows, kept = torch.zeros(4, 11, dtype=torch.int64), torch.zeros(4, 11, dtype=torch.int32)
        for b, prompt in enumerate(PROMPTS):
            where = slice(11 - len(prompt), 11) if side == "left" else slice(0, len(prompt))
            rows[b, where], kept[b, where] = prompt, 1
        result = sampler.generate(rows, kept, seed=seeds)
        assert torch.equal(result.sequences, together.sequences)


def test_names_under_which_a_model_takes_padding():
    inner, seen = TinyModel(2), []

    def lengths(tokens, lengths=None):
        seen.append(lengths)
        mask = None if lengths is None else (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return inner(tokens, mask).logits

    def anything(tokens, **options):
        return inner(tokens, options.get("attention_mask"))

    expected = semi(inner).generate(PROMPTS).sequences
    assert torch.equal(semi(lengths).generate(PROMPTS).sequences, expected)
    assert seen[0].tolist() == [23, 18, 16, 27]
    assert torch.equal(semi(anything).generate(PROMPTS).sequences, expected)
    semi(lengths).generate(PROMPTS[:1])
    assert seen[-1] is None, "no padding, no argument"
    with pytest.raises(TypeError, match="model: the batch has padding"):
        semi(lambda tokens: inner(tokens).logits).generate(PROMPTS)


def test_the_head_runs_on_masked_positions_of_the_block_only():
    model, seen = TinyModel(3), []
    expected = semi(model, lm_head=None).generate(PROMPTS)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    result = semi(model).generate(PROMPTS)
    assert torch.equal(result.sequences, expected.sequences)
    assert seen == [(1, 4 * n, VOCABULARY) for n in (8, 6, 4, 2, 8, 6, 4, 2)]
    seen.clear()
    semi(model, cfg_scale=1.0).generate(PROMPT)
    assert seen == [(1, 2 * n, VOCABULARY) for n in (8, 6, 4, 2, 8, 6, 4, 2)]
    handle.remove()
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(semi(model, lm_head=model.lm_head).generate(PROMPTS).sequences, expected.sequences)
    model.get_output_embeddings = lambda: torch.nn.Embedding(3, 4)  # shared with the input: never touched
    assert torch.equal(semi(model).generate(PROMPTS).sequences, expected.sequences)


def test_one_token_a_step_is_sampled_from_its_softmax():
    """Chi-square over many samples of one position: softmax(logits / T)."""
    logits = torch.linspace(-1.5, 1.0, 6)
    sampler = masked.SemiAutoregressive(
        lambda tokens: logits.expand(*tokens.shape, -1), 6, gen_length=1, steps=1, temperature=0.7
    )
    samples = 8000
    tokens = sampler.generate(torch.zeros(samples, 1, dtype=torch.int64), seed=4).sequences[:, 1]
    wanted = samples * (logits / 0.7).softmax(0)
    statistic = ((torch.bincount(tokens, minlength=6) - wanted) ** 2 / wanted).sum()
    assert statistic < 22.0, statistic  # 5 degrees of freedom, 99.95 %


def test_joint_distribution_is_that_of_the_published_algorithm():
    """Two positions whose order follows from what is sampled: against many runs of plain loops, by chi-square."""
    table = torch.tensor([[0.5, 0.0, -1.0], [1.0, -0.5, 0.8]], dtype=torch.float64)
    temperature, samples = 1.3, 6000

    def model(tokens):  # what is filled in at the other place moves the logits
        filled = (tokens != 3).double() * (tokens.double() + 1)
        return table + 0.7 * filled.flip(1)[..., None] * torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)

    sampler = masked.SemiAutoregressive(model, 3, gen_length=2, steps=2, temperature=temperature)
    ours = sampler.generate(torch.zeros(samples, 0, dtype=torch.int64), seed=1).sequences
    generator = torch.Generator().manual_seed(5)
    x = torch.full((samples, 2), 3)
    for _ in range(2):
        logits = model(x)
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        token, p = published.choose(logits, temperature, uniform)
        confidence = p.gather(-1, token[..., None])[..., 0].masked_fill(x != 3, -torch.inf)
        kept = confidence.argmax(1, keepdim=True)
        x.scatter_(1, kept, token.gather(1, kept))
    counts = [torch.bincount(t[:, 0] * 3 + t[:, 1], minlength=9).double() for t in (ours, x)]
    both = counts[0] + counts[1]
    assert (both > 10).all()
    statistic = ((counts[0] - counts[1]) ** 2 / both).sum()
    assert statistic < 30.0, statistic  # 8 degrees of freedom, 99.98 %


def test_random_remasking_takes_positions_in_random_order():
    """Every position is as likely to be the first, and the tokens are still the likeliest."""
    table = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(4)
    sampler = masked.SemiAutoregressive(
        lambda tokens: table.expand(len(tokens), -1, -1), 5, gen_length=4, steps=4, remasking="random"
    )
    result = sampler.generate(torch.zeros(2000, 0, dtype=torch.int64), seed=8, return_trajectory=True)
    assert torch.equal(result.sequences[0], table.argmax(1))
    first = (result.trajectory[1] != 5).double().sum(0)
    assert first.sum() == 2000 and ((first - 500) ** 2 / 500).sum() < 17.0
    second = ((result.trajectory[2] != 5) & (result.trajectory[1] == 5))[result.trajectory[1][:, 0] != 5]
    share = second.double().mean(0)[1:]
    assert (share - 1 / 3).abs().max() < 0.09, "independent of what went before"


def test_seeds_and_generators():
    sampler = semi(TinyModel(4, sharpness=1.0), temperature=1.5)
    draw = lambda **options: sampler.generate(PROMPTS, **options).sequences  # noqa: E731
    assert torch.equal(draw(seed=3), draw(seed=3)) and not torch.equal(draw(seed=3), draw(seed=4))
    assert torch.equal(draw(seed=2**64 - 1), draw(seed=-1))
    generator = torch.Generator().manual_seed(1)
    first, second = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(draw(generator=torch.Generator().manual_seed(1)), first)
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    four = [torch.Generator().manual_seed(b) for b in range(4)]
    assert torch.equal(draw(generator=four)[0, 7:23], draw(generator=[torch.Generator().manual_seed(0)] * 4)[0, 7:23])
    same = sampler.generate([PROMPT, PROMPT], seed=7).generated
    assert not torch.equal(*same), "samples of a batch have noise of their own"


def test_progress_callback_trajectory(capsys):
    seen = []
    result = semi(TinyModel(0)).generate(PROMPTS, progress=True, callback=seen.append, return_trajectory=True)
    assert [info.step for info in seen] == list(range(8)) and seen[0].num_steps == 8 and seen[-1].nfe == 8
    assert len(result.trajectory) == 9
    for before, after in zip(result.trajectory, result.trajectory[1:], strict=False):
        changed = before != after
        assert (before[changed] == MASK).all() and (changed.sum(1) == 2).all()
    assert (result.trajectory[0] == MASK).sum() == 4 * 16 and torch.equal(result.trajectory[-1], result.sequences)
    assert "step 8/8" in capsys.readouterr().err
    semi(TinyModel(0)).generate(PROMPT)
    assert capsys.readouterr().err == ""


class Recorder:
    def __init__(self):
        self.calls = []

    def begin_step(self, step, num_steps, *, new_tokens, branch="conditional"):
        self.calls.append((step, num_steps, new_tokens, branch))


def test_sparsity_hears_of_every_call():
    model, sparsity = TinyModel(0), Recorder()
    result = semi(model, sparsity=sparsity).generate(PROMPT)
    assert sparsity.calls == [(step, 8, 16, "conditional") for step in range(8)]
    assert result.model_calls == 8
    guided, sparsity = semi(model, cfg_scale=1.5).generate(PROMPTS), Recorder()
    result = semi(model, cfg_scale=1.5, sparsity=sparsity).generate(PROMPTS)
    branches = ("conditional", "unconditional")
    assert sparsity.calls == [(step, 8, 27, branch) for step in range(8) for branch in branches]
    assert torch.equal(result.sequences, guided.sequences), "two calls instead of one on both"
    assert (guided.model_calls, result.model_calls) == (8, 16) and guided.nfe == result.nfe == (16,) * 4


def test_drop_in():
    """The published function's arguments; sequences come back with the padding on the side it was on."""
    model = TinyModel(1)
    left = torch.tensor([[0, 0, 6, 5], [1, 2, 3, 4]])
    kept = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    out = masked.generate(model, left, kept, 8, 16, 8, 0.0, 0.0, "low_confidence", MASK)
    assert torch.equal(out[:, :4], left)
    for b, prompt in enumerate((left[0, 2:], left[1])):
        assert torch.equal(out[b, 4:], published.llada(model, prompt, mask=MASK, **SIZES)[len(prompt) :])


@given(
    blocks=st.integers(1, 3),
    block_length=st.integers(1, 6),
    per_block=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 1.0]),
    remasking=st.sampled_from(masked.semi_autoregressive.REMASKING),
)
@settings(max_examples=40, deadline=None)
def test_every_position_is_filled_once(blocks, block_length, per_block, lengths, temperature, remasking):
    per_block = min(per_block, block_length)
    counts = masked.transfer_counts(block_length, per_block)
    assert sum(counts) == block_length and len(counts) == per_block and max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)
    sampler = masked.SemiAutoregressive(
        TinyModel(0, mask_logit=0.0), MASK, gen_length=blocks * block_length, block_length=block_length,
        steps=blocks * per_block, temperature=temperature, remasking=remasking,
    )  # fmt: skip
    prompts = [torch.arange(n) for n in lengths]
    states = sampler.generate(prompts, seed=0, return_trajectory=True).trajectory
    for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        changed = before != after
        assert (before[changed] == MASK).all() and (after[changed] != MASK).all()
        assert (changed.sum(1) == counts[step % per_block]).all()
        for b, prompt in enumerate(prompts):
            places = changed[b].nonzero()[:, 0] - len(prompt)
            assert ((places >= 0) & (places // block_length == step // per_block)).all()
    assert not (states[-1] == MASK).any()
    assert all(torch.equal(states[-1][b, : len(p)], p) for b, p in enumerate(prompts))


# ------------------------------------------------------------------------------------------------- variable lengths

THEIRS = {"initial": 8, "longest": 44, "block": 8, "factor": 4, "window": 6}
OURS = {"initial_length": 8, "max_length": 44, "block_length": 8, "expansion": 4, "eos_window": 6}


def variable(model, **options) -> masked.VariableLength:
    return masked.VariableLength(model, MASK, EOS, **{**OURS, **options})


@pytest.mark.parametrize("mask_logit", [-math.inf, 3.0, 8.0])
@pytest.mark.parametrize(("slope", "cfg_scale"), [(0.0, 0.0), (0.05, 0.0), (0.12, 0.8), (0.2, 0.0)])
def test_gives_the_texts_of_the_published_algorithm(slope, cfg_scale, mask_logit):
    """Lengths that grow to the maximum, that are found, expansions, predictions of the mask; batched."""
    model = TinyModel(1, mask_logit=mask_logit, eos_slope=slope)
    result = variable(model, lm_head=None, cfg_scale=cfg_scale).generate(PROMPTS)
    for b, prompt in enumerate(PROMPTS):
        text, evaluations = published.daedal(model, prompt, mask=MASK, eos=EOS, cfg_scale=cfg_scale, **THEIRS)
        assert torch.equal(result.generated[b], text[len(prompt) :])
        assert result.nfe[b] == evaluations
        assert torch.equal(result.sequences[b, : len(prompt)], prompt)
    assert not (result.sequences == MASK).any()
    assert result.model_calls <= max(result.nfe)


@pytest.mark.parametrize("seed", range(4))
def test_expansions(seed):
    """Flat predictions: positions of low confidence grow, and the result is still the published one."""
    model = TinyModel(seed, sharpness=0.5, eos_slope=0.05)
    thresholds = {"low_confidence": 0.3, "high_confidence": 0.5, "eos_threshold": 0.05}
    theirs = {**THEIRS, "low": 0.3, "high": 0.5, "eos_enough": 0.05}
    result = variable(model, lm_head=None, **thresholds).generate(PROMPTS)
    grown = []
    for b, prompt in enumerate(PROMPTS):
        text, evaluations = published.daedal(model, prompt, mask=MASK, eos=EOS, **theirs)
        assert torch.equal(result.generated[b], text[len(prompt) :]) and result.nfe[b] == evaluations
        grown.append(result.lengths[b] - len(prompt) > 8 + 3)
    assert any(grown)


def test_one_step_by_hand():
    """Eight masks of which one is sure and one is below the threshold: the first is filled in, the second expanded."""
    confident = torch.full((8,), 0.5)
    confident[2], confident[5] = 0.95, 0.05

    def model(tokens):
        logits = torch.full((*tokens.shape, 30), -20.0)
        p = torch.cat([confident, torch.full((tokens.shape[1] - 8,), 0.99)])
        logits[..., 29] = 0.0  # the end of text, far less likely than the token but at the very end
        for j in range(tokens.shape[1]):
            others = (1 - p[j]) / 28
            logits[:, j] = others.log()
            logits[:, j, j % 7] = p[j].log()
        return logits

    states = masked.VariableLength(
        model, 30, 29, initial_length=8, max_length=12, block_length=8, expansion=3, eos_threshold=0.0, eos_window=2
    ).generate(torch.zeros(1, 0, dtype=torch.int64), return_trajectory=True)
    assert states.trajectory[1].tolist() == [[30] * 8 + [29]], "half a window of ends"
    assert states.trajectory[2].tolist() == [[30, 30, 2, 30, 30, 30, 30, 30, 30, 30, 29]], "one more by three"


def test_growth_stops_at_the_maximum():
    model = TinyModel(0, sharpness=0.1)
    assert variable(model, max_length=21).generate(PROMPT).lengths == (28,)
    assert variable(model, max_length=8).generate(PROMPT).lengths == (15,)
    sure = lambda tokens: torch.eye(MASK)[EOS].mul(50).expand(*tokens.shape, -1)  # noqa: E731
    result = variable(sure).generate(PROMPT)
    assert result.lengths == (7 + 8 + 3,) and (result.generated[0] == EOS).all()
    assert result.nfe == (2,), "one look for the length, one step for the block; the ends need none"


def test_variable_lengths_with_noise():
    model = TinyModel(3, sharpness=1.5, eos_slope=0.1)
    sampler = variable(model, temperature=1.0, lm_head=None)
    seeds = [1, 2, 3, 4]
    together = sampler.generate(PROMPTS, seed=seeds)
    for b, prompt in enumerate(PROMPTS):
        assert torch.equal(sampler.generate([prompt], seed=[seeds[b]]).generated[0], together.generated[b])
    again = sampler.generate(PROMPTS, seed=[5, 2, 3, 4])
    assert not torch.equal(again.generated[0], together.generated[0]), "samples"
    assert torch.equal(again.generated[1], together.generated[1])
    assert not (together.sequences == MASK).any()


def test_variable_lengths_keep_to_their_places():
    """Only places of the generated regions reach the head; padding to a multiple changes nothing."""
    model, seen = TinyModel(2, eos_slope=0.0), []
    expected = variable(model, lm_head=None).generate(PROMPTS)
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    result = variable(model).generate(PROMPTS)
    assert torch.equal(result.sequences, expected.sequences) and seen[0] == (1, 4 * 8)
    model.calls.clear()
    result = variable(model, pad_to_multiple=16).generate(PROMPTS)
    assert torch.equal(result.sequences, expected.sequences)
    assert {shape[1] % 16 for shape in model.calls} == {0}


def test_variable_lengths_tell_sparsity():
    model, sparsity = TinyModel(1, eos_slope=0.2), Recorder()
    plain = variable(model, lm_head=None).generate(PROMPTS)
    seen = []
    result = variable(model, lm_head=None, sparsity=sparsity).generate(PROMPTS, callback=seen.append)
    assert torch.equal(plain.sequences, result.sequences)
    search = [call for call in sparsity.calls if call[1] == 1]
    assert search[0] == (0, 1, 19, "conditional") and len(search) < len(sparsity.calls)
    filling = sparsity.calls[len(search) :]
    assert [call[0] for call in filling] == list(range(len(filling))) and filling[0][1] >= 8
    assert len(seen) == len(sparsity.calls) == result.model_calls
    assert len(set(shape[0] for shape in model.calls[-result.model_calls :])) == 1, "the batch keeps its rows"


# -------------------------------------------------------------------------------------------------------- bad input


def broken(tokens):
    logits = torch.zeros(*tokens.shape, 30)
    if (tokens != MASK).sum() >= 7 + 6:
        logits[:, 13] = math.nan
    return logits


def with_embeddings(model):
    model.get_input_embeddings = lambda: torch.nn.Embedding(VOCABULARY, 2)
    return model


BAD = {
    "gen_length: expected a multiple of block_length 5, got 16": lambda m: semi(m, block_length=5),
    "steps: expected a multiple of the number of blocks 2": lambda m: semi(m, steps=7),
    "steps: expected a multiple of the number of blocks 2, at most gen_length 16, got 32": lambda m: semi(m, steps=32),
    "steps: expected an int >= 1": lambda m: semi(m, steps=0),
    "temperature: expected a finite number >= 0": lambda m: semi(m, temperature=-0.1),
    "cfg_scale: expected a number, got str": lambda m: semi(m, cfg_scale="1"),
    "remasking: expected one of": lambda m: semi(m, remasking="none"),
    "eos_token_id: logits_eos_inf needs it": lambda m: semi(m, logits_eos_inf=True),
    "eot_token_id: confidence_eos_eot_inf needs it": lambda m: semi(m, confidence_eos_eot_inf="repo"),
    "confidence_eos_eot_inf: expected": lambda m: semi(m, confidence_eos_eot_inf="both"),
    "model: expected a callable": lambda m: semi(3),
    "sparsity: expected an object with begin_step": lambda m: semi(m, sparsity=object()),
    "lm_head: expected a module": lambda m: semi(m, lm_head="head"),
    "mask_token_id: 24 is outside the vocabulary: the model has logits of 23": lambda m: masked.SemiAutoregressive(
        lambda tokens: torch.zeros(*tokens.shape, 23), 24, gen_length=4, steps=2).generate(PROMPT),
    "mask_token_id: 23 is outside the vocabulary: the model embeds 23": lambda m: masked.SemiAutoregressive(
        with_embeddings(m), 23),
    "mask_token_id: expected an int >= 0": lambda m: masked.SemiAutoregressive(m, -1),
    "input_ids: prompt 1 holds the mask": lambda m: semi(m).generate([PROMPT, torch.tensor([MASK])]),
    "input_ids: prompt 0 holds the mask token 22 or a negative": lambda m: semi(m).generate(torch.tensor([-1])),
    "input_ids: expected integers": lambda m: semi(m).generate(PROMPT.float()),
    "input_ids: expected a tensor or a list": lambda m: semi(m).generate("text"),
    "input_ids: expected at least one prompt": lambda m: semi(m).generate([]),
    r"input_ids: expected \[B, P\]": lambda m: semi(m).generate(PROMPT[None, None]),
    r"input_ids: prompt 0: expected tokens \[P\]": lambda m: semi(m).generate([PROMPT[None]]),
    "attention_mask: expected the shape": lambda m: semi(m).generate(PROMPT[None], torch.ones(1, 6)),
    "attention_mask: belongs to padded": lambda m: semi(m).generate([PROMPT], torch.ones(1, 7)),
    "attention_mask: row 0 has padding inside": lambda m: semi(m).generate(
        torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]])),
    "seed: expected one for each of 4": lambda m: semi(m, temperature=1.0).generate(PROMPTS, seed=[1]),
    "seed: expected either": lambda m: semi(m, temperature=1.0).generate(
        PROMPT, seed=1, generator=torch.Generator()),
    "generator: expected a torch.Generator": lambda m: semi(m, temperature=1.0).generate(PROMPT, generator=3),
    r"model: expected floating-point logits \[1, 23, V\], got torch.float32 \(1, 4, 23\)": lambda m: semi(
        lambda tokens: torch.zeros(1, 4, 23)).generate(PROMPT),
    "model: expected logits or an object with .logits, got dict": lambda m: semi(lambda tokens: {}).generate(PROMPT),
    "model: logits with NaN, .inf or nothing above -inf at step 3": lambda m: semi(broken).generate(PROMPT),
    "eos_token_id: expected another token": lambda m: masked.VariableLength(m, MASK, MASK),
    "initial_length: expected at most": lambda m: variable(m, initial_length=100),
    "high_confidence: expected a finite number 0..1": lambda m: variable(m, high_confidence=1.5),
    "expansion: expected an int >= 1": lambda m: variable(m, expansion=0),
    "eos_token_id: expected a token from 0 to 21": lambda m: masked.VariableLength(
        lambda tokens: torch.zeros(*tokens.shape, 22), 22, 25).generate(PROMPT),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](TinyModel(0))


def test_a_model_without_logits_of_its_mask():
    """The mask may be one past the logits: read, never predicted."""
    table = torch.randn(20, 9, generator=torch.Generator().manual_seed(3))
    model = lambda tokens: table[: tokens.shape[1]].expand(len(tokens), -1, -1)  # noqa: E731
    result = masked.SemiAutoregressive(model, 9, gen_length=8, steps=4).generate(torch.tensor([[1, 2]]))
    assert torch.equal(result.generated[0], table[2:10].argmax(1))


def test_found_under_its_name():
    assert pdn.samplers.masked is masked and "masked" in dir(pdn.samplers)
    with pytest.raises(AttributeError):
        _ = pdn.samplers.nothing
