"""The result of a calibration: statistics of every layer, kept in a file, merged, shown as a table."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pydenoise.quantization.observers import LayerStatistics, kind_of
from pydenoise.quantization.reservoir import Reservoir
from pydenoise.quantization.schemes import Scheme, resolve_scheme
from pydenoise.quantization.timesteps import TimestepBuckets

FORMAT, FORMAT_VERSION = "pydenoise.calibration", 1
_SAME_WEIGHTS = 0.01  # relative difference of mean |weight|: far above a cast to half precision, far below training


def fingerprint(module: nn.Module) -> dict:
    """What tells a layer from another: kind, geometry, and the mean magnitude of its weight."""
    weight = module.weight.detach()
    same = {"kind": kind_of(module), "weight_shape": list(weight.shape)}
    if same["kind"] == "conv2d":
        for name in ("stride", "dilation"):
            same[name] = list(getattr(module, name))
        same["padding"] = module.padding if isinstance(module.padding, str) else list(module.padding)
        same["groups"] = module.groups
    return {**same, "mean_abs_weight": weight.float().abs().mean().item()}


@dataclass
class Calibration:
    """What :func:`calibrate` learned. ``print(calibration)`` shows a table.

    Attributes:
        model: class name of the model. layers: name -> :class:`LayerStatistics`, of the layers that were called.
        scheme: the :class:`Scheme` it is meant for, or "auto".
        timesteps: the timestep buckets of the statistics. timestep_argument: where the model takes its timestep.
        batches: how many were run. uncalled: names of layers that none of them called.
        fingerprints: name -> what identifies the layer (see :meth:`check`).
    """

    model: str
    layers: dict[str, LayerStatistics]
    scheme: Scheme | str = "auto"
    timesteps: TimestepBuckets = field(default_factory=TimestepBuckets)
    timestep_argument: str | int | None = None
    batches: int = 0
    uncalled: tuple[str, ...] = ()
    fingerprints: dict[str, dict] = field(default_factory=dict)

    @property
    def constant(self) -> tuple[str, ...]:
        """Names of layers whose input was one and the same number everywhere: their scales say little."""
        return tuple(name for name, statistics in self.layers.items() if statistics.is_constant)

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless ``model`` has the layers, with the weights, that were calibrated.

        Weights are compared by their mean magnitude, within 1 %: a cast to half precision passes, other weights do not.
        """
        modules = dict(model.named_modules())
        for name, known in self.fingerprints.items():
            if name not in modules or kind_of(modules[name]) is None:
                raise ValueError(f"calibration: is of another model ({self.model}): this one has no layer {name!r}")
            here = fingerprint(modules[name])
            for key in known:
                if key != "mean_abs_weight" and known[key] != here.get(key):
                    raise ValueError(
                        f"calibration: is of another model ({self.model}): {key} of layer {name!r} is "
                        f"{here.get(key)} here and {known[key]} there"
                    )
            if not math.isclose(known["mean_abs_weight"], here["mean_abs_weight"], rel_tol=_SAME_WEIGHTS):
                raise ValueError(
                    f"calibration: is of other weights: those of layer {name!r} have the mean magnitude "
                    f"{here['mean_abs_weight']:.4g} here and {known['mean_abs_weight']:.4g} there"
                )

    def merge(self, other: "Calibration") -> "Calibration":
        """A calibration on the batches of both. Raises ``ValueError`` if they are of different models or buckets."""
        if self.timesteps != other.timesteps:
            raise ValueError("other: has other timestep buckets")
        for name in self.fingerprints.keys() & other.fingerprints.keys():
            if self.fingerprints[name] != other.fingerprints[name]:
                raise ValueError(f"other: is of another model: layer {name!r} differs")
        known = [{*c.layers, *c.uncalled} for c in (self, other)]
        if known[0] != known[1]:
            raise ValueError(f"other: is of other layers: {sorted(known[0] ^ known[1])[0]!r} is in one of them only")
        layers = {}
        for name in {**self.layers, **other.layers}:
            one, two = self.layers.get(name), other.layers.get(name)
            layers[name] = one.merged(two) if one is not None and two is not None else one or two
        uncalled = tuple(name for name in self.uncalled if name in other.uncalled)
        return Calibration(
            self.model, layers, self.scheme, self.timesteps, self.timestep_argument, self.batches + other.batches,
            uncalled, {**self.fingerprints, **other.fingerprints},
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: statistics and samples as tensors, all else as JSON in its metadata."""
        tensors, layers = {}, {}
        for index, (name, item) in enumerate(self.layers.items()):
            prefix = f"{index}."
            tensors[prefix + "channel_low"], tensors[prefix + "channel_high"] = item.channel_low, item.channel_high
            tensors[prefix + "counts"] = item.counts
            for bucket, samples in enumerate(item.reservoir.items if item.reservoir else []):
                for number, sample in enumerate(samples):
                    tensors[f"{prefix}sample.{bucket}.{number}"] = sample.contiguous()
            layers[name] = {
                "kind": item.kind, "channels": item.channels, "extent": item.extent, "calls": item.calls,
                "capacity": item.reservoir.capacity if item.reservoir else 0,
                "seen": item.reservoir.seen if item.reservoir else [],
            }  # fmt: skip
        scheme = self.scheme.to_dict() if isinstance(self.scheme, Scheme) else self.scheme
        about = {
            "model": self.model, "scheme": scheme, "edges": self.timesteps.edges, "batches": self.batches,
            "timestep_argument": self.timestep_argument, "uncalled": self.uncalled, "fingerprints": self.fingerprints,
            "layers": layers,
        }  # fmt: skip
        metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "calibration": json.dumps(about)}
        save_file(tensors, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "Calibration":
        """Read what :meth:`save` wrote.

        Args:
            path: the file. model: if given, :meth:`check` it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a calibration, of another version, damaged, or of another model; the message says which.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        about, tensors = _read(path)
        try:
            scheme = about["scheme"]
            result = cls(
                about["model"],
                {
                    name: _statistics(name, f"{i}.", item, tensors)
                    for i, (name, item) in enumerate(about["layers"].items())
                },
                resolve_scheme(scheme if isinstance(scheme, str) else Scheme.from_dict(scheme)),
                TimestepBuckets(tuple(about["edges"])),
                about["timestep_argument"],
                about["batches"],
                tuple(about["uncalled"]),
                about["fingerprints"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: a damaged calibration ({type(error).__name__}: {error})") from error
        if model is not None:
            result.check(model)
        return result

    # ----------------------------------------------------------------------------------------------------- showing

    def summary(self) -> list[dict]:
        """One row per layer: name, kind, channels, low, high, spread (largest over median channel magnitude), seen
        (buckets), samples, and a note."""
        rows = []
        for name, item in self.layers.items():
            amax = item.channel_amax
            median = amax.median().item()
            rows.append({
                "name": name, "kind": item.kind, "channels": item.channels,
                "low": item.low.min().item(), "high": item.high.max().item(),
                "spread": amax.max().item() / median if median > 0 else math.inf,
                "seen": int(item.seen.sum()), "samples": sum(map(len, item.reservoir.items)) if item.reservoir else 0,
                "note": "constant input" if item.is_constant else "",
            })  # fmt: skip
        return rows

    def __str__(self) -> str:
        buckets = len(self.timesteps)
        head = [f"calibration of {self.model}: {len(self.layers)} layers, {self.batches} batches, scheme {self.scheme}"]
        if buckets > 1:
            head.append(f"{buckets} timestep buckets, by argument {self.timestep_argument!r}")
        columns = ("layer", "kind", "channels", "low", "high", "spread", "buckets seen", "samples", "note")
        cells = [
            (r["name"], r["kind"], str(r["channels"]), f"{r['low']:.4g}", f"{r['high']:.4g}", f"{r['spread']:.1f}",
             f"{r['seen']}/{buckets}", str(r["samples"]), r["note"])
            for r in self.summary()
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (columns, *cells)
        ]
        if self.uncalled:
            lines.append(f"never called: {', '.join(self.uncalled)}")
        return "\n".join(head + lines)


def _read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of a calibration's file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a calibration of pydenoise (format {metadata.get('format')!r})")
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"{path}: a calibration of format version {metadata.get('format_version')}; "
                    f"this pydenoise reads version {FORMAT_VERSION}"
                )
            return json.loads(metadata["calibration"]), {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a safetensors file of a calibration, or a damaged one ({error})") from error


def _statistics(name: str, prefix: str, about: dict, tensors: dict[str, Tensor]) -> LayerStatistics:
    counts = tensors[prefix + "counts"]
    item = LayerStatistics(name, about["kind"], about["channels"], tuple(about["extent"]), len(counts))
    item.calls, item.counts = about["calls"], counts
    item.channel_low, item.channel_high = tensors[prefix + "channel_low"], tensors[prefix + "channel_high"]
    if item.channel_low.shape != (len(counts), item.channels) or item.channel_high.shape != item.channel_low.shape:
        raise ValueError(f"ranges of layer {name!r} have the shape {list(item.channel_low.shape)}")
    if about["capacity"]:
        item.reservoir = Reservoir(len(counts), about["capacity"])
        item.reservoir.seen = list(about["seen"])
        for bucket, items in enumerate(item.reservoir.items):
            while (key := f"{prefix}sample.{bucket}.{len(items)}") in tensors:
                items.append(tensors[key])
    return item
