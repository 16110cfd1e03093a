"""Cases of the op ``dcls_kernel``; tests and benches read the same table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pydenoise.ops import dcls_kernel
from pydenoise.testing.policy import arrange


@dataclass(frozen=True)
class DclsKernelCase:
    """One ``dcls_kernel`` call and the reason why it is in the table."""

    name: str
    why: str
    size: tuple[int, ...]
    shape: tuple[int, int, int]  # [O, I, C]
    version: str = "gauss"
    compat: str | None = None
    reach: float = 1.0  # positions spread over this share of the kernel
    whole: bool = False  # positions are whole numbers, where hats have kinks
    widths: float = 0.3  # standard deviation of SIG
    strides: str = "contiguous"

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """weight, P and SIG, drawn in float64."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weight = draw(*self.shape)
        half = torch.tensor(self.size, dtype=torch.float64).reshape(-1, 1, 1, 1) / 2
        P = self.reach * half * (2 * torch.rand(len(self.size), *self.shape, generator=generator).double() - 1)
        P = P.round() if self.whole else P
        SIG = draw(*P.shape) * self.widths if dcls_kernel.has_widths(self.version) else None
        return tuple(
            None if t is None else arrange(t.to(dtype), self.strides).to(device) for t in (weight, P, SIG)
        )  # fmt: skip

    def args(self, dtype: torch.dtype, device: str = "cpu") -> tuple:
        """The rows' arguments."""
        tensors = self.tensors(dtype, device)
        return dcls_kernel.prepare(*tensors, self.size, version=self.version, compat=self.compat)

    def grad(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """A gradient of the kernel."""
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(*self.shape[:2], *self.size, generator=generator, dtype=torch.float64)
        return arrange(grad.to(dtype), self.strides).to(device)


def rounding_scale(exact: Tensor, grad: Tensor, args: tuple) -> float:
    """What the rounding of a gradient of P or SIG is relative to: the two terms of a quotient's derivative may cancel,
    and each may be as large as the weight times the kernel's gradient times a factor's slope."""
    term = args[0].abs().max().item() * grad.abs().max().item() / args[-1]
    return max(exact.abs().max().item(), term)


DCLS_KERNEL_CASES: tuple[DclsKernelCase, ...] = (
    DclsKernelCase("depthwise17", "the layer that the papers train", (17, 17), (96, 1, 34)),
    DclsKernelCase("depthwise17_v1", "the same, linear interpolation", (17, 17), (96, 1, 34), "v1"),
    DclsKernelCase("max", "hats of any width", (7, 7), (20, 3, 5), "max"),
    DclsKernelCase("v0", "not normalised", (7, 7), (20, 3, 5), "v0"),
    DclsKernelCase("line", "one axis, more components than a chunk", (25,), (16, 8, 9)),
    DclsKernelCase("line_v1", "one axis, hats", (25,), (16, 8, 3), "v1"),
    DclsKernelCase("long_line", "an axis longer than any block", (301,), (3, 2, 11)),
    DclsKernelCase("volume", "three axes", (5, 5, 5), (6, 4, 7)),
    DclsKernelCase("volume_max", "three axes, hats of any width", (5, 3, 7), (6, 4, 3), "max"),
    DclsKernelCase("volume_v0", "three axes, not normalised", (3, 4, 5), (6, 4, 3), "v0"),
    DclsKernelCase("flat_volume", "three axes, two of one tap", (1, 9, 1), (5, 1, 3)),
    DclsKernelCase("oblong", "sizes differ", (5, 9), (33, 1, 6)),
    DclsKernelCase("oblong_reference", "sizes differ, axes of the published package", (5, 9), (33, 1, 6), "gauss",
                   "reference", reach=0.25),
    DclsKernelCase("volume_reference", "axes reversed", (3, 5, 7), (4, 4, 4), "v1", "reference"),
    DclsKernelCase("volume_v0_reference", "the last two axes exchanged", (3, 5, 7), (4, 4, 4), "v0", "reference"),
    DclsKernelCase("even", "even sizes have no middle", (8, 6), (17, 2, 5), "v1"),
    DclsKernelCase("even_gauss", "even sizes, Gaussians", (4, 4), (17, 2, 5)),
    DclsKernelCase("one_tap", "nothing to place", (1, 1), (3, 2, 4)),
    DclsKernelCase("one_component", "one component, one pair", (7, 7), (1, 1, 1)),
    DclsKernelCase("wide", "more rows and columns than a tile", (37, 41), (2, 1, 3)),
    DclsKernelCase("many_components", "more components than any block", (9, 9), (4, 1, 150)),
    DclsKernelCase("whole", "positions on taps, at the kinks of hats", (7, 7), (20, 2, 4), "v1", whole=True),
    DclsKernelCase("whole_max", "the same with widths of 1", (7, 7), (20, 2, 4), "max", whole=True, widths=0.0),
    DclsKernelCase("outside", "positions beyond the border", (7, 7), (20, 2, 4), "gauss", reach=1.6),
    DclsKernelCase("outside_v0", "mass lost at the border", (7, 7), (20, 2, 4), "v0", reach=1.6),
    DclsKernelCase("broad", "Gaussians wider than the kernel", (9, 9), (20, 2, 4), widths=8.0),
    DclsKernelCase("sliced", "odd strides between NaN", (7, 9), (9, 2, 4), strides="sliced"),
)  # fmt: skip
