"""Methods that ``torch.compile`` must not look into."""

import torch


def keep_out_of_graphs(owner: type, method: str, reason: str) -> None:
    """Make calls of ``owner.method`` graph breaks, which with ``fullgraph=True`` are errors that give the ``reason``.

    Called by constructors: as a decorator, ``torch.compiler.disable`` would load torch's compiler (and Triton) with
    this package.
    """
    marker = f"_{method}_is_kept_out"
    if marker not in owner.__dict__:
        setattr(owner, method, torch.compiler.disable(owner.__dict__[method], reason=reason))
        setattr(owner, marker, True)
