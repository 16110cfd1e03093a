"""int8 by hand: quantize, convolve on codes, requantize, dequantize; then the same in one layer made of nn.Conv2d.

Run: python examples/int8_ops.py
"""

import torch
from torch import nn

import pydenoise as pdn
import pydenoise.functional as PF
from pydenoise.quantization import Scheme, quantize_weight, range_parameters, snr_db


def main() -> None:
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(32, 64, 3, padding=1).eval(), nn.Conv2d(64, 32, 3, padding=1).eval()
    x = torch.randn(1, 32, 64, 64)
    with torch.no_grad():
        middle = torch.relu(conv1(x))
        expected = conv2(middle)

        # Weights: one scale per output channel. Inputs: one scale and one zero point from a range that was seen before.
        weight1, weight_scale1 = quantize_weight(conv1.weight)
        weight2, weight_scale2 = quantize_weight(conv2.weight)
        scale, zero_point = range_parameters(x.amin(), x.amax())
        middle_scale, middle_zero_point = range_parameters(middle.amin(), middle.amax())

        # The first convolution writes the codes that the second one reads: nothing is float in between.
        codes = PF.quantize(x, scale, zero_point)
        codes = PF.int8_conv2d(
            codes, weight1, scale, weight_scale1, input_zero_point=zero_point, bias=conv1.bias, padding=1,
            activation="relu", out_dtype=torch.int8, out_scale=middle_scale, out_zero_point=middle_zero_point,
        )  # fmt: skip
        print(f"between the layers: {codes.dtype}, {codes.min().item()} to {codes.max().item()}")
        restored = PF.dequantize(codes, middle_scale, middle_zero_point)
        print(f"codes, dequantized: {snr_db(middle, restored):.1f} dB of signal over noise")
        y = PF.int8_conv2d(
            codes, weight2, middle_scale, weight_scale2, input_zero_point=middle_zero_point, bias=conv2.bias, padding=1
        )
        print(f"two layers, one scale per tensor: {snr_db(expected, y):.1f} dB")

        # Without a range: a scale per pixel, computed from the input itself.
        codes, scales, zero_points = PF.quantize_dynamic(middle, granularity="pixel")
        y = PF.int8_conv2d(
            codes, weight2, scales, weight_scale2, input_zero_point=zero_points, bias=conv2.bias, padding=1
        )
        print(f"second layer, one scale per pixel ({list(scales.shape)}): {snr_db(expected, y):.1f} dB")

        # The same as layers.
        dynamic = pdn.nn.Int8Conv2d.from_float(conv2)
        static = pdn.nn.Int8Conv2d.from_float(conv2, Scheme("per_tensor"), input_range=(0.0, middle.max().item()))
        for name, layer in (("a scale per pixel", dynamic), ("one scale", static)):
            print(f"Int8Conv2d, {name}: {snr_db(expected, layer(middle)):.1f} dB")


if __name__ == "__main__":
    main()
