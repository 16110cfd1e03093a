"""RoutedDiTBlock: a transformer block of diffusion models whose channels a timestep chooses.

Sources: Park et al., "Denoising Task Routing for Diffusion Models", ICLR 2024, https://arxiv.org/abs/2310.07138;
Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (the block, and adaLN-zero).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pydenoise.functional as PF
from pydenoise.nn.int8_attention import attend
from pydenoise.nn.task_routing import Route

EPS = 1e-6


class _Attention(nn.Module):
    """The layers of a self-attention, under the names that published weights have."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)


class _Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)


class RoutedDiTBlock(nn.Module):
    """Attention and feed-forward part of a DiT, of which a timestep uses some channels only.

    With the mask m, ``r = m x``, ``r += gate1 * attention(norm1(r))``, ``r += gate2 * mlp(norm2(r))``, and the result
    is ``r + (1 - m) x``: both norms run over all channels, the masked ones being 0, and both parts write to all.

    What the mask leaves out is left out of the work, exactly: the norm makes one number of all masked channels of a
    token (less the modulation), so that the projection to q, k and v multiplies the window only, and adds a product
    of rank one. That needs one window for all samples; with one for each, the whole product runs.

    Args:
        channels: C. heads: of the attention, a divisor of C. mlp_ratio: width of the feed-forward part over C.
        restrict: read and write the window only: norms over its channels, and all four products shrink to it. This is
            **another network** than the published one, and has to be trained so.

    The modulation begins at zero, the block as the identity. The state dict has the names of DiT's own blocks.

    Raises:
        TypeError, ValueError: a bad argument; the message names it.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: float = 4.0, *, restrict: bool = False):
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of channels = {channels}, got {heads}")
        if not int(channels * mlp_ratio) >= 1:
            raise ValueError(f"mlp_ratio: expected a number that leaves a channel, got {mlp_ratio}")
        self.channels, self.heads, self.restrict = channels, heads, restrict
        self.attn, self.mlp = _Attention(channels), _Mlp(channels, int(channels * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x: Tensor, c: Tensor, route: Route | None = None) -> Tensor:
        """Run the block.

        Args:
            x: [B, T, C]. c: [B, C], the embedding of time and condition.
            route: of :meth:`TaskRouting.route`; ``None``: all channels, a plain DiT block.

        Returns:
            [B, T, C].
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x: expected [B, T, {self.channels}], got {_what(x)}")
        if not isinstance(c, Tensor) or c.shape != (x.shape[0], self.channels):
            raise ValueError(f"c: expected [{x.shape[0]}, {self.channels}], got {_what(c)}")
        if route is not None and not isinstance(route, Route):
            raise TypeError(f"route: expected what TaskRouting.route returns, got {type(route).__name__}")
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        if route is not None and self.restrict:
            return self._restricted(x, modulation, route)
        return self._routed(x, modulation, route)

    # ------------------------------------------------------------------------------------------ the published network

    def _routed(self, x: Tensor, modulation: tuple[Tensor, ...], route: Route | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        options = {} if route is None else route.options()
        if route is not None and isinstance(route.start, int) and route.width < self.channels:
            qkv = self._skipping(x, shift1, scale1, route)
        else:
            qkv = self.attn.qkv(PF.routed_norm(x, shift1, scale1, eps=EPS, **options).output)
        update = self.attn.proj(self._mix(qkv))
        normed = PF.routed_norm(x, shift2, scale2, update=update, gate=gate1, eps=EPS, **options)
        return _added(normed.carried, gate2, self._feed_forward(normed.output, self.mlp.fc1.weight, self.mlp.fc2))

    def _skipping(self, x: Tensor, shift: Tensor, scale: Tensor, route: Route) -> Tensor:
        """q, k and v from the window's channels: ``W_a h_a + constant * v1 + v0``."""
        begin, end = route.start, route.start + route.width
        normed = PF.routed_norm(x, shift, scale, start=begin, width=route.width, compact=True, eps=EPS)
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        outside = torch.cat([weight[:, :begin], weight[:, end:]], 1)
        left = torch.stack([1 + scale, shift], 1)  # [B, 2, C]: what a masked channel has of the constant, and of 1
        left = torch.cat([left[:, :, :begin], left[:, :, end:]], 2) @ outside.t()  # [B, 2, 3 C]: v1 and v0
        left = torch.cat([left[:, :1], left[:, 1:] + bias], 1)
        constant = normed.constant.to(x.dtype)
        pair = torch.stack([constant, torch.ones_like(constant)], 2)  # [B, T, 2]
        rest = torch.bmm(pair, left).flatten(0, 1)
        product = torch.addmm(rest, normed.output.flatten(0, 1), weight[:, begin:end].t())
        return product.unflatten(0, x.shape[:2])

    def _mix(self, qkv: Tensor) -> Tensor:
        return attend(qkv.chunk(3, dim=-1), self.heads, None)

    def _feed_forward(self, x: Tensor, weight: Tensor, last: nn.Linear) -> Tensor:
        return last(F.gelu(F.linear(x, weight, self.mlp.fc1.bias), approximate="tanh"))

    # ----------------------------------------------------------------------------------------- the restricted network

    def _restricted(self, x: Tensor, modulation: tuple[Tensor, ...], route: Route) -> Tensor:
        if isinstance(route.start, int):
            return self._in_window(x, modulation, route)
        return self._in_sets(x, modulation, route)

    def _in_window(self, x: Tensor, modulation: tuple[Tensor, ...], route: Route) -> Tensor:
        window = slice(route.start, route.start + route.width)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, window] for part in modulation)
        own, attn, mlp = x[..., window], self.attn, self.mlp
        h = PF.routed_norm(own, shift1, scale1, eps=EPS).output
        mixed = self._mix(F.linear(h, attn.qkv.weight[:, window], attn.qkv.bias))
        update = F.linear(mixed, attn.proj.weight[window], attn.proj.bias[window])
        normed = PF.routed_norm(own, shift2, scale2, update=update, gate=gate1, eps=EPS)
        h = F.gelu(F.linear(normed.output, mlp.fc1.weight[:, window], mlp.fc1.bias), approximate="tanh")
        own = _added(normed.carried, gate2, F.linear(h, mlp.fc2.weight[window], mlp.fc2.bias[window]))
        return torch.cat([x[..., : window.start], own, x[..., window.stop :]], -1)

    def _in_sets(self, x: Tensor, modulation: tuple[Tensor, ...], route: Route) -> Tensor:
        """Other channels for each sample: the products run whole, over zeros."""
        chosen = route.channels(x.shape[0], x.device)
        tokens = chosen[:, None].expand(-1, x.shape[1], -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.gather(1, chosen) for part in modulation)

        def spread(own: Tensor) -> Tensor:
            return torch.zeros_like(x).scatter(2, tokens, own)

        own = x.gather(2, tokens)
        h = spread(PF.routed_norm(own, shift1, scale1, eps=EPS).output)
        update = self.attn.proj(self._mix(self.attn.qkv(h))).gather(2, tokens)
        normed = PF.routed_norm(own, shift2, scale2, update=update, gate=gate1, eps=EPS)
        h = self._feed_forward(spread(normed.output), self.mlp.fc1.weight, self.mlp.fc2).gather(2, tokens)
        return x.scatter(2, tokens, _added(normed.carried, gate2, h))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, heads={self.heads}, restrict={self.restrict}"


def _added(carried: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``carried + gate * update``: the end of a block, whatever the mask (see :func:`routed_norm`)."""
    return torch.addcmul(carried, gate[:, None].to(carried.dtype), update)


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
