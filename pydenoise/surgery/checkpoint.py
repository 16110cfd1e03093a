"""Save an int8 model in one file, and load it into the float architecture without the float model's weights."""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pydenoise.nn.shared_projection import share_projections
from pydenoise.quantization import TimestepBuckets
from pydenoise.surgery import int8_attach, int8_blocks
from pydenoise.surgery.chains import Untraceable
from pydenoise.surgery.graphs import GraphSurgeon
from pydenoise.surgery.int8_graph import Int8GraphSurgeon
from pydenoise.surgery.int8_plans import StoredElsewhere, StoredPlans
from pydenoise.surgery.policy import StoredPolicy
from pydenoise.surgery.recipe import Recipe, recipe_of, stand_in
from pydenoise.surgery.report import Swap

FORMAT, FORMAT_VERSION = "pydenoise.int8", 1


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write the result of ``accelerate(..., precision="int8")`` as one safetensors file.

    It holds the model's state (int8 weights, scales, zero points, schemes, and what stayed in float), its buffers that
    are not part of the state, and how it was made, as JSON in the metadata. It holds no code.

    Args:
        model: with what ``accelerate`` returned as a whole; not a part of it.
        path: of the file.

    Raises:
        TypeError: ``model`` is no module. ValueError: it is no int8 model of ``accelerate``, or it was traced with an
            example that a file cannot describe.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    recipe = recipe_of(model)
    if recipe is None:
        raise ValueError('model: expected what pydenoise.accelerate(..., precision="int8") returned')
    if recipe.mode == "graph" and recipe.example is None:
        raise ValueError("model: its example held something other than tensors and plain values, needed to trace it")
    state = model.state_dict()
    beside = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    from pydenoise import __version__

    metadata = {
        "format": FORMAT, "format_version": str(FORMAT_VERSION), "pydenoise": __version__,
        "recipe": recipe.to_json(), "buffers": json.dumps(list(beside)),
    }  # fmt: skip
    tensors = {name: tensor.detach().contiguous() for name, tensor in {**state, **beside}.items()}
    save_file(_without_sharing(tensors), str(path), metadata)


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors whose memory an earlier one has: a file holds each on its own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen.add(place)
    return result


def load_quantized(
    architecture: nn.Module, path: str | Path, *, device: torch.device | str = "cpu", record: bool = True
) -> nn.Module:
    """The int8 model of a file of :func:`save_quantized`: it gives the same outputs, bit for bit, on the same machine.

    Args:
        architecture: the float model's structure: built as the original was, with any weights, or without
            (``with torch.device("meta"): model = UNet2DModel.from_config(config)``). It is not changed. Its weights are
            not read; but Python values that its forward reads are, and a plain convolutional network is traced again.
        path: the file. device: of the result's tensors.
        record: replay recordings of the forward on a CPU, if the saved model did; see :func:`pydenoise.accelerate`.

    Returns:
        The int8 model, in eval mode.

    Raises:
        FileNotFoundError: no such file. TypeError: ``architecture`` is no module.
        ValueError: not an int8 checkpoint, a damaged one, of a newer version, or of another model; the message says
            which, and names what does not fit.
    """
    if not isinstance(architecture, nn.Module):
        raise TypeError(f"architecture: expected a torch.nn.Module, got {type(architecture).__name__}")
    if recipe_of(architecture) is not None:
        raise ValueError("architecture: is an int8 model already; give the float model's structure")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    recipe, beside, tensors = _read(path, device)
    with torch.inference_mode(False), torch.no_grad():
        try:
            model = _rebuilt(architecture, recipe)
        except (StoredElsewhere, Untraceable) as error:
            raise ValueError(f"{path}: is of another model ({recipe.model}): {error}") from error
        _fill(model, recipe, beside, tensors, path)
    model.int8_recipe = recipe
    if record and recipe.recorded and int8_attach.why_not_recorded(model) is None:
        int8_attach.record(model)
    return model


def _read(path: str | Path, device: torch.device | str) -> tuple[Recipe, list[str], dict[str, Tensor]]:
    """Recipe, names of the buffers beside the state, and all tensors."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not an int8 model of pydenoise (format {metadata.get('format')!r})")
            version = metadata.get("format_version", "")
            if version != str(FORMAT_VERSION):
                raise ValueError(
                    f"{path}: of format version {version}, written by pydenoise {metadata.get('pydenoise')}; this "
                    f"pydenoise reads version {FORMAT_VERSION}"
                )
            # copies: a file's tensors are not aligned, and torch's matrix products round by alignment
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return Recipe.from_json(metadata["recipe"]), json.loads(metadata["buffers"]), tensors
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a safetensors file of an int8 model, or a damaged one ({error})") from error


def _rebuilt(architecture: nn.Module, recipe: Recipe) -> nn.Module:
    """The int8 model without numbers: the recipe's surgery on a copy of the architecture on the meta device."""
    if type(architecture).__name__ != recipe.model:
        raise StoredElsewhere(f"this one is a {type(architecture).__name__}")
    model = _on_meta(architecture)
    if recipe.mode == "graph" and isinstance(model, nn.Conv2d):
        model = nn.Sequential(model).eval()
    plans = StoredPlans(StoredPolicy(model, recipe.keep, recipe.swapped), recipe)
    if recipe.mode == "blocks":
        dtype = None if recipe.shortcut_dtype is None else getattr(torch, recipe.shortcut_dtype.removeprefix("torch."))
        surgeon = int8_blocks.BlockSurgeon(model, plans, recipe.skips, dtype)
        surgeon.operate()
        swapped = surgeon.swapped
        share_projections(model)
    elif recipe.mode == "graph":
        model, swapped = _traced(model, recipe, plans)
    else:
        swapped, _ = int8_blocks.swap_convs(model, plans)
    _check_swapped(recipe, swapped)
    if recipe.timestep is not None:
        argument, edges = recipe.timestep
        int8_attach.attach_timesteps(model, TimestepBuckets(edges), argument)
    return model.eval()


def _on_meta(architecture: nn.Module) -> nn.Module:
    """A copy in eval mode without numbers: nothing is copied but the structure."""
    memo = {}
    for module in architecture.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    empty = torch.empty_like(tensor, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    for name, module in architecture.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                attribute = f"{name}.{key}" if name else key
                raise ValueError(
                    f"architecture: {attribute} is a tensor on the meta device that is no parameter or buffer, so no "
                    "file can fill it; build the architecture on the CPU"
                )
    return copy.deepcopy(architecture, memo).eval()


def _traced(model: nn.Module, recipe: Recipe, plans: StoredPlans) -> tuple[nn.Module, list[Swap]]:
    args, kwargs = stand_in(recipe.example)
    surgeon = GraphSurgeon(
        model, args, kwargs, lambda copied: StoredPolicy(copied, recipe.keep, recipe.swapped), stay_narrow=False
    )
    graph = surgeon.operate(lambda output: None).eval()
    return Int8GraphSurgeon(graph, plans, surgeon.swapped, surgeon.sources).operate(), surgeon.swapped


def _check_swapped(recipe: Recipe, swapped: list[Swap]) -> None:
    made = {swap.name: swap.replacement for swap in swapped}
    for name, kind in recipe.swapped.items():
        if made.get(name) != kind:
            raise StoredElsewhere(f"{name!r} is a {kind} there and cannot become one here")


def _fill(model: nn.Module, recipe: Recipe, beside: list[str], tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put the file's numbers into the model."""
    missing = [name for name in beside if name not in tensors]
    if missing:
        raise ValueError(f"{path}: damaged: it lacks the buffer {missing[0]!r}")
    for name in beside:
        parent, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(parent)
            known = module._buffers[leaf]
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{path}: is of another model ({recipe.model}): it has a buffer {name!r}") from error
        if known is None or known.shape != tensors[name].shape:
            raise ValueError(f"{path}: is of another model ({recipe.model}): the shape of {name!r} differs")
        module._buffers[leaf] = tensors[name]
    state = {name: tensor for name, tensor in tensors.items() if name not in beside}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path}: is of another model ({recipe.model}): {' '.join(lines[1:3])}") from error
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{path}: is of another model ({recipe.model}), or damaged: it lacks {name!r}")
