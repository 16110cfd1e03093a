"""The dynamic block of a continuous U-Net: features that an ODE carries from time 0 to time 1.

Source: Cheng et al., "The Missing U for Efficient Diffusion Models" (2023), https://arxiv.org/abs/2310.20092.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pydenoise import functional as PF
from pydenoise.nn._tableaus import TABLEAUS
from pydenoise.nn.fused_conv import FusedConv2d
from pydenoise.ops._arguments import check_choice
from pydenoise.ops.ode_stage import ORDERS
from pydenoise.ops.weighted_conv import algorithm_by_precision

KERNEL_SIZES = (1, 3)  # of the second convolution


class SoftplusConv2d(FusedConv2d):
    """``softplus(conv2d(x) + b) + residual`` that can be trained; parameters and their draw are torch.nn.Conv2d's.

    Winograd's algorithm is used where ``torch.get_float32_matmul_precision()`` is not "highest", as by the op.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, device=None, dtype=None):
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, activation="softplus", device=device,
            dtype=dtype,
        )  # fmt: skip
        self.requires_grad_(True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as torch.nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``input`` [N, C_in, H, W]; ``residual`` broadcasts to the output [N, C_out, H, W]."""
        if not torch.compiler.is_compiling():
            algorithm = algorithm_by_precision()
            if algorithm != self.algorithm:
                self.algorithm, self._packed = algorithm, None
        return super().forward(input, residual)


class DynamicBlock(nn.Module):
    """Integrate ``dh / dt = f(h)`` over images [N, channels, H, W] from time 0 to time 1, in ``n_steps`` equal steps.

    ``f(h) = softplus(conv2(norm(softplus(conv1(norm(h))))))``, with norm the instance norm without parameters and conv1
    3 x 3. The channels are the halves [z; v] of positions and velocities.

    Args:
        channels: C; even where the order is "second".
        order: "augmented" (the published code): f gives the derivative of all C channels. "second" (the paper's text):
            z' = v and v' = f(z, v), where conv2 gives C / 2 channels; Nystroem's form spares the work on z's half.
        kernel_size: of conv2, 1 (the plain version) or 3.
        residual: the derivative is ``f(h) + h``; of order "second" ``f(z, v) + v``.
        film_features: where given, ``forward`` takes an embedding of this length, and SiLU and a linear layer make of
            it the scale and shift of each image's channels behind the second norm.
        time_dependent: the time within the ODE is one more channel in front of both convolutions.
        method: "euler", "midpoint", "heun", "rk4" (the classic one) or "rk4_38" (the 3/8 rule: what torchdiffeq calls
            rk4).
        n_steps: of the method, each of length 1 / n_steps.
        eps: of the norms.
        recompute: with gradients, keep the state at the start of each step only and compute its stages again in the
            backward pass; else all of their activations are kept. The gradients are those of the discrete steps either
            way.

    On a CPU and on NVIDIA GPUs a stage is four launches: the combination of state and slopes with the norm, conv1 with
    its softplus, the second norm, conv2 with softplus and residual.
    """

    METHODS = tuple(TABLEAUS)

    def __init__(
        self,
        channels: int,
        *,
        order: str = "augmented",
        kernel_size: int = 3,
        residual: bool = False,
        film_features: int | None = None,
        time_dependent: bool = False,
        method: str = "rk4_38",
        n_steps: int = 1,
        eps: float = 1e-5,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_count("channels", channels)
        check_choice("order", order, ORDERS)
        if order == "second" and channels % 2:
            raise ValueError(f"channels: order 'second' needs an even number, got {channels}")
        if kernel_size not in KERNEL_SIZES:
            raise ValueError(f"kernel_size: expected 1 or 3, got {kernel_size!r}")
        if film_features is not None:
            _check_count("film_features", film_features)
        check_choice("method", method, self.METHODS)
        _check_count("n_steps", n_steps)
        if not isinstance(eps, float) or not 0 < eps < math.inf:
            raise ValueError(f"eps: expected a positive number, got {eps!r}")
        self.channels, self.order, self.residual, self.film_features = channels, order, residual, film_features
        self.time_dependent, self.method, self.n_steps = time_dependent, method, n_steps
        self.eps, self.recompute = eps, recompute
        factory = {"device": device, "dtype": dtype}
        inputs, slopes = channels + time_dependent, channels // 2 if order == "second" else channels
        self.conv1 = SoftplusConv2d(inputs, channels, 3, **factory)
        self.conv2 = SoftplusConv2d(inputs, slopes, kernel_size, **factory)
        self.film = None
        if film_features is not None:
            self.film = nn.Sequential(nn.SiLU(), nn.Linear(film_features, 2 * channels, **factory))

    # ------------------------------------------------------------------------------------------------- integration

    def forward(self, input: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``input`` [N, channels, H, W]: h(0); ``embedding`` [N, film_features]: needed with FiLM, else refused.

        Returns h(1), of the input's shape and dtype. An image needs two pixels at least: a single one is its own mean.
        """
        if input.dim() != 4 or input.shape[1] != self.channels or input.shape[2] * input.shape[3] < 2:
            raise ValueError(
                f"input: expected [N, {self.channels}, H, W] of at least two pixels, got shape {tuple(input.shape)}"
            )
        film = self._film_of(input, embedding)
        again = self.recompute and torch.is_grad_enabled() and self._has_gradients(input, film)
        h, length = input, 1 / self.n_steps
        for step in range(self.n_steps):
            if again:
                h = checkpoint(self._step, h, step * length, film, use_reentrant=False, preserve_rng_state=False)
            else:
                h = self._step(h, step * length, film)
        return h

    def derivative(self, input: Tensor, time: float = 0.0, embedding: Tensor | None = None) -> Tensor:
        """The right side of the ODE at ``input`` [N, channels, H, W]: of all channels, also of order "second"."""
        film = self._film_of(input, embedding)
        x, point = self._stage(input, [], (), (), 0.0, time)
        slope = self._slope(x, point, time, film)
        return slope if self.order == "augmented" else torch.cat((input.chunk(2, dim=1)[1], slope), dim=1)

    def _has_gradients(self, *tensors: Tensor | None) -> bool:
        return any(t is not None and t.requires_grad for t in (*tensors, *self.parameters()))

    def _film_of(self, input: Tensor, embedding: Tensor | None) -> Tensor | None:
        if self.film is None:
            if embedding is not None:
                raise ValueError("embedding: the block has no FiLM; give film_features to its constructor")
            return None
        if embedding is None or tuple(embedding.shape) != (input.shape[0], self.film_features):
            got = "None" if embedding is None else f"shape {tuple(embedding.shape)}"
            raise ValueError(f"embedding: expected [{input.shape[0]}, {self.film_features}], got {got}")
        return self.film(embedding)

    def _step(self, h: Tensor, start: float, film: Tensor | None) -> Tensor:
        """One step of the method from the time ``start``."""
        tableau, length = TABLEAUS[self.method], 1 / self.n_steps
        slopes: list[Tensor] = []
        for row, position, at in zip(tableau.a, tableau.position_a, tableau.c, strict=True):
            time = start + at * length
            x, point = self._stage(h, slopes, row, position, at, time)
            slopes.append(self._slope(x, point, time, film).to(h.dtype))
        kept, options = self._weights(slopes, tableau.b, tableau.position_b, 1.0)
        return PF.ode_combination(h, kept, **options)

    def _weights(self, slopes: list[Tensor], row, position, at: float) -> tuple[list[Tensor], dict]:
        """The slopes that count, and how they enter the point at ``at`` parts of the step."""
        length, second = 1 / self.n_steps, self.order == "second"
        counts = [i for i in range(len(slopes)) if row[i] or (second and position[i])]
        options: dict = {"weights": [length * row[i] for i in counts], "order": self.order}
        if second:
            options["position_weights"] = [length * length * position[i] for i in counts]
            options["drift"] = length * at
        return [slopes[i] for i in counts], options

    def _stage(self, h: Tensor, slopes: list[Tensor], row, position, at: float, time: float) -> tuple:
        """(what conv1 reads, the point if the derivative needs it)."""
        kept, options = self._weights(slopes, row, position, at)
        plane = time if self.time_dependent else None
        result = PF.ode_stage(h, kept, plane=plane, eps=self.eps, return_point=self.residual, **options)
        return result if self.residual else (result, None)

    def _slope(self, x: Tensor, point: Tensor | None, time: float, film: Tensor | None) -> Tensor:
        """f at a normalised point: of order "second" the acceleration."""
        hidden = self.conv1(x)
        plane = time if self.time_dependent else None
        film = None if film is None else film.to(hidden.dtype)
        y = PF.ode_stage(hidden, film=film, plane=plane, eps=self.eps)
        if point is not None and self.order == "second":
            point = point.chunk(2, dim=1)[1]
        return self.conv2(y, point)

    def extra_repr(self) -> str:
        text = f"{self.channels}, order={self.order!r}, method={self.method!r}, n_steps={self.n_steps}"
        text += ", residual=True" if self.residual else ""
        return text + (", time_dependent=True" if self.time_dependent else "")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
