"""How much of MiniLM's attention do SparseD's blocks hold? Real queries and keys of English text, layer by layer.

Run: pydenoise weights minilm && python examples/attention_recall.py [--text FILE] [--lengths 256 512]

Each entry is the share of the attention weights inside the kept blocks, and behind the slash what as many keys would
hold if every query chose its own. At the bottom: how close the embeddings of the texts come to those of full attention.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics  # the reference of the Python language, in English

import torch
import torch.nn.functional as F
from torch import Tensor

import pydenoise.functional as PF
from pydenoise.models import MiniLM
from pydenoise.models.weights import find_minilm
from pydenoise.models.wordpiece import WordPiece


def main() -> None:
    args = arguments()
    weights, vocabulary = find_minilm()
    model, tokenizer = MiniLM.from_safetensors(weights), WordPiece.from_file(vocabulary)
    with torch.inference_mode():
        for length in args.lengths:
            tokens = texts_of(args.text, tokenizer, length, args.texts)
            recorder = Recorder()
            embeddings = model.embed(tokens, attend=recorder)
            print(f"{len(tokens)} texts of {length} tokens")
            if len(tokens) > 1:
                others = (embeddings @ embeddings.T)[~torch.eye(len(tokens), dtype=torch.bool)]
                print(f"cosine between the embeddings of different texts: {others.mean():.2f} on average")
            curves = [concentration(query, key) for query, key in recorder.layers]
            for block_size in args.block_sizes:
                print_table(model, tokens, embeddings, recorder.layers, curves, block_size, args.select)


class Recorder:
    """Full attention that keeps the queries and keys of each layer."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        self.layers.append((query, key))
        return F.scaled_dot_product_attention(query, key, value, **options)


class Sparse:
    """Block-sparse attention, with the pattern of each call's own queries and keys."""

    def __init__(self, select: float, block_size: int):
        self.select, self.block_size = select, block_size

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None) -> Tensor:
        return PF.block_sparse_attention(query, key, value, pattern(query, key, self.select, self.block_size))


def pattern(query: Tensor, key: Tensor, select: float, block_size: int):
    """One selection over the whole text: nothing is a prompt."""
    return PF.sparsed_block_mask(query, key, select=select, block_size=block_size, new_tokens=key.shape[2])


def recall(query: Tensor, key: Tensor, mask) -> float:
    """The share of the attention weights in the kept blocks."""
    weights, _ = PF.block_importance(query, key, mask.block_size, new_tokens=key.shape[2])
    return ((weights * mask.to_dense()).sum() / weights.sum()).item()


def concentration(query: Tensor, key: Tensor) -> Tensor:
    """[L]: the share of the attention weights that a query's n + 1 largest ones hold, on average."""
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return weights.sort(descending=True).values.mean((0, 1, 2)).cumsum(0)


def print_table(
    model: MiniLM,
    tokens: Tensor,
    embeddings: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    curves: Sequence[Tensor],
    block_size: int,
    selects: Sequence[float],
) -> None:
    """``layers``: queries and keys of each; ``curves``: their concentrations."""
    masks = [[pattern(q, k, select, block_size) for select in selects] for q, k in layers]
    print(f"\nblocks of {block_size}" + "".join(f"{f'select {select:g}':>16}" for select in selects))
    print(f"{'kept blocks':12}" + "".join(f"{mask.density:16.1%}" for mask in masks[0]))
    for number, ((query, key), row) in enumerate(zip(layers, masks, strict=True), start=1):
        ideal = [curves[number - 1][round(mask.density * key.shape[2]) - 1].item() for mask in row]
        pairs = zip((recall(query, key, mask) for mask in row), ideal, strict=True)
        print(f"layer {number:<6}" + "".join(f"{f'{own:.3f} / {best:.3f}':>16}" for own, best in pairs))
    sparse = [model.embed(tokens, attend=Sparse(select, block_size)) for select in selects]
    cosines = [(embeddings * other).sum(-1).mean().item() for other in sparse]
    print(f"{'cosine':12}" + "".join(f"{cosine:16.4f}" for cosine in cosines))


def texts_of(file: Path | None, tokenizer: WordPiece, length: int, count: int) -> Tensor:
    """[up to ``count``, length]: texts that are long enough, cut."""
    texts = [topics[name] for name in sorted(topics)] if file is None else [file.read_text("utf-8", "replace")]
    rows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer.encode(text, length)
        if len(tokens) == length and len(rows) < count:
            rows.append(tokens)
    if not rows:
        raise SystemExit(f"no text of {length} tokens in {file}")
    return torch.tensor(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text; default: the reference of Python")
    parser.add_argument("--texts", type=int, default=4, help="how many texts of the default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512], help="tokens, up to 512")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64], choices=(16, 32, 64, 128))
    parser.add_argument("--select", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5], help="shares of blocks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
