"""A small denoiser of handwritten digits: class-conditional, epsilon prediction, images of 8 x 8.

Sources: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (what is predicted, and the
linear schedule of 1000 steps); Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022 (the class that stands for
none). Its blocks are those of ``unet.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydenoise.models.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint
from pydenoise.models.unet import Attention, DiffusionUNet, ResBlock

FORMAT = "pydenoise digits denoiser 1"
SHIPPED = Path(__file__).parent / "data" / "digits.safetensors"
SIDE = 8  # pixels, of an image
CLASSES = 10
LABEL_DTYPES = (torch.int64, torch.int32)


class DigitsUNet(DiffusionUNet):
    """Predict the noise in images of digits, of a class or of none.

    Args:
        base: channels of the finest level, a multiple of 32.
        multipliers: channels of the levels, in multiples of ``base``.
        blocks: residual blocks a level in the encoder.
        attention_levels: levels with attention, counted from the finest.

    The label ``null_class`` = 10 stands for no class: the unconditional half of classifier-free guidance.
    """

    null_class = CLASSES

    def __init__(
        self,
        base: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention_levels: Sequence[int] = (1,),
    ):
        super().__init__(1, base, multipliers, blocks, attention_levels)
        self.config = {
            "base": base,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention_levels": list(attention_levels),
        }
        self.condition_embed = nn.Embedding(CLASSES + 1, self.length)
        nn.init.zeros_(self.conv_out.weight)
        for module in self.modules():  # every block begins as its skip connection
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.proj.weight)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise in ``x``.

        Args:
            x: [N, 1, H, W], H and W multiples of ``align``; digits are 8 x 8, from -1 (paper) to 1 (ink).
            timesteps: [N] or one for all: 0 to 999, of the linear schedule; whole or not.
            labels: integers [N]: 0 to 9, or ``null_class``; ``None``: no image has a class.

        Returns:
            Like ``x``.
        """
        return self.denoise(x, self.embed(x, timesteps, labels))

    def embed(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """All that the blocks are told of a call of ``forward`` besides ``x``: [N, length]."""
        if x.dim() != 4 or x.shape[1] != 1 or x.shape[2] % self.align or x.shape[3] % self.align:
            raise ValueError(f"x: expected [N, 1, H, W], H and W multiples of {self.align}, got {list(x.shape)}")
        count = x.shape[0]
        if not isinstance(timesteps, Tensor) or timesteps.shape not in ((), (1,), (count,)):
            raise ValueError(f"timesteps: expected a tensor [{count}] or a single number, got {_what(timesteps)}")
        if labels is None:
            labels = torch.full((count,), self.null_class, device=x.device)
        elif not isinstance(labels, Tensor) or labels.shape != (count,) or labels.dtype not in LABEL_DTYPES:
            raise ValueError(f"labels: expected a tensor of integers [{count}], got {_what(labels)}")
        times = timesteps.to(x.dtype).expand(count)
        return F.silu(self.embed_time(times) + self.condition_embed(labels))


def _what(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def save_digits(
    model: DigitsUNet,
    path: str | Path,
    *,
    notes: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the model to one safetensors file.

    ``notes``: anything that JSON can hold, such as how it was trained. ``dtype``: that of the numbers in the file.
    """
    write_checkpoint(path, FORMAT, model, {"config": model.config, "notes": dict(notes or {})}, dtype)


def load_digits(path: str | Path | None = None) -> DigitsUNet:
    """The model of a file of :func:`save_digits`, in float32 and eval mode.

    ``None``: the one that is shipped, trained on scikit-learn's digits by ``examples/train_digits.py``. Raises
    :class:`pydenoise.models.WeightsError` if the file is missing, damaged or of another kind.
    """
    model, _ = load_checkpoint(SHIPPED if path is None else path, FORMAT, lambda data: DigitsUNet(**data["config"]))
    return model


def read_notes(path: str | Path | None = None) -> dict[str, object]:
    """The notes of a file of :func:`save_digits`; ``None``: of the one that is shipped."""
    return read_checkpoint(SHIPPED if path is None else path, FORMAT)[1].get("notes", {})
