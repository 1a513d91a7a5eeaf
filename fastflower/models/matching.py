"""Finds a network's weights among the tensors of a file, whatever program wrote it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from fastflower.models.weights_file import not_finite

# Which of several networks in a file to take: an average of the weights first, and the one it follows last.
_FIRST = re.compile(r"(?<![a-z])ema(?![a-z])|averag|swa_|teacher")
_LAST = re.compile(r"student|momentum|target|encoder_k|key_encoder|current_model")

# torchvision's DenseNet files spell norm1 as norm.1.
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


@dataclass(frozen=True)
class Match:
    """Where a file holds a network's weights."""

    own: dict[str, Tensor]
    """The network's state_dict."""
    heads: tuple[str, ...]
    """The names of the network's heads, each with a dot."""
    tensors: dict[str, Tensor]
    """The tensors of the file."""
    names: dict[str, str]
    """The network's names and their spelling in the file, without the prefix."""
    prefix: str
    """What stands before the spelled names in the file."""
    others: tuple[str, ...] = ()
    """Prefixes of equally complete networks that were not taken."""

    def get(self, name: str) -> Tensor | None:
        """Return the file's tensor for a name in the network, or None."""
        return self.tensors.get(self.prefix + self.names[name])

    @cached_property
    def body(self) -> list[str]:
        """Names of the tensors that the file must have. Some programs write no batch norm counters, or of shape (1,)."""
        names = self.names.keys()
        return [name for name in names if not name.startswith(self.heads) and not name.endswith("num_batches_tracked")]

    @cached_property
    def fitting(self) -> dict[str, Tensor]:
        """The file's tensors that fit the body, by their names in the network."""
        found = {name: self.get(name) for name in self.body}
        return {
            name: value for name, value in found.items() if value is not None and value.shape == self.own[name].shape
        }

    @cached_property
    def extra(self) -> list[str]:
        """Names in the file of tensors that nothing takes, except those of `others`."""
        used = {self.prefix + spelled for spelled in self.names.values()}
        return [name for name in self.tensors if name not in used and not name.startswith(self.others)]

    @cached_property
    def problems(self) -> list[str]:
        """What does not fit: missing tensors, other shapes, and layers that the network does not have."""
        wrong: list[str] = []
        for name in self.body:
            value, shape = self.get(name), tuple(self.own[name].shape)
            if value is None:
                wrong.append(f"{name} {shape} is missing")
            elif name not in self.fitting:
                wrong.append(f"{name} is {tuple(value.shape)} instead of {shape}")
        # ResNet-34 has every name of ResNet-18. Layers with other names are heads, such as those of self-supervised training.
        layers = {spelled.partition(".")[0] for name, spelled in self.names.items() if name in self.body}
        heads = tuple(self.prefix + self.names[f"{head}weight"].removesuffix("weight") for head in self.heads)
        for name in self.extra:
            place = name.removeprefix(self.prefix)
            inside = name.startswith(self.prefix) and not name.startswith(heads)
            if inside and place.partition(".")[0] in layers:
                wrong.append(f"{place} {tuple(self.tensors[name].shape)} is unexpected")
        return wrong

    def __str__(self) -> str:
        """Describe for the log what was taken and what was left out."""
        taken = f" from {self.prefix}*" if self.prefix else ""
        taken += f" (not from {', '.join(f'{prefix}*' for prefix in self.others)})" if self.others else ""
        more = f" and {len(self.extra) - 1} more" if len(self.extra) > 1 else ""
        return f"{taken}; left out {self.extra[0]}{more}" if self.extra else taken


def match(network: nn.Module, heads: Iterable[str], tensors: dict[str, Tensor]) -> Match:
    """Return the place in a file that fits a network best. Its `problems` are empty if the weights fit."""
    tensors = {_DOTTED.sub(r"\1", name): value for name, value in tensors.items()}
    found = list(_candidates(network, tuple(f"{head}." for head in heads), tensors))
    most = max(len(one.fitting) for one in found)
    best = sorted((one for one in found if len(one.fitting) == most), key=lambda one: _rank(one.prefix))
    others = tuple(dict.fromkeys(one.prefix for one in best[1:] if most and one.prefix != best[0].prefix))
    return Match(best[0].own, best[0].heads, tensors, best[0].names, best[0].prefix, others)


def _candidates(network: nn.Module, heads: tuple[str, ...], tensors: dict[str, Tensor]) -> Iterator[Match]:
    """Yield the places in a file where a network's tensors may be, and at least one."""
    own = network.state_dict()
    number = {name: str(count) for count, (name, _) in enumerate(network.named_children())}
    numbered = {name: ".".join([number.get(top, top), *rest]) for name in own for top, *rest in [name.split(".")]}
    for names in ({name: name for name in own}, numbered):  # numbered: nn.Sequential(*network.children())
        first = Match(own, heads, tensors, names, "")
        ends = {names[first.body[0]], names[first.body[-1]]}
        prefixes = {name.removesuffix(end) for name in tensors for end in ends if f".{name}".endswith(f".{end}")}
        yield from (Match(own, heads, tensors, names, prefix) for prefix in dict.fromkeys(["", *sorted(prefixes)]))


def _rank(prefix: str) -> int:
    return 0 if _FIRST.search(prefix) else 2 if _LAST.search(prefix) else 1


def broken(found: Match) -> str:
    """Describe which of the matched tensors contain inf or NaN; return "" if all are finite."""
    return not_finite({found.names[name]: value for name, value in found.fitting.items()})
