"""A masked-diffusion language model: a transformer that sees the whole text and fills in what is masked.

Sources: Sahoo et al., "Simple and Effective Masked Diffusion Language Models", NeurIPS 2024; Nie et al.,
"Large Language Diffusion Models", 2025: a bidirectional transformer without a time input, trained on the
likelihood bound of :func:`masked_nll`. Layers: root-mean-square norms, also of queries and keys; rotary positions;
SwiGLU.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.models.bpe import BPE
from pydenoise.models.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint

FORMAT = "pydenoise masked language model 1"
SHIPPED = Path(__file__).parent / "data" / "masked_lm.safetensors"


class SelfAttention(nn.Module):
    """Attention of every position to every other one; queries and keys are normed and carry their positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // heads)
        self.key_norm = nn.RMSNorm(width // heads)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """``x`` [B, L, width]; ``cos``, ``sin`` [L, head width]; ``mask`` bool [B, 1, 1, L]: which keys count."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate(self.query_norm(query), cos, sin), rotate(self.key_norm(key), cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate) * up)``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class MaskedLM(nn.Module):
    """Predict every token of a text from those that are not masked.

    Args:
        vocabulary: number of tokens that can stand in a text: 0 to ``vocabulary`` - 1.
        width: channels, a multiple of twice ``heads``.
        layers: number of layers.
        heads: attention heads.
        hidden: channels inside the feed-forward networks.
        rope_base: longest wavelength of the rotary positions, in units of 2 pi tokens.

    The mask is the token ``mask_token`` = ``vocabulary``: it has an embedding but is never predicted.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 192,
        layers: int = 5,
        heads: int = 6,
        hidden: int = 512,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "hidden": hidden}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if width % (2 * heads):
            raise ValueError(f"width: expected a multiple of twice heads ({2 * heads}), got {width}")
        if not 1 < rope_base < math.inf:
            raise ValueError(f"rope_base: expected a finite number above 1, got {rope_base!r}")
        self.config = sizes | {"rope_base": float(rope_base)}
        self.vocabulary = self.mask_token = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)  # all tokens are equally likely at first
        for layer in self.layers:
            nn.init.zeros_(layer.attention.proj.weight)
            nn.init.zeros_(layer.feed_forward.down.weight)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            tokens: integers [B, L], 0 to ``mask_token``.
            lengths: integers [B]: only the first ``lengths[b]`` tokens of text b count, the rest is padding; None: all.

        Returns:
            [B, L, vocabulary], float32 (float64 for a float64 model).
        """
        self._check(tokens, lengths)
        x = self.embedding(tokens)
        cos, sin = self._positions(tokens.shape[1], x)
        mask = None
        if lengths is not None:
            mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits = self.head(self.norm(x))
        return logits if logits.dtype == torch.float64 else logits.float()

    def get_input_embeddings(self) -> nn.Module:
        """What reads tokens."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary; samplers run it on the positions that they ask for only."""
        return self.head

    def _positions(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config["width"] // self.config["heads"]
        exponents = torch.arange(size // 2, device=like.device, dtype=torch.float64) * (2 / size)
        angles = torch.arange(length, device=like.device)[:, None] * self.config["rope_base"] ** -exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _check(self, tokens: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a tensor of integers [B, L], got {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64 or int32 [B, L], got {tokens.dtype} {list(tokens.shape)}")
        if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != tokens.shape[:1]):
            got = list(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(f"lengths: expected a tensor of the shape [{tokens.shape[0]}], got {got}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., "RoFormer"): channel i turns with channel i + half. ``x`` [..., L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# -------------------------------------------------------------------------------------------------------- likelihood


def mask_tokens(
    tokens: Tensor, mask_token: int, counts: Tensor, start: int = 0, generator=None
) -> tuple[Tensor, Tensor]:
    """Mask ``counts[b]`` tokens of text b, drawn at random from those at ``start`` and after.

    ``tokens`` [B, L]; ``counts`` [B]. Returns (the tokens with masks, bool [B, L]: which are masked).
    """
    order = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    order[:, :start] = 2  # behind all others
    ranks = order.argsort(dim=-1).argsort(dim=-1)
    masked = ranks < counts[:, None]
    return tokens.masked_fill(masked, mask_token), masked


def spread_counts(texts: int, length: int, generator=None, device=None) -> Tensor:
    """``texts`` numbers of tokens to mask, each uniform in 1 to ``length``, together spread evenly over that range."""
    shift = torch.rand(1, generator=generator, device=device)
    fractions = (torch.arange(texts, device=device) + shift) / texts
    return (fractions * length).long().clamp(max=length - 1) + 1


def masked_nll(
    model, tokens: Tensor, start: int = 0, *, generator=None, mask_token: int | None = None, batch: int | None = None
) -> Tensor:
    """One sample per text of a bound on its negative log-likelihood per token, in nats: [B].

    With k tokens masked, k uniform in 1 to L - start, the mean cross-entropy of the masked tokens is on average the
    negative log-likelihood of a random order of unmasking one by one, and thereby at least that of the text (Nie et
    al., 2025, appendix A; Uria et al., 2014).

    Args:
        model: maps tokens [B, L] to logits [B, L, V].
        tokens: integers [B, L].
        start: tokens before this position are given, never masked.
        generator: of the random numbers.
        mask_token: default ``model.mask_token``.
        batch: how many texts go through the model at once; None: all.
    """
    if not 0 <= start < tokens.shape[1]:
        raise ValueError(f"start: expected a position in the text, 0 to {tokens.shape[1] - 1}, got {start!r}")
    mask_token = model.mask_token if mask_token is None else mask_token
    counts = spread_counts(tokens.shape[0], tokens.shape[1] - start, generator, tokens.device)
    hidden, masked = mask_tokens(tokens, mask_token, counts, start, generator)
    means = []
    for texts in torch.arange(tokens.shape[0], device=tokens.device).split(batch or max(1, tokens.shape[0])):
        own = masked[texts]
        losses = F.cross_entropy(model(hidden[texts])[own], tokens[texts][own].long(), reduction="none")
        sums = losses.new_zeros(len(texts)).index_add(0, own.nonzero()[:, 0], losses)
        means.append(sums / counts[texts])
    return torch.cat(means)


# ----------------------------------------------------------------------------------------------------------- weights


def save_masked_lm(
    model: MaskedLM,
    tokenizer: BPE,
    path: str | Path,
    *,
    notes: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the model and its tokenizer to one safetensors file; all but the weights is JSON in its metadata.

    ``notes``: anything that JSON can hold, such as where the weights come from. ``dtype``: that of the numbers in the
    file.
    """
    if tokenizer.vocabulary != model.vocabulary:
        raise ValueError(f"tokenizer: expected the model's {model.vocabulary} tokens, got {tokenizer.vocabulary}")
    metadata = {"config": model.config, "merges": tokenizer.merges, "notes": dict(notes or {})}
    write_checkpoint(path, FORMAT, model, metadata, dtype)


def load_masked_lm(path: str | Path | None = None) -> tuple[MaskedLM, BPE]:
    """The model of a file of :func:`save_masked_lm`, in float32 and eval mode, and its tokenizer.

    ``None``: the one that is shipped, trained on Python's standard library by ``examples/train_masked_lm.py``. Raises
    :class:`pydenoise.models.WeightsError` if the file is missing, damaged or of another kind.
    """
    model, metadata = load_checkpoint(SHIPPED if path is None else path, FORMAT, _make)
    return model, BPE(metadata["merges"])


def read_notes(path: str | Path | None = None) -> dict[str, object]:
    """The notes of a file of :func:`save_masked_lm`; ``None``: of the one that is shipped."""
    return read_checkpoint(SHIPPED if path is None else path, FORMAT)[1].get("notes", {})


def _make(metadata: dict) -> MaskedLM:
    model, tokens = MaskedLM(**metadata["config"]), BPE(metadata["merges"]).vocabulary
    if tokens != model.vocabulary:
        raise ValueError(f"{tokens} tokens for a model of {model.vocabulary}")
    return model
