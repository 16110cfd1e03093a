"""How one layer is quantized, as plain data: what users name, what a calibration chooses, what a checkpoint stores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

GRANULARITIES = ("per_tensor", "per_timestep", "per_pixel", "per_token", "float")
DYNAMIC = ("per_pixel", "per_token")  # scales are computed from each input: no calibration
CLIPS = ("minmax", "search")
DEFAULT_BUCKETS = 10
AUTO = "auto"


@dataclass(frozen=True)
class Scheme:
    """How the input and the weight of one convolution or linear layer are quantized.

    Attributes:
        granularity: how many scales the input has. "per_tensor": one, from calibration. "per_timestep": one for each
            of ``buckets`` ranges of timesteps, from calibration. "per_pixel" (convolutions) and "per_token" (linear
            layers): one per position over the channels, computed from each input. "float": the layer is not quantized.
        symmetric: the input's zero point is 0 and codes are -127..127; else affine, codes -128..127.
        buckets: ranges of timesteps; more than 1 for "per_timestep" only.
        clip: range of calibrated inputs: "minmax" (of all that was seen), or "search" (the shrunk range with the least
            mean ``|x - x_hat| ** 2.4``). Computed scales always cover their range.
        weight_clip: the same for the weight's output channels.
        smooth: exponent alpha of SmoothQuant's equalisation of the input's channels, or ``None``.
        bias_correction: add the mean error that quantization makes on the calibration samples to the bias.

    Raises:
        TypeError, ValueError: a field of a wrong type or value, or two that contradict each other; names the field.
    """

    granularity: str = "per_tensor"
    symmetric: bool = False
    buckets: int = 1
    clip: str = "minmax"
    weight_clip: str = "minmax"
    smooth: float | None = None
    bias_correction: bool = False

    def __post_init__(self):
        for name, choices in (("granularity", GRANULARITIES), ("clip", CLIPS), ("weight_clip", CLIPS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
        for name in ("symmetric", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")
        self._check_buckets()
        if self.smooth is not None:
            if isinstance(self.smooth, bool) or not isinstance(self.smooth, int | float):
                raise TypeError(f"smooth: expected a number or None, got {type(self.smooth).__name__}")
            if not 0.0 <= self.smooth <= 1.0:
                raise ValueError(f"smooth: expected an exponent from 0 to 1, got {self.smooth}")
        if self.is_dynamic and self.clip != "minmax":
            raise ValueError(f"clip: {self.granularity} scales are computed from each input: expected 'minmax'")
        if self.is_float and any(getattr(self, f.name) != f.default for f in fields(self)[1:]):
            raise ValueError("granularity: 'float' takes no other settings")

    def _check_buckets(self) -> None:
        if isinstance(self.buckets, bool) or not isinstance(self.buckets, int):
            raise TypeError(f"buckets: expected an int, got {type(self.buckets).__name__}")
        if self.buckets < 1:
            raise ValueError(f"buckets: expected at least 1, got {self.buckets}")
        if self.buckets > 1 and self.granularity != "per_timestep":
            raise ValueError(f"buckets: {self.granularity} has one bucket, got {self.buckets}")

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.granularity == "float"

    @property
    def is_dynamic(self) -> bool:
        """Whether the input's scales are computed from each input."""
        return self.granularity in DYNAMIC

    @property
    def cost(self) -> int:
        """Rank by run time: 0 one static scale, 1 a table of them, 2 a scale per position, 3 floating point."""
        return {"per_tensor": 0, "per_timestep": 1, "per_pixel": 2, "per_token": 2, "float": 3}[self.granularity]

    def for_kind(self, kind: str) -> "Scheme":
        """The scheme on a "conv2d" or a "linear" layer: computed scales are per pixel there, per token here."""
        if not self.is_dynamic:
            return self
        return replace(self, granularity="per_pixel" if kind == "conv2d" else "per_token")

    def to_dict(self) -> dict:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "Scheme":
        """The scheme that :meth:`to_dict` gave. Raises ``ValueError`` for a field that schemes do not have."""
        if not isinstance(values, Mapping):
            raise TypeError(f"scheme: expected a dictionary, got {type(values).__name__}")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"scheme: unknown field {unknown[0]!r}")
        return cls(**values)

    def __str__(self) -> str:
        """Short, for tables: ``per_tensor affine search``."""
        if self.is_float:
            return "float"
        words = [self.granularity + (f"({self.buckets})" if self.granularity == "per_timestep" else "")]
        words.append("symmetric" if self.symmetric else "affine")
        words += ["search"] if self.clip == "search" else []
        words += ["weight search"] if self.weight_clip == "search" else []
        words += [f"smooth {self.smooth:g}"] if self.smooth is not None else []
        words += ["bias corrected"] if self.bias_correction else []
        return " ".join(words)


PRESETS = {
    "per_tensor": Scheme("per_tensor", smooth=0.5, bias_correction=True),
    "per_timestep": Scheme("per_timestep", buckets=DEFAULT_BUCKETS, smooth=0.5, bias_correction=True),
    "per_pixel": Scheme("per_pixel"),
    "per_token": Scheme("per_token"),
    "float": Scheme("float"),
}


def resolve_scheme(scheme: "Scheme | str") -> "Scheme | str":
    """A :class:`Scheme` as it is, the preset of a name, or "auto" (chosen per layer) as it is.

    Raises:
        TypeError: neither a scheme nor a str. ValueError: an unknown name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"scheme: expected a Scheme or a name, got {type(scheme).__name__}")
    if scheme == AUTO:
        return scheme
    if scheme not in PRESETS:
        names = ", ".join(map(repr, (AUTO, *PRESETS)))
        raise ValueError(f"scheme: expected a Scheme or one of {names}, got {scheme!r}")
    return PRESETS[scheme]
