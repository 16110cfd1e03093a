"""Sample heightfields from the terrain network and save them side by side as a picture, from smooth to rough.

Run: pydenoise weights terrain && python examples/terrain.py [OUT.png]
"""

import sys
import time

import torch

from pydenoise.imaging import Picture, write_picture
from pydenoise.models import TerrainDenoiser
from pydenoise.models.terrain import consistency_sample, to_heights
from pydenoise.models.weights import find_terrain

SIGMAS = (80, 10, 2, 0.5, 0.1)  # the last step takes away half of the grain that the others leave


def main() -> None:
    model = TerrainDenoiser.from_onnx(find_terrain())
    roughness = torch.tensor([0.0, 0.5, 1.0])
    noise = torch.randn(len(SIGMAS), len(roughness), 1, 128, 128, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    terrain = consistency_sample(model, SIGMAS, noise=noise, condition=roughness)
    print(f"{len(roughness)} heightfields in {len(SIGMAS)} steps, {time.perf_counter() - start:.1f} s")
    for level, heights in zip(roughness.tolist(), to_heights(terrain)[:, 0], strict=True):
        print(f"roughness {level}: {heights.min():.2f} to {heights.max():.2f} m, mean {heights.mean():.2f} m")

    # The network's own values rather than metres: their logarithmic scale shows the flat parts too.
    low, high = terrain.amin((1, 2, 3), keepdim=True), terrain.amax((1, 2, 3), keepdim=True)
    gray = ((terrain - low) / (high - low) * 255).round().byte()[:, 0]
    target = sys.argv[1] if len(sys.argv) > 1 else "terrain.png"
    write_picture(target, Picture(torch.cat(list(gray), dim=1).unsqueeze(-1).numpy()))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
