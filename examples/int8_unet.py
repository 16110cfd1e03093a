"""A diffusers U-Net in int8: calibrated along its own sampling, with a report, a picture of it, and a saved model.

Run: python examples/int8_unet.py [CHECKPOINT]     a folder that UNet2DModel.from_pretrained reads; else random weights
"""

import sys

import torch
from diffusers import DDPMScheduler, UNet2DModel

import pydenoise as pdn
from pydenoise.quantization import NormalTimesteps, calibrate, snr_db, trajectory_batches

SAMPLES, STEPS = 16, 20  # the papers take 1024 samples of 250 steps


def load() -> UNet2DModel:
    if len(sys.argv) > 1:
        return UNet2DModel.from_pretrained(sys.argv[1]).eval()
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def main() -> None:
    model, scheduler = load(), DDPMScheduler()
    side, channels = model.config.sample_size, model.config.in_channels

    def inputs(samples: int, seed: int):
        """What the model sees while it samples, with the timesteps it sees it at."""
        return trajectory_batches(
            model, (4, channels, side, side), alphas_cumprod=scheduler.alphas_cumprod, timesteps=NormalTimesteps(),
            num_steps=STEPS, num_samples=samples, per_trajectory=4, clip_sample=1.0,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    calibration = calibrate(model, inputs(SAMPLES, seed=0), scheme="auto", buckets=4, progress=True)
    others = list(inputs(16, seed=1))  # of other noise
    fast, report = pdn.accelerate(model, others[0].args, "int8", calibration=calibration)
    print(report)
    report.plot("int8_unet.png")
    pdn.save_quantized(fast, "int8_unet.safetensors")

    with torch.no_grad():
        for batch in others:
            ratio = snr_db(model(*batch.args).sample, fast(*batch.args).sample)
            steps = ", ".join(str(step) for step in batch.args[1].tolist())
            print(f"timesteps {steps}: {ratio:.1f} dB of signal over noise")
    print("wrote int8_unet.png (signal over noise of each layer) and int8_unet.safetensors")


if __name__ == "__main__":
    main()
