"""How an int8 model was made of its float model, without the numbers: what a checkpoint needs to make it again."""

import json
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

FLOAT = "float"


@dataclass
class Recipe:
    """Kept as ``int8_recipe`` in the int8 model.

    Attributes:
        model: class name of the float model. mode: "blocks", "graph" or "modules".
        keep: the patterns. schemes: name of a layer -> its :class:`Scheme` as a dict, or "float".
        swapped: name of a module -> class of what took its place.
        skips: name of a residual block -> channels of its skip connection.
        shortcut_dtype: of float shortcuts; ``None``: their own.
        example: in mode "graph", the arguments that the model was traced with, tensors as shapes (:func:`describe`).
        timestep: (argument, edges of the buckets) where layers have a scale per range of timesteps.
        recorded: whether its forward is recorded.
    """

    model: str
    mode: str
    keep: tuple[str, ...] = ()
    schemes: dict[str, dict | str] = field(default_factory=dict)
    swapped: dict[str, str] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)
    shortcut_dtype: str | None = None
    example: dict | None = None
    timestep: tuple[str | int, tuple[float, ...]] | None = None
    recorded: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Raises ``TypeError``, ``KeyError`` or ``ValueError`` for anything that :meth:`to_json` did not write."""
        values = json.loads(text)
        values["keep"] = tuple(values["keep"])
        if values["timestep"] is not None:
            argument, edges = values["timestep"]
            values["timestep"] = (argument, tuple(edges))
        return cls(**values)


def describe(value: object) -> dict:
    """Arguments as plain types: a tensor becomes its shape, strides and dtype.

    Raises ``TypeError`` for what is neither a tensor, a plain value, nor a list, tuple or dict of them.
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "stride": list(value.stride()), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(item) for item in value]}
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a plain value")


def stand_in(description: dict) -> object:
    """The arguments of :func:`describe` again, with tensors without numbers on the meta device."""
    if "value" in description:
        return description["value"]
    if "dict" in description:
        return {key: stand_in(item) for key, item in description["dict"].items()}
    if "shape" in description:
        return torch.empty_strided(
            description["shape"], description["stride"], dtype=dtype_of(description["dtype"]), device="meta"
        )
    kind, items = next(iter(description.items()))
    return {"list": list, "tuple": tuple}[kind](stand_in(item) for item in items)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that ``str(dtype)`` names. Raises ``ValueError``."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe of an int8 model, ``None`` for any other."""
    recipe = model.__dict__.get("int8_recipe")
    return recipe if isinstance(recipe, Recipe) else None
