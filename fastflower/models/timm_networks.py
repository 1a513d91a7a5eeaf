"""Networks of timm: building them, their heads and their stages. timm is imported when the first one is built."""

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from types import ModuleType
from typing import cast

from torch import nn

from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models.weights_file import OFFLINE

PREFIX = "timm/"

# Layers after the pooling, which belong to the head. In an EfficientNet, conv_head comes before the pooling.
_AFTER_POOLING = re.compile(r"(conv_head|norm_head|pre_logits|fc_norm)\.")
# For the few networks that do not say how their parameters are grouped.
_MATCHER = {
    "stem": r"^(?:stem|patch_embed|conv1|bn1)\b",
    "blocks": r"^(?:stages|layers|blocks|network|features)\.(\d+)",
}


def modules_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules of a network with their names."""
    return cast("Iterator[tuple[str, nn.Module]]", network.named_modules())


def is_timm(network: nn.Module) -> bool:
    """Return whether a network is one of timm's."""
    return type(network).__module__.startswith("timm.")


def library(name: str) -> ModuleType:
    """Import timm for the backbone `name`. Raises ArgumentError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise ArgumentError(f"backbone={name!r} needs the package timm; run pip install 'fastflower[timm]'.") from None
    return timm


def create(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    size: tuple[int, int] | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Build `timm/NAME` with a head for `num_classes` classes, with timm's weights if `pretrained`.

    size  Height and width of the images, for a network that is built for one size. Positions are resampled to it.
    drop_path  timm's drop_path_rate; None: that of the network. A TypeError tells that it has none.

    Raises ArgumentError if timm is not installed or has no such network, and CheckpointError if it has no weights for it or
    they cannot be downloaded.
    """
    timm, plain = library(name), name.removeprefix(PREFIX)
    family = plain.partition(".")[0]
    if not timm.is_model(family):
        names: list[str] = timm.list_models()
        near = "".join(f" Did you mean {PREFIX}{one}?" for one in get_close_matches(family, names, 1))
        raise ArgumentError(f"backbone: timm has no network {plain!r}; fastflower backbones 'timm/*' lists all.{near}")
    tags: list[str] = timm.list_pretrained(f"{family}.*") or timm.list_pretrained(family)
    if ("." in plain and plain not in tags) or (pretrained and not tags):
        known = ", ".join(f"{PREFIX}{one}" for one in tags) or "none"
        raise CheckpointError(
            f"backbone={name!r}: timm's weights for {family} are {known}; pass one of these as backbone, or a file "
            f"(--weights FILE) or None as weights."
        )
    try:
        options = {"pretrained": pretrained, "num_classes": num_classes, "drop_path_rate": drop_path}
        return _sized(timm.create_model, plain, size, **options)  # timm leaves out what is None
    except Exception as error:  # of huggingface_hub and what it uses
        if not pretrained or "drop_path_rate" in str(error):
            raise
        raise CheckpointError(
            f"weights: timm's weights for {name} could not be downloaded ({str(error).strip().splitlines()[0]}). {OFFLINE}"
        ) from error


def _sized(make: Callable[..., nn.Module], name: str, size: tuple[int, int] | None, **options: object) -> nn.Module:
    """Build a network for images of `size` if it is made for one size, and timm can build it for others."""
    from timm.models import get_pretrained_cfg

    native = get_pretrained_cfg(name)
    if size and native and native.fixed_input_size and native.input_size[1:] != size:
        try:
            return make(name, img_size=size, **options)
        except (TypeError, AssertionError):  # its class does not take img_size, or not this one
            pass
    return make(name, **options)


def heads_of_timm(network: nn.Module) -> list[str]:
    """Return the names that timm gives for the layers that give the logits: two in networks for distillation, or none."""
    names: str | tuple[str, ...] | None = vars(network)["pretrained_cfg"].get("classifier")
    return [names] if isinstance(names, str) else list(names or ())


def stages_of_timm(network: nn.Module, heads: list[str]) -> list[list[str]]:
    """Return the names of the parameters of each stage, from the groups that timm defines."""
    groups = _groups(network, coarse=True)
    tops = tuple(f"{name.partition('.')[0]}." for name in heads)
    *groups, rest = groups  # the last group holds all others: the head, but sometimes also the last norm
    rest = [name for name in rest if not name.startswith(tops) and not _AFTER_POOLING.match(name)]
    if groups:
        groups[-1] = [*groups[-1], *rest]
    else:
        groups = [rest]
    ends = _ends(network, groups)
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [[name for group in groups[start:end] for name in group] for start, end in spans]


def layers_of_timm(network: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each layer, as timm's param_groups_layer_decay groups them; the head is last."""
    return _groups(network, coarse=False)


def _groups(network: nn.Module, *, coarse: bool) -> list[list[str]]:
    """Return the groups of parameters that timm defines, from the input. The last one holds all others."""
    grouped = cast("Callable[..., dict[str, str]] | None", getattr(network, "group_matcher", None))
    matcher = grouped(coarse=coarse) if grouped else _MATCHER
    by_number: dict[int, list[str]] = library(PREFIX).models.group_parameters(network, matcher)
    return [by_number[number] for number in sorted(by_number)]


def _ends(network: nn.Module, groups: list[list[str]]) -> list[int]:
    """Return the number of groups up to the end of each stage. The first group is the stem."""
    count = len(groups)
    if count <= 5:
        return [*range(2, count), count]
    ends: dict[int, int] = {}
    for module, reduction in _resolutions(network):
        inside = [number for number, names in enumerate(groups) if any(name.startswith(f"{module}.") for name in names)]
        ends[reduction] = max(inside, default=_before(network, module, groups)) + 1
    if len(ends) < 3:  # one resolution
        return [1 + (count - 1) * quarter // 4 for quarter in (1, 2, 3, 4)]
    cuts = sorted({end for reduction, end in ends.items() if end > 1 or reduction == 1} - {count})
    return [*cuts, count]


def _resolutions(network: nn.Module) -> list[tuple[str, int]]:
    """Return the layers at which timm takes features, with the factor by which each is smaller than the image."""
    info = vars(network).get("feature_info", ())
    return [(each["module"], each["reduction"]) for each in getattr(info, "info", info) or ()]


def _before(network: nn.Module, module: str, groups: list[list[str]]) -> int:
    """Return the group of the last parameter before a module that has none, such as an activation."""
    place = {name: number for number, names in enumerate(groups) for name in names}
    last = 0
    for name, each in modules_of(network):
        if name == module:
            break
        for parameter, _ in each.named_parameters(prefix=name, recurse=False):
            last = place.get(parameter, last)
    return last


def native_size(network: nn.Module) -> int:
    """Return the side of the images that a network is built for."""
    size: tuple[int, int] | None = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return (size or vars(network)["pretrained_cfg"]["input_size"][1:])[0]
