"""Denoise a picture with waifu2x cunet; without a name, a photograph of scikit-image with noise added.

Run: pydenoise weights cunet && python examples/cunet.py [IN.png OUT.png]
"""

import sys
from pathlib import Path

import numpy as np
import torch

from pydenoise.imaging import Picture, map_tiles, read_picture, write_picture
from pydenoise.models import CUNet
from pydenoise.models.weights import find_cunet

LEVEL = 3  # 0 removes little noise, 3 much


def main() -> None:
    model = CUNet.from_ncnn(*find_cunet(LEVEL))
    source, target = (Path(name) for name in sys.argv[1:3] or ("", "cunet.png"))
    picture = read_picture(source) if sys.argv[1:] else noisy_photograph()

    def denoise(x: torch.Tensor) -> torch.Tensor:  # the network is for RGB: gray goes through as three equal channels
        y = model.denoise(x.expand(-1, 3, -1, -1))
        return y if x.shape[1] == 3 else y.mean(dim=1, keepdim=True)

    with torch.inference_mode():
        picture.pixels = map_tiles(picture.pixels, denoise, tile=512, overlap=32, align=4)
    write_picture(target, picture)
    print(f"wrote {target}: {picture.describe()}")


def noisy_photograph() -> Picture:
    from skimage import data

    noise = np.random.default_rng(0).normal(0, 10, (300, 451, 3))
    return Picture((data.chelsea() + noise).clip(0, 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
