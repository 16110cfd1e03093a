"""How good sampled digits are: do they look like their class, and how far are they from a reference?

Real digits are scikit-learn's (UCI "Optical Recognition of Handwritten Digits", 1797 images of 8 x 8, 17 grey levels).
"""

import torch
from torch import Tensor

NEIGHBOURS = 5


def real_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] float32, -1 (paper) to 1 (ink), and labels [1797] int64. Needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn is needed for real digits: pip install pydenoise[demo]") from error

    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1, torch.from_numpy(data.target).long()


def nearest_class(images: Tensor, real: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The class that most of an image's nearest real digits have; of equals, the one whose digits are nearer.

    Args:
        images: [N, ...].
        real: [M, ...], M at least ``neighbours``.
        labels: [M] int64.

    Returns:
        [N] int64.
    """
    if images.shape[1:] != real.shape[1:]:
        raise ValueError(f"images: expected images of the shape {list(real.shape[1:])}, got {list(images.shape)}")
    if not 1 <= neighbours <= len(real):
        raise ValueError(f"neighbours: expected 1 to {len(real)}, got {neighbours}")
    distances = torch.cdist(images.flatten(1).double(), real.flatten(1).double())
    nearest, places = distances.topk(neighbours, largest=False)
    shares = 1 + (1 - nearest / nearest[:, -1:].clamp(min=1e-30)) / (
        neighbours + 1
    )  # a vote is 1; the rest breaks ties
    votes = torch.zeros(len(images), int(labels.max()) + 1, dtype=shares.dtype)
    return votes.scatter_add(1, labels[places], shares).argmax(1)


def class_agreement(images: Tensor, classes: Tensor, real: Tensor, labels: Tensor) -> float:
    """Share of the images [N, ...] whose nearest real digits are of their class ``classes`` [N]: 0 to 1.

    Real digits themselves, each classified by all the others, reach 0.99.
    """
    return (nearest_class(images, real, labels) == classes).double().mean().item()


def rms_distance(images: Tensor, reference: Tensor) -> float:
    """Root of the mean squared difference of pixels, where 2 is the whole range from paper to ink."""
    return (images.double() - reference.double()).square().mean().sqrt().item()
