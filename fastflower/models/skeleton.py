"""Builds networks without memory for their weights: for their shapes, names and sizes."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Skeleton(TorchFunctionMode):
    """Within this context, the weights of new networks are on the meta device, and no random numbers are drawn.

    Computations on constants work, which they do not within `torch.device("meta")`.

    Example:
        >>> from torchvision.models import resnet50
        >>> with Skeleton():
        ...     network = resnet50()
        >>> network.fc.weight.device
        device(type='meta')
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Create empty tensors on the meta device, and leave out what initializes them."""
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        changes_in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if changes_in_place and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **options)
