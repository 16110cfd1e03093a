"""RoutedDiTBlock: the published network by its plain formula, with every product exact; the restricted one."""

import pytest
import torch
import torch.nn.functional as F

from pydenoise.nn import RoutedDiTBlock, TaskRouting

CHANNELS, HEADS, TOKENS = 24, 3, 10
ROUTING = TaskRouting(CHANNELS, 100, alpha=1.0)


def block(dtype=torch.float64, **options) -> RoutedDiTBlock:
    torch.manual_seed(0)
    made = RoutedDiTBlock(CHANNELS, HEADS, **options).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def drawn(batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, TOKENS, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(batch, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attention(module, h):
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in module.attn.qkv(h).chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return module.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def mlp(module, h):
    return module.mlp.fc2(F.gelu(module.mlp.fc1(h), approximate="tanh"))


def published(module, x, c, mask):
    """The block with masks, line by line."""
    shift1, scale1, gate1, shift2, scale2, gate2 = module.adaLN_modulation(c).chunk(6, 1)
    m = mask[:, None].to(x.dtype)
    r = m * x
    r = r + gate1[:, None] * attention(module, modulated(r, shift1, scale1))
    r = r + gate2[:, None] * mlp(module, modulated(r, shift2, scale2))
    return r + (1 - m) * x


def restricted(module, x, c, mask):
    """A narrower network for each sample: the layers' rows and columns of the channels that it uses."""
    results = []
    for own, told, used in zip(x, c, mask, strict=True):
        parts = [part[:, used] for part in module.adaLN_modulation(told[None]).chunk(6, 1)]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        r = own[None][..., used]
        qkv = F.linear(modulated(r, shift1, scale1), module.attn.qkv.weight[:, used], module.attn.qkv.bias)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        r = r + gate1[:, None] * F.linear(mixed, module.attn.proj.weight[used], module.attn.proj.bias[used])
        h = F.gelu(
            F.linear(modulated(r, shift2, scale2), module.mlp.fc1.weight[:, used], module.mlp.fc1.bias),
            approximate="tanh",
        )
        r = r + gate2[:, None] * F.linear(h, module.mlp.fc2.weight[used], module.mlp.fc2.bias[used])
        out = own.clone()
        out[:, used] = r[0]
        results.append(out)
    return torch.stack(results)


TIMES = {"one": 70, "first": 0, "last": 99, "many": torch.tensor([0, 99, 40])}


@pytest.mark.parametrize("method", ["window", "random"])
@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("name", TIMES)
def test_formula(name, restrict, method):
    routing = ROUTING if method == "window" else TaskRouting(CHANNELS, 100, method="random")
    module, (x, c) = block(restrict=restrict), drawn()
    mask = routing.mask(TIMES[name]).expand(3, -1)
    with torch.no_grad():
        out = module(x, c, routing.route(TIMES[name]))
        exact = (restricted if restrict else published)(module, x, c, mask)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)


def test_all_channels_are_a_plain_block():
    module, (x, c) = block(), drawn()
    everything = TaskRouting(CHANNELS, 100, sharing=1.0).route(50)
    exact = published(module, x, c, torch.ones(3, CHANNELS, dtype=torch.bool))
    for out in (module(x, c), module(x, c, everything), block(restrict=True)(x, c, everything)):
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("restrict", [False, True])
def test_begins_as_the_identity(restrict):
    x, c = drawn(dtype=torch.float32)
    module = RoutedDiTBlock(CHANNELS, HEADS, restrict=restrict)
    assert torch.equal(module(x, c, ROUTING.route(70)), x)
    assert torch.equal(module(x, c, ROUTING.route(torch.tensor([1, 50, 99]))), x)


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("name", ["one", "many"])
def test_gradients(name, restrict):
    module, (x, c) = block(restrict=restrict), drawn()
    mask = ROUTING.mask(TIMES[name]).expand(3, -1)
    inputs = [x.requires_grad_(), c.requires_grad_(), *module.parameters()]
    weights = torch.randn(x.shape, dtype=x.dtype)
    found = torch.autograd.grad((module(x, c, ROUTING.route(TIMES[name])) * weights).sum(), inputs)
    exact = torch.autograd.grad(((restricted if restrict else published)(module, x, c, mask) * weights).sum(), inputs)
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("name", TIMES)
def test_kernels(name, restrict, dtype):
    """In the dtypes of the compiled kernels."""
    module, (x, c) = block(dtype, restrict=restrict), drawn(dtype=dtype)
    route = ROUTING.route(TIMES[name])
    with torch.no_grad():
        exact = block(restrict=restrict).double()
        exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
        wanted = exact(x.double(), c.double(), route)
        got = module(x, c, route)
        mask = ROUTING.mask(TIMES[name]).expand(3, -1)
        own = (restricted if restrict else published)(module, x, c, mask)
    error, torchs = ((t.double() - wanted).abs().max() for t in (got, own))
    assert got.dtype == dtype and error <= 2 * torchs + 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_masked_channels_are_untouched_when_restricted():
    module, (x, c) = block(torch.float32, restrict=True), drawn(dtype=torch.float32)
    with torch.no_grad():
        out = module(x, c, ROUTING.route(99))
    start = int(ROUTING.starts[99])
    assert torch.equal(out[..., :start], x[..., :start]) and not torch.equal(out[..., start:], x[..., start:])


def test_names_of_published_weights():
    assert list(RoutedDiTBlock(8, 2).state_dict()) == [
        "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    ]  # fmt: skip


def test_trains_with_a_window_for_each_sample():
    torch.manual_seed(0)
    module = RoutedDiTBlock(CHANNELS, HEADS)
    routing = TaskRouting(CHANNELS, 100)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    x, c = drawn(8, torch.float32)
    losses = []
    for _ in range(30):
        times = torch.randint(0, 100, (8,))
        loss = (module(x, c, routing.route(times)) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


M, X, C = RoutedDiTBlock(8, 2), torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD = {
    "heads: expected a divisor": lambda: RoutedDiTBlock(8, 3),
    "channels: expected at least 1": lambda: RoutedDiTBlock(0, 1),
    "channels: expected an int": lambda: RoutedDiTBlock("8", 1),
    "mlp_ratio: expected": lambda: RoutedDiTBlock(8, 2, 0.0),
    r"x: expected \[B, T, 8\]": lambda: M(X[..., :4], C),
    r"c: expected \[2, 8\]": lambda: M(X, C[:1]),
    "route: expected what TaskRouting.route": lambda: M(X, C, 5),
    "width: expected 1 to 8": lambda: M(X, C, TaskRouting(16).route(999)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()
