"""The head, the stages and the layers of a network: which parameters `freeze` freezes, and how `layer_decay` groups them.

A stage holds the layers that work at one resolution, and the stem belongs to the first. A network without resolutions, such as a
ViT, has its blocks in four stages. Layers after the pooling belong to the head, which is in no stage.
"""

import re
from collections.abc import Callable, Iterator
from itertools import groupby

from torch import nn

from fastflower.errors import ArgumentError
from fastflower.models.timm_networks import heads_of_timm, is_timm, layers_of_timm, modules_of, stages_of_timm


def _after_pools(network: nn.Module) -> list[str]:
    """Return the layers of `features` that follow a max-pool."""
    features = list(network.get_submodule("features").named_children())
    pooled = [number for number, (_, module) in enumerate(features, 1) if isinstance(module, nn.MaxPool2d)]
    return [f"features.{features[number][0]}" for number in pooled if number < len(features)]


def _strided(network: nn.Module) -> list[str]:
    """Return the blocks with stride 2, except in the first two: the stem and the block after it."""
    name, blocks = next(network.named_children())
    return [
        f"{name}.{number}" for number, block in list(blocks.named_children())[2:] if any(map(_halves, block.modules()))
    ]


def _halves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride == (2, 2)


def _quarters(network: nn.Module) -> list[str]:
    """Return the first blocks of the second, third and fourth quarter of a ViT."""
    names = [name for name, _ in network.get_submodule("encoder.layers").named_children()]
    return [f"encoder.layers.{names[len(names) * quarter // 4]}" for quarter in (1, 2, 3)]


_BEGINS: dict[str, str | Callable[[nn.Module], list[str]]] = {
    "alexnet": _after_pools,
    "convnext": _strided,
    "densenet": r"features\.denseblock[234]",
    "efficientnet": _strided,
    "googlenet": r"inception[345]a",
    "inception": r"Mixed_(5b|6a|7a)",
    "maxvit": r"blocks\.[123]",
    "mnasnet": _strided,
    "mobilenetv2": _strided,
    "mobilenetv3": _strided,
    "regnet": r"trunk_output\.block[234]",
    "resnet": r"layer[234]",
    "shufflenetv2": r"stage[34]",
    "squeezenet": lambda network: _after_pools(network)[1:],  # the first pool belongs to the stem
    "swin_transformer": r"features\.[246]",
    "vgg": _after_pools,
    "vision_transformer": _quarters,
}
"""The first layers of the stages after the first, by the file of torchvision.models that defines the network."""

_BLOCK = re.compile(
    "BasicBlock|(ResBottleneck|SwinTransformer|Encoder)Block|SwinTransformerBlockV2|Bottleneck|CNBlock|_DenseLayer|Fire"
    "|(Fused)?MBConv|Inception[A-E]?|_?InvertedResidual|MaxVitLayer"
)
"""torchvision's classes of blocks."""


def heads_of(network: nn.Module) -> list[str]:
    """Return the name of the head: of the last linear layer or convolution, which gives the logits.

    Some networks of timm have two heads, for distillation.
    """
    names = heads_of_timm(network) if is_timm(network) else []
    return names or [name for name, module in modules_of(network) if isinstance(module, nn.Linear | nn.Conv2d)][-1:]


def stages_of(network: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each stage, counted from the input.

    Example:
        >>> from torchvision.models import resnet18
        >>> [len(stage) for stage in stages_of(resnet18())]
        [15, 15, 15, 15]
    """
    if is_timm(network):
        return stages_of_timm(network, heads_of(network))
    begins = _BEGINS.get(type(network).__module__.removeprefix("torchvision.models."), "")
    pattern = begins if isinstance(begins, str) else "|".join(map(re.escape, begins(network)))
    head = heads_of(network)[0].partition(".")[0]
    stages: list[list[str]] = [[]]
    begun: set[str] = set()
    for name, _ in network.named_parameters():
        if name.partition(".")[0] == head:
            continue
        first = re.match(rf"({pattern})\.", name) if pattern else None
        if first and first[0] not in begun:
            begun.add(first[0])
            stages.append([])
        stages[-1].append(name)
    return stages


def blocks_of(network: nn.Module) -> list[str]:
    """Return the names of the blocks of a network of torchvision, such as residual blocks; none if it is a plain stack."""
    found: list[str] = []
    for name, module in modules_of(network):
        inside = found and name.startswith(f"{found[-1]}.")  # a MaxVitLayer holds an MBConv
        if name and not inside and _BLOCK.fullmatch(type(module).__name__):
            found.append(name)
    return found


def layers_of(network: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each layer from the input, in the sense of layer-wise decay; the head is the last.

    For timm, the groups of timm. For torchvision, the stem, then the blocks (or convolutions, if there are none). What leads into
    a stage belongs to its first block, and what follows a block to that block.

    Example:
        >>> from torchvision.models import resnet18
        >>> [len(layer) for layer in layers_of(resnet18())]
        [3, 6, 6, 9, 6, 9, 6, 9, 6, 2]
    """
    if is_timm(network):
        return layers_of_timm(network)
    units = blocks_of(network) or [name for name, module in modules_of(network) if isinstance(module, nn.Conv2d)]
    unit_of = {f"{unit}.{name}": unit for unit in units for name, _ in network.get_submodule(unit).named_parameters()}
    layers: list[list[str]] = []
    stages = stages_of(network)
    for number, stage in enumerate(stages):
        # The stem is a layer of its own.
        unit = next((unit_of[name] for name in stage if name in unit_of), "") if number else ""
        homes = [(unit := unit_of.get(name, unit), name) for name in stage]
        layers += [[name for _, name in group] for _, group in groupby(homes, lambda home: home[0])]
    inside = {name for stage in stages for name in stage}
    return [*layers, [name for name, _ in network.named_parameters() if name not in inside]]


def freeze_stages(network: nn.Module, stages: int) -> None:
    """Exclude the parameters of the first `stages` stages from training. Raises ArgumentError if there are fewer stages."""
    for name in _frozen(network, stages):
        network.get_parameter(name).requires_grad_(False)


def train_mode(network: nn.Module, freeze: int) -> None:
    """Switch to training mode, but keep the batch norms and dropout of frozen stages in evaluation mode."""
    network.train()
    for module in frozen_modules(network, freeze):
        module.eval()


def frozen_modules(network: nn.Module, stages: int) -> Iterator[nn.Module]:
    """Yield the largest modules of which all parameters are in the first `stages` stages."""
    yield from _within(network, _frozen(network, stages), "")


def _within(module: nn.Module, names: set[str], prefix: str) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        inside = {f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()}
        if inside and inside <= names:
            yield child
        elif inside & names:
            yield from _within(child, names, f"{prefix}{name}.")


def _frozen(network: nn.Module, stages: int) -> set[str]:
    if not stages:
        return set()
    known = stages_of(network)
    if stages > len(known):
        raise ArgumentError(f"freeze must be at most {len(known)} (the stages of this backbone), got {stages}.")
    return {name for stage in known[:stages] for name in stage}
