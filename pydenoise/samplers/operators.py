"""Linear operators of inverse problems: y = H x with the adjoint H^T and the pseudo-inverse H^+.

Measurements and images are batches. Inner products are real, <a, b> = Re sum conj(a) b, so that complex measurements
of real images have an adjoint too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class LinearOperator:
    """H of y = H x. Subclasses have ``forward`` and ``adjoint``, and ``pinv`` where there is a formula for it."""

    tolerance, most_iterations = 1e-6, 200  # of ``pinv`` by conjugate gradients

    def forward(self, x: Tensor) -> Tensor:
        """H x [B, ...] of x [B, ...]."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """H^T y [B, ...], shaped as x."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def pinv(self, y: Tensor) -> Tensor:
        """H^+ y: of the x with the least |H x - y| the shortest; by conjugate gradients on H^T H x = H^T y.

        Each sample by itself, until |H^T (y - H x)| has fallen to ``tolerance`` of what it was.
        """
        residual = self.adjoint(y)
        x, direction = torch.zeros_like(residual), residual
        squares = first = _squares(residual)
        for _ in range(self.most_iterations):
            active = squares > self.tolerance**2 * first
            if not bool(active.any()):
                break
            turned = self.adjoint(self.forward(direction))
            step = _over_samples(torch.where(active, squares / _dots(direction, turned), 0.0), x)
            x, residual = x + step * direction, residual - step * turned
            before, squares = squares, _squares(residual)
            direction = residual + _over_samples(torch.where(active, squares / before, 0.0), x) * direction
        return x

    def measurements(self, y: Tensor) -> int:
        """How many numbers were measured of each sample of ``y``."""
        return math.prod(y.shape[1:])

    def check_adjoint(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
        tolerance: float | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """The dot-product test <H x, y> = <x, H^T y>, with random x of ``shape`` and y.

        Args:
            tolerance: of the difference, relative to |H x| |y|; 1e-4, in float64 1e-10.

        Raises:
            ValueError: the adjoint is none, or gives another shape.
        """
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tuple(shape), generator=generator, dtype=dtype).to(device)
        image = self.forward(x)
        y = torch.randn(image.shape, generator=generator, dtype=image.dtype).to(device)
        back = self.adjoint(y)
        if back.shape != x.shape:
            raise ValueError(f"adjoint: expected shape {tuple(x.shape)}, got {tuple(back.shape)}")
        left, right = float(_dots(image, y).sum()), float(_dots(x, back).sum())
        allowed = (1e-10 if dtype == torch.float64 else 1e-4) if tolerance is None else tolerance
        scale = float(_squares(image).sum().sqrt() * _squares(y).sum().sqrt())
        if not abs(left - right) <= allowed * scale:
            raise ValueError(
                f"adjoint: <H x, y> = {left:.6g} and <x, H^T y> = {right:.6g} differ: it is not that of forward"
            )


class FunctionOperator(LinearOperator):
    """An operator of two functions; ``pinv`` by conjugate gradients unless it is given as a third.

    ``check_adjoint`` tests that they belong together.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        pinv: Callable[[Tensor], Tensor] | None = None,
    ):
        for name, function in (("forward", forward), ("adjoint", adjoint), ("pinv", pinv)):
            if not callable(function) and not (name == "pinv" and function is None):
                raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
        self._forward, self._adjoint, self._pinv = forward, adjoint, pinv

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._adjoint(y)

    def pinv(self, y: Tensor) -> Tensor:
        return super().pinv(y) if self._pinv is None else self._pinv(y)


class Inpainting(LinearOperator):
    """Pixels that are known: y = mask x, with zeros where nothing was measured.

    Args:
        mask: bool, or 0 and 1; broadcasts to one sample: [H, W], [C, H, W], [1, H, W].
    """

    def __init__(self, mask: Tensor):
        self.mask = _mask("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask.to(x.device)
        _check_broadcast("mask", mask, x.shape[1:])
        return torch.where(mask, x, torch.zeros_like(x))

    adjoint = pinv = forward

    def measurements(self, y: Tensor) -> int:
        return int(self.mask.expand(y.shape[1:]).sum())


class DownSampling(LinearOperator):
    """Means of blocks of ``factor`` x ``factor`` pixels of images [B, C, H, W]."""

    def __init__(self, factor: int):
        if isinstance(factor, bool) or not hasattr(factor, "__index__"):
            raise TypeError(f"factor: expected an int, got {type(factor).__name__}")
        if factor < 1:
            raise ValueError(f"factor: expected a positive number, got {factor}")
        self.factor = int(factor)

    def forward(self, x: Tensor) -> Tensor:
        return block_sums(x, self.factor) / self.factor**2

    def adjoint(self, y: Tensor) -> Tensor:
        return repeated(y, self.factor) / self.factor**2

    def pinv(self, y: Tensor) -> Tensor:
        return repeated(y, self.factor)


class Blur(LinearOperator):
    """Convolution of every channel of images [B, C, H, W] with a kernel, circular at the borders.

    Args:
        kernel: [kh, kw], not larger than the images; its middle, [kh // 2, kw // 2], is where a pixel goes.
        rcond: frequencies that the kernel keeps less of than ``rcond`` times its largest are lost to ``pinv``.
    """

    def __init__(self, kernel: Tensor, *, rcond: float = 1e-4):
        if not isinstance(kernel, Tensor):
            raise TypeError(f"kernel: expected a tensor, got {type(kernel).__name__}")
        if kernel.dim() != 2 or not kernel.numel() or not kernel.is_floating_point():
            raise ValueError(f"kernel: expected floating-point [kh, kw], got {kernel.dtype} {tuple(kernel.shape)}")
        if not bool(kernel.isfinite().all()):
            raise ValueError("kernel: expected finite numbers")
        if not 0 <= rcond < 1:
            raise ValueError(f"rcond: expected a number from 0 to 1, got {rcond}")
        self.kernel, self.rcond = kernel.detach().double().cpu(), float(rcond)
        self._kept: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self._filtered(x, self._spectrum(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filtered(y, self._spectrum(y).conj())

    def pinv(self, y: Tensor) -> Tensor:
        spectrum = self._spectrum(y)
        power = spectrum.abs().square()
        kept = power > self.rcond**2 * power.max()
        return self._filtered(y, torch.where(kept, spectrum.conj() / torch.where(kept, power, 1.0), 0.0))

    def _spectrum(self, x: Tensor) -> Tensor:
        """The kernel's Fourier transform at the size of ``x``; those of sizes that were seen are kept."""
        size, dtype = tuple(x.shape[-2:]), _exact(x)
        key = (size, dtype, x.device)
        if key not in self._kept:
            (height, width), (kh, kw) = size, self.kernel.shape
            if kh > height or kw > width:
                raise ValueError(f"kernel: expected at most the image's size {size}, got {(kh, kw)}")
            padded = torch.nn.functional.pad(self.kernel, (0, width - kw, 0, height - kh))
            spectrum = torch.fft.rfft2(padded.roll((-(kh // 2), -(kw // 2)), (0, 1)))
            self._kept[key] = spectrum.to(x.device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        return self._kept[key]

    def _filtered(self, x: Tensor, spectrum: Tensor) -> Tensor:
        found = torch.fft.irfft2(torch.fft.rfft2(x.to(_exact(x))) * spectrum, s=x.shape[-2:])
        return found.to(x.dtype)


class MRI(LinearOperator):
    """Undersampled k-space: the orthonormal Fourier transform of each coil's view of the image, where it was sampled.

    Images are [B, 2, H, W], real and imaginary parts, or real, [B, 1, H, W]. Measurements are complex
    [B, coils, H, W], zero where nothing was sampled.

    Args:
        mask: which frequencies are sampled, bool or 0 and 1: [H, W], or [W] for whole columns.
        sensitivities: complex [coils, H, W]; ``None``: one coil that sees everything alike.
        channels: 2 or 1, of the images.
        centered: whether the zero frequency and the image's origin are in the middle, as in most scanners' data; else
            they are at index 0.
    """

    def __init__(self, mask: Tensor, *, sensitivities: Tensor | None = None, channels: int = 2, centered: bool = False):
        mask = _mask("mask", mask)
        if mask.dim() not in (1, 2):
            raise ValueError(f"mask: expected [H, W] or [W], got {tuple(mask.shape)}")
        if channels not in (1, 2):
            raise ValueError(f"channels: expected 2 (real and imaginary parts) or 1, got {channels!r}")
        if sensitivities is not None:
            if not isinstance(sensitivities, Tensor) or not sensitivities.is_complex():
                raise TypeError("sensitivities: expected a complex tensor [coils, H, W]")
            if sensitivities.dim() != 3 or sensitivities.shape[-1] != mask.shape[-1]:
                raise ValueError(f"sensitivities: expected [coils, H, W], got {tuple(sensitivities.shape)}")
        self.mask, self.sensitivities, self.channels, self.centered = mask, sensitivities, int(channels), bool(centered)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected images [B, {self.channels}, H, W], got {tuple(x.shape)}")
        self._check_size("x", x)
        exact = x.to(_exact(x))
        image = exact[:, :1] + 0j if self.channels == 1 else torch.complex(exact[:, :1], exact[:, 1:])
        if self.sensitivities is not None:
            image = image * self.sensitivities.to(image)
        return self._masked(self._transform(image, torch.fft.fft2))

    def adjoint(self, y: Tensor) -> Tensor:
        self._check_measurement(y)
        return self._real(self._image(y))

    def pinv(self, y: Tensor) -> Tensor:
        """H^+ y; by conjugate gradients with several coils."""
        if self.sensitivities is not None:
            return super().pinv(y)
        if self.channels == 2:
            return self.adjoint(y)
        # The frequencies of a real image come in pairs, and one of a pair tells the other.
        self._check_measurement(y)
        mask = self.mask.expand(y.shape[-2:]).to(y.device)
        mask = torch.fft.ifftshift(mask) if self.centered else mask
        weight = (mask.double() + mask.flip(0, 1).roll((1, 1), (0, 1)).double()) / 2
        spectrum = torch.fft.fft2(self.adjoint(y)) / torch.where(weight > 0, weight, 1.0)
        return torch.fft.ifft2(torch.where(weight > 0, spectrum, 0.0)).real.to(_real_dtype(y))

    def measurements(self, y: Tensor) -> int:
        return int(self.mask.expand(y.shape[-2:]).sum()) * y.shape[1]

    def _image(self, y: Tensor) -> Tensor:
        image = self._transform(self._masked(y), torch.fft.ifft2)
        if self.sensitivities is None:
            return image
        return (image * self.sensitivities.to(image).conj()).sum(1, keepdim=True)

    def _real(self, image: Tensor) -> Tensor:
        return image.real if self.channels == 1 else torch.cat([image.real, image.imag], 1)

    def _transform(self, values: Tensor, transform: Callable[..., Tensor]) -> Tensor:
        if not self.centered:
            return transform(values, norm="ortho")
        inner = torch.fft.ifftshift(values, dim=(-2, -1))
        return torch.fft.fftshift(transform(inner, norm="ortho"), dim=(-2, -1))

    def _masked(self, values: Tensor) -> Tensor:
        return torch.where(self.mask.to(values.device), values, torch.zeros_like(values))

    def _check_measurement(self, y: Tensor) -> None:
        coils = 1 if self.sensitivities is None else self.sensitivities.shape[0]
        if y.dim() != 4 or y.shape[1] != coils or not y.is_complex():
            raise ValueError(f"y: expected complex [B, {coils}, H, W], got {y.dtype} {tuple(y.shape)}")
        self._check_size("y", y)

    def _check_size(self, name: str, value: Tensor) -> None:
        _check_broadcast("mask", self.mask, value.shape[-2:])
        if self.sensitivities is not None and value.shape[-2:] != self.sensitivities.shape[-2:]:
            wanted, got = tuple(self.sensitivities.shape[-2:]), tuple(value.shape[-2:])
            raise ValueError(f"{name}: expected the size {wanted} of the sensitivities, got {got}")


def block_sums(x: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H / factor, W / factor]: sums over blocks."""
    if x.dim() != 4 or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x: expected [B, C, H, W], H and W multiples of {factor}, got {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // factor, factor, width // factor, factor).sum((3, 5))


def repeated(x: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H factor, W factor]: every pixel as a block, the transpose of ``block_sums``."""
    if x.dim() != 4:
        raise ValueError(f"x: expected [B, C, H, W], got {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    blocks = x[:, :, :, None, :, None].expand(batch, channels, height, factor, width, factor)
    return blocks.reshape(batch, channels, height * factor, width * factor)


def check_operator(operator: object) -> LinearOperator:
    """``operator``, if it is one."""
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"operator: expected a LinearOperator such as Inpainting(mask), got {type(operator).__name__}; "
            "FunctionOperator makes one of two functions"
        )
    return operator


def _mask(name: str, mask: object) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    known = mask.bool()
    if not torch.equal(known.to(mask.dtype), mask):
        raise ValueError(f"{name}: expected bool, or 0 and 1")
    if not bool(known.any()):
        raise ValueError(f"{name}: nothing is measured")
    return known.detach().clone()


def _check_broadcast(name: str, mask: Tensor, size: Sequence[int]) -> None:
    """A mask must not have more than one sample's numbers, nor make a sample larger."""
    pairs = zip(reversed(mask.shape), reversed(tuple(size)), strict=False)
    if mask.dim() > len(size) or any(have not in (1, wanted) for have, wanted in pairs):
        raise ValueError(f"{name}: {tuple(mask.shape)} does not broadcast to {tuple(size)}")


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _real_dtype(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.complex128 else torch.float32


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Real inner products of samples, float64 [B]."""
    products = (a.conj() * b).real if a.is_complex() else a.double() * b.double()
    return products.double().flatten(1).sum(1)


def _squares(a: Tensor) -> Tensor:
    return _dots(a, a)


def _over_samples(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
