"""State dicts of DCLS layers whose positions are read another way: of the published package, or of ``compat=``.

The published package moves the last axis of a kernel with P[0], and centres an axis by the size of another one. Both
are undone exactly: positions and widths change their places, and positions move by a whole number of taps.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pydenoise.nn import dcls_conv
from pydenoise.ops import dcls_kernel as op

KEYS = ("weight", "P", "SIG")


@dataclass(frozen=True)
class DclsLoadedLayer:
    """What was done to one layer's entries, and how much it mattered.

    ``changes`` are sentences, none where the entries are read as they are. ``difference``: how far, relative to the
    largest tap, the kernels would be off without the conversion. ``outside``: components that lie beyond the border.
    """

    name: str
    changes: tuple[str, ...]
    difference: float
    outside: int


@dataclass(frozen=True)
class DclsLoadReport:
    """Result of :func:`load_dcls_state_dict`: a line for every layer."""

    layers: tuple[DclsLoadedLayer, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            name = layer.name or "the layer"
            if layer.changes:
                text = "; ".join(layer.changes)
                lines.append(f"{name}: {text}. Read as it was, its kernel would be off by {layer.difference:.2g}.")
            else:
                lines.append(f"{name}: nothing to convert.")
            if layer.outside:
                lines.append(f"{name}: {layer.outside} components lie outside of the kernel.")
        lines += [f"missing: {key}" for key in self.missing_keys]
        lines += [f"unexpected: {key}" for key in self.unexpected_keys]
        return "\n".join(lines)


def load_dcls_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, compat: str | None = "reference", strict: bool = True
) -> DclsLoadReport:
    """Load a state dict into a model with DCLS layers such that they compute what they did where it was made.

    Args:
        model: a DCLS layer, or a network with such layers.
        state_dict: as ``model.load_state_dict`` takes it; it is not changed.
        compat: how the layers that wrote it read P: "reference" for the published package, ``None`` for layers of
            this one in their default setting.
        strict: as in ``load_state_dict``.

    Returns:
        A report; ``print`` shows what was converted in which layer, and what would differ without it.

    Raises:
        ValueError: ``compat`` is no such word, the model has no DCLS layer, or an entry has another shape.
        RuntimeError: keys do not fit (from ``load_state_dict``).
    """
    op.check_compat(compat)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, dcls_conv.DclsConvNd)}
    if not layers:
        raise ValueError(f"model: expected a DCLS layer or a network with some, got {type(model).__name__}")
    converted, reports = OrderedDict(state_dict), []
    if hasattr(state_dict, "_metadata"):
        converted._metadata = dict(state_dict._metadata)
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        own = {key: converted[prefix + key] for key in KEYS if prefix + key in converted}
        _check_shapes(layer, prefix, own)
        changed, report = _converted(layer, name, own, compat)
        converted.update({prefix + key: value for key, value in changed.items()})
        if hasattr(converted, "_metadata"):
            converted._metadata[name] = {"version": layer._version, dcls_conv.METADATA: layer.compat}
        reports.append(report)
    keys = model.load_state_dict(converted, strict=strict)
    return DclsLoadReport(tuple(reports), tuple(keys.missing_keys), tuple(keys.unexpected_keys))


def _check_shapes(layer: dcls_conv.DclsConvNd, prefix: str, own: Mapping[str, Tensor]) -> None:
    for key, value in own.items():
        parameter = getattr(layer, key)
        if parameter is not None and value.shape != parameter.shape:
            raise ValueError(
                f"state_dict: expected {prefix}{key} of shape {tuple(parameter.shape)}, got {tuple(value.shape)}"
            )


def _converted(
    layer: dcls_conv.DclsConvNd, name: str, own: Mapping[str, Tensor], compat: str | None
) -> tuple[dict[str, Tensor], DclsLoadedLayer]:
    """The entries as ``layer`` reads them, and the report."""
    changed, changes = dict(own), []
    if "P" not in own or layer.reads_alike(compat, layer.compat):
        return changed, DclsLoadedLayer(name, (), 0.0, _outside(layer, own.get("P")))
    source_axes, source_centres = op.axes_and_centres(layer.dilated_kernel_size, layer.version, compat)
    axes, centres = op.axes_and_centres(layer.dilated_kernel_size, layer.version, layer.compat)
    along = [axes.index(m) for m in range(len(axes))]  # the axis that P[m] moves here
    place = [source_axes[axis] for axis in along]  # of the entry that becomes P[m]
    shifts = [source_centres[axis] - centres[axis] for axis in along]
    moved = torch.tensor(shifts, dtype=own["P"].dtype, device=own["P"].device)
    changed["P"] = own["P"][place] + moved.reshape(-1, *[1] * (own["P"].dim() - 1))
    if place != sorted(place):
        changes.append(", ".join(f"P[{m}] is what was P[{source}]" for m, source in enumerate(place)))
    if any(shifts):
        changes.append(", ".join(f"P[{m}] moved by {shift:+d}" for m, shift in enumerate(shifts) if shift))
    if "SIG" in own:
        changed["SIG"] = own["SIG"][place]
        wider = layer.gauss_spread(compat) - layer.gauss_spread(layer.compat) if layer.version == "gauss" else 0.0
        if wider:
            changed["SIG"] = _widened(name, changed["SIG"], wider)
            changes.append(f"SIG is |SIG| {wider:+.2f}")
    return changed, DclsLoadedLayer(
        name, tuple(changes), _difference(layer, own, changed), _outside(layer, changed["P"])
    )


def _widened(name: str, SIG: Tensor, wider: float) -> Tensor:
    widths = SIG.abs() + wider
    if (widths < 0).any():
        raise ValueError(f"state_dict: {name or 'the layer'} has Gaussians that are too narrow for its compat")
    return widths


def _outside(layer: dcls_conv.DclsConvNd, P: Tensor | None) -> int:
    """Components whose position lies beyond the first or the last tap of an axis."""
    if P is None or P.is_meta:
        return 0
    axes, centres = op.axes_and_centres(layer.dilated_kernel_size, layer.version, layer.compat)
    beyond = torch.zeros_like(P[0], dtype=torch.bool)
    for m, centre, size in zip(axes, centres, layer.dilated_kernel_size, strict=True):
        at = P[m] + centre
        beyond |= (at < 0) | (at > size - 1)
    return int(beyond.sum())


@torch.no_grad()
def _difference(layer: dcls_conv.DclsConvNd, own: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> float:
    """How far the kernel of ``own`` is from that of ``changed``, over its largest tap; NaN where one is missing."""
    if "weight" not in own or ("SIG" in own) != op.has_widths(layer.version) or own["weight"].is_meta:
        return float("nan")
    wrong, right = (
        layer.construct(*(entries[key].double() if key in entries else None for key in KEYS), backend="reference")
        for entries in (own, changed)
    )
    largest = right.abs().amax().item()
    return (right - wrong).abs().amax().item() / largest if largest else 0.0
