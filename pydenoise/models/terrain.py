"""A diffusion U-Net for heightfields, distilled into a consistency model: from noise to a landscape in a few steps.

Sources: the preconditioning of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
NeurIPS 2022, with the boundary condition of Song et al., "Consistency Models", ICML 2023. The published weights
(adaptive-terrain-diffusion 0.4.1) are 10.5 million parameters in an ONNX file.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pydenoise.models.onnx_weights import OnnxWeights, read_onnx
from pydenoise.models.unet import Attention, DiffusionUNet
from pydenoise.models.weights import WeightsError

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
HEIGHT_RANGE, HEIGHT_SCALE = 22.16864013671875, 0.1  # metres; the network's values are asinh(height / HEIGHT_SCALE)


class TerrainDenoiser(nn.Module):
    """From a noisy heightfield and its noise level to a clean one: the U-Net in the preconditioning of Karras et al.

    c_skip and c_out are shifted by SIGMA_MIN, so that at the least noise the input comes back as it is.
    """

    def __init__(self):
        super().__init__()
        self.unet = DiffusionUNet(1, 32, (1, 1, 2, 3, 4), blocks=4, attention_levels=(2, 3, 4))

    @classmethod
    def from_onnx(cls, path: str | Path) -> "TerrainDenoiser":
        """The published network in eval mode, of the ONNX file of adaptive-terrain-diffusion 0.4.1.

        Raises :class:`WeightsError` if the file is missing or damaged, lacks a weight (which is named), or holds
        another network: that of 0.4.2 was trained for a single step.
        """
        model = cls()
        _load(model.unet, read_onnx(path), str(path))
        return model.eval()

    def forward(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Denoise a batch.

        Args:
            noisy: [N, 1, H, W], a heightfield in [-1, 1] plus ``sigma`` times white noise; H and W multiples of 16. The
                published weights were trained on 128 x 128.
            sigma: [N], from 0.002 to 80; dtype of ``noisy``.
            condition: [N], how rough the terrain is, 0 to 1: the package's difficulty d, 1 to 100, is (d - 1) / 99;
                dtype of ``noisy``.

        Returns:
            [N, 1, H, W], clipped to [-1, 1].
        """
        if isinstance(noisy, Tensor):  # not under torch.fx, where it is a stand-in without a shape
            self._check(noisy, sigma, condition)
        level = sigma[:, None, None, None]
        above = level - SIGMA_MIN
        c_skip = SIGMA_DATA**2 / (above.square() + SIGMA_DATA**2)
        total = (level.square() + SIGMA_DATA**2).sqrt()
        timesteps = 250 * sigma.log()  # the published network's: a quarter of Karras et al.'s log, times 1000
        y = self.unet(noisy / total, timesteps, condition)
        return (above * SIGMA_DATA / total * y + c_skip * noisy).clamp(-1, 1)

    def _check(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> None:
        align = self.unet.align
        if noisy.dim() != 4 or noisy.shape[1] != 1 or any(size % align or not size for size in noisy.shape[2:]):
            raise ValueError(f"noisy: expected [N, 1, H, W] with multiples of {align}, got {list(noisy.shape)}")
        for name, value in (("sigma", sigma), ("condition", condition)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor of shape [{noisy.shape[0]}], got {type(value).__name__}")
            if tuple(value.shape) != (noisy.shape[0],):
                raise ValueError(f"{name}: expected the shape [{noisy.shape[0]}], got {list(value.shape)}")


# ---------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def consistency_sample(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    sigmas: Sequence[float] = (80.0, 10.0, 2.0, 0.5),
    *,
    noise: Tensor,
    condition: Tensor,
) -> Tensor:
    """Heightfields from noise, in as many steps as there are ``sigmas``: denoise, add less noise, denoise again.

    Args:
        model: a :class:`TerrainDenoiser`, or what stands for it (an accelerated copy).
        sigmas: noise levels, falling, 0.002 < sigma <= 80.
        noise: [len(sigmas), N, 1, H, W], standard normal: the result depends on nothing else that is random.
        condition: [N], 0 (smooth terrain) to 1 (rough).

    Returns:
        [N, 1, H, W] in [-1, 1]; :func:`to_heights` turns them into metres.

    Source: Song et al., "Consistency Models", ICML 2023, algorithm 1.
    """
    levels = [float(sigma) for sigma in sigmas]
    falling = all(high > low for high, low in zip(levels[:-1], levels[1:], strict=True))
    if not levels or not falling or not (SIGMA_MIN < levels[-1] and levels[0] <= SIGMA_MAX):
        raise ValueError(f"sigmas: expected falling levels between {SIGMA_MIN} and {SIGMA_MAX}, got {levels}")
    if noise.dim() != 5 or noise.shape[0] != len(levels):
        raise ValueError(f"noise: expected [{len(levels)}, N, 1, H, W], got {list(noise.shape)}")
    x = levels[0] * noise[0]
    for step, level in enumerate(levels):
        if step:
            x = x + math.sqrt(level**2 - SIGMA_MIN**2) * noise[step]
        x = model(x, noise.new_full((noise.shape[1],), level), condition)
    return x


def to_heights(terrain: Tensor) -> Tensor:
    """Heights in metres, 0 to 22.17, of the network's values: those lie in [-1, 1], on the scale of asinh."""
    top = math.asinh(HEIGHT_RANGE / HEIGHT_SCALE)
    return HEIGHT_SCALE * torch.sinh((terrain.clamp(-1, 1) + 1) / 2 * top)


# ----------------------------------------------------------------------------------------------------------- weights

TRAINING = "consistency-distillation"  # what the metadata of the published file says
EMBEDS = {"time_embed": "time_embed", "condition_embed": "label_emb"}
BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "film": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


def _load(unet: DiffusionUNet, weights: OnnxWeights, name: str) -> None:
    training = weights.metadata.get("training")
    if training != TRAINING:
        raise WeightsError(
            f"{name}: not the terrain network of adaptive-terrain-diffusion 0.4.1: its metadata say "
            f"training={training!r}, expected {TRAINING!r} (0.4.2 holds other weights, for a single step)"
        )
    published = _published_names(unet)
    found = weights.initializers | _norm_weights(weights)
    state = {}
    for key, parameter in unet.state_dict().items():
        module, kind = key.rsplit(".", 1)
        source = f"model.{published[module]}.{kind}"
        if source not in found:
            raise WeightsError(f"{name}: the initialiser {source} is missing (it belongs to {key})")
        value = torch.from_numpy(found[source].copy())
        if value.shape != parameter.shape or not value.is_floating_point():
            raise WeightsError(f"{name}: {source} has the shape {list(value.shape)}, expected {list(parameter.shape)}")
        if not value.isfinite().all():
            raise WeightsError(f"{name}: {source} holds values that are not finite")
        state[key] = value
    unet.load_state_dict(state)


def _published_names(unet: DiffusionUNet) -> dict[str, str]:
    """Our module's name -> the published one's. There, stages are lists: block, attention if any, upsampling if any."""
    names = {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    names |= {f"{own}.{index}": f"{theirs}.{index}" for own, theirs in EMBEDS.items() for index in (0, 2)}
    parts = [("middle.block1", "middle_block.0", BLOCK), ("middle.attention", "middle_block.1", ATTENTION)]
    parts.append(("middle.block2", "middle_block.2", BLOCK))
    for own, theirs, first in (("encoder", "input_blocks", 1), ("decoder", "output_blocks", 0)):
        for index, stage in enumerate(getattr(unet, own)):
            for place, (child, module) in enumerate(stage.named_children()):
                layers = ATTENTION if isinstance(module, Attention) else BLOCK
                parts.append((f"{own}.{index}.{child}", f"{theirs}.{index + first}.{place}", layers))
    for own, theirs, layers in parts:
        names |= {f"{own}.{layer}": f"{theirs}.{published}" for layer, published in layers.items()}
    return names


def _norm_weights(weights: OnnxWeights) -> dict[str, np.ndarray]:
    """Weights and biases of the group norms by their modules' names.

    The export gave them names of no meaning (``onnx::Mul_7639``), but the nodes that use them are called
    ``/model/input_blocks.1/input_blocks.1.0/in_layers/in_layers.0/Mul`` and the like.
    """
    kinds = {"Mul": "weight", "Add": "bias"}
    found = {}
    for node in weights.nodes:
        if node.kind in kinds and len(node.inputs) == 2 and node.inputs[1] in weights.initializers:
            scopes = node.name.split("/")[:-1]
            blocks = [scope for scope in scopes if re.fullmatch(r"(\w+put_blocks\.\d+|middle_block)\.\d+", scope)]
            name = ".".join(["model", *blocks, *scopes[-1:], kinds[node.kind]])
            found[name] = weights.initializers[node.inputs[1]].reshape(-1)  # stored as [C, 1, 1]
    return found
