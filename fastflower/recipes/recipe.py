"""`Recipe`: the hyperparameters of a training run. A recipe is frozen; use `dataclasses.replace` to change a field."""

from dataclasses import asdict, dataclass, field, replace
from math import cos, pi
from typing import Any, Literal, Self

from fastflower.draws.augment import Augment
from fastflower.draws.torchvision_steps import is_transform
from fastflower.errors import ArgumentError, Rules, check_fields, require, shown
from fastflower.suggestions import fields_by_name

Schedule = Literal["constant", "step", "cosine", "one_cycle", "exponential_cosine", "three_phase"]
Precision = Literal["auto", "bfloat16", "float16", "float32"]


@fields_by_name
@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Hyperparameters of a training run. Raises ArgumentError with the field's name and rule if a value is invalid."""

    backbone: str = "resnet18"
    """Network: a classifier of torchvision, or timm/NAME; `fastflower backbones 'resnet*'` lists those that match.
    For Caffe or Keras weights: resnet50_v1, 101_v1, 152_v1, with the stride in 1x1 convolutions [He et al. 2016]."""
    weights: str | None = "DEFAULT"
    """Initial weights: a torchvision name or DEFAULT (downloaded), or the path or URL of a file with weights, of any program
    (https://HOST/FILE#sha256=CHECKSUM), or the folder of a run. None: random weights."""
    freeze: int | None = 0
    """Number of frozen stages, counted from the input. Their weights and batch norm statistics do not change.
    The stem belongs to the first stage. 0: train all stages; required if `weights` is None.
    None: the first half of the backbone's stages, or 0 if `weights` is None."""
    augment: Augment = field(default_factory=lambda: Augment(crop=(0.08, 1.0), flip=0.5))
    """Augmentation of training images, also as a torchvision transform. Validation uses only its size, resize and normalization.
    Of these four, `train` takes what is left out (None) from the pretrained weights."""
    sizes: tuple[int | float, ...] = ()
    """Progressive resizing: heights of training images in pixels, each used for an equal share of the epochs. Numbers up
    to 1 are fractions of `augment.size`, which `train` rounds to multiples of 16 pixels and to sizes that the backbone takes.
    Empty: `augment.size` in all epochs."""
    epochs: int = 15
    """Number of passes over the training images, at least 1."""
    patience: int | None = None
    """Stop after this many epochs without improvement. An improvement is a higher validation accuracy,
    or the same accuracy with a lower loss. None: train all epochs."""
    batch_size: int = 32
    """Number of samples per step over all ranks, where `Loader(batch_size=)` is that of one rank."""
    balanced: bool = False
    """Draw all classes equally often. Within an epoch, samples of rare classes repeat, and some others are skipped."""
    lr: float = 0.001
    """Peak learning rate of the schedule, above 0."""
    layer_decay: float | None = None
    """Layer-wise decay of the learning rate, in (0, 1]: a layer with N layers above it has lr * layer_decay ** N, and
    the head has lr [Clark et al. 2020; as in BEiT, MAE and timm]. Layers are blocks and the stem. None: lr for all layers."""
    head_lr: float | None = None
    """Peak learning rate of the head, the last layer, above 0. The schedule applies to it too. None: lr."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer from torch.optim: SGD with momentum, Adam or AdamW."""
    momentum: float = 0.9
    """Momentum of SGD, or beta1 of Adam and AdamW, in [0, 1)."""
    weight_decay: float = 0.0
    """Weight decay. Normalization layers and biases are exempt. 0 disables it.
    "adamw" decouples it from the gradient [Loshchilov and Hutter 2019]; the others add it to the gradient."""
    clip_norm: float | None = None
    """Maximum gradient norm over all parameters. Larger gradients are scaled down to it. None disables clipping."""
    accumulate: int = 1
    """Number of batches to average gradients over before each update. The last update of an epoch may use fewer.
    1 disables accumulation."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, in (0, 1). Early steps use a smaller decay.
    The averaged weights are validated and saved. None disables averaging."""
    soup: int = 1
    """Split the epochs into this many runs from the same weights and average the results [Wortsman et al. 2022].
    Must divide `epochs`. Use it only with pretrained weights: averages of runs from random weights are useless.
    1: a single run."""
    recalibrate: bool = False
    """Recompute the statistics of unfrozen batch norms at the end of each run, from 20 training batches
    in the validation view. Use it if `sizes` ends far from the validation size [Touvron et al. 2019],
    or with `ema` or `soup` [Izmailov et al. 2018]."""
    schedule: Schedule = "step"
    """Learning rate schedule; see `Recipe.multiplier`. Use "three_phase" only to resume older runs of report E."""
    warmup_epochs: float = 0.0
    """Number of epochs of linear warm-up, from 1% to 100% of the scheduled learning rate.
    0 disables it; must be 0 with "one_cycle"."""
    step_epochs: int = 7
    """Number of epochs between learning rate drops with schedule "step"."""
    gamma: float = 0.1
    """Factor of each drop with "step", or of each epoch's decay with "exponential_cosine" and "three_phase"."""
    label_smoothing: float = 0.0
    """Target probability to spread evenly over all classes, in [0, 1). 0 disables it [Szegedy et al. 2016]."""
    drop_path: float | None = None
    """Stochastic depth: probability that a sample skips the last block, in [0, 1) [Huang et al. 2016]. It grows linearly from 0
    at the first block. None: the backbone's own. Only for backbones that have it, such as convnext_tiny."""
    precision: Precision = "auto"
    """dtype of autocast. float16 also scales the loss; float32 disables autocast.
    "auto": bfloat16 if the device supports it natively, else float16 on CUDA and float32 on the CPU."""
    checkpointing: bool = False
    """Gradient checkpointing: keep only the inputs of blocks for the backward pass and compute the rest again [Chen et al. 2016].
    Takes less memory and more time, with the same results. Only for backbones with blocks; must be False with `compile`."""
    compile: bool = False
    """Use torch.compile (with CUDA graphs on CUDA). Helps with small batches. It was no faster on a two-core CPU."""
    graph: bool = True
    """Capture the training step as a CUDA graph, once per image size, and replay it.
    Ignored on the CPU, with multiple ranks, and with accumulate, checkpointing, compile or float16."""
    sync_batchnorm: bool = False
    """Compute batch norm statistics across all ranks [SyncBatchNorm]. CUDA only."""
    tta: bool = False
    """Test-time augmentation: average the probabilities of each image and its horizontal flip."""
    seed: int = 0
    """Random seed for the classifier head, sample order, augmentation and dropout."""

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        if is_transform(self.augment):
            try:
                object.__setattr__(self, "augment", Augment.from_torchvision(self.augment))
            except ArgumentError as error:
                raise ArgumentError(f"Recipe.augment: {error}") from None
        check_fields(self, _RULES)
        sizes = (int(size) if size > 1 else size for size in self.sizes)
        object.__setattr__(self, "sizes", tuple(sizes))
        alone, one_cycle = self.ema is None and self.patience is None, self.schedule == "one_cycle"
        rules = [
            ("soup", self.epochs % self.soup == 0, "a divisor of epochs"),
            ("soup", self.soup == 1 or alone, "1 if ema or patience is set"),
            ("recalibrate", not self.recalibrate or self.patience is None, "False if patience is set"),
            ("checkpointing", not self.checkpointing or not self.compile, "False if compile is True"),
            ("warmup_epochs", self.warmup_epochs == 0 or not one_cycle, "0 if schedule is one_cycle"),
        ]
        for name, holds, rule in rules:
            require(holds, f"Recipe.{name}", rule, getattr(self, name))

    @property
    def epochs_per_training(self) -> int:
        """Number of epochs in each run of the model soup. `schedule` and `sizes` span one run."""
        return self.epochs // self.soup

    def augment_at(self, epoch: int) -> Augment:
        """Return `augment` at the training size of an epoch, counted from 0."""
        if not self.sizes:
            return self.augment
        epochs_seen = min(epoch, self.epochs - 1) % self.epochs_per_training + 1  # including this one
        # Round up, so the last epoch has the last size.
        stage = -(-epochs_seen * len(self.sizes) // self.epochs_per_training)
        size, resize = self.sizes[stage - 1], self.augment.resize
        factor = size if size <= 1 else size / self.augment.output_size[0]
        if resize is not None and resize != "off":
            resize = _scaled(resize, factor)
        return replace(self.augment, size=_scaled(self.augment.resolved_size, factor), resize=resize)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at a step, counted from 0 over all epochs. Each soup run restarts the schedule."""
        step %= self.epochs_per_training * steps_per_epoch
        scheduled = self.multiplier(step, steps_per_epoch)
        return self.lr * scheduled * warm_up(step, self.warmup_epochs * steps_per_epoch)

    def multiplier(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor by which the schedule multiplies `lr`, without the warm-up. Steps count from 0 in each run.

        "constant": 1.
        "step": gamma ** (epoch // step_epochs), torch's StepLR.
        "cosine": from 1 down to 0 over all steps, torch's CosineAnnealingLR.
        "one_cycle": up to 1 and down again, torch's OneCycleLR (cosine, two phases; Smith and Topin 2018).
        "exponential_cosine": 1 during the warm-up. Then gamma ** (fractional epochs since the warm-up), like torch's
        ExponentialLR but per step, until half of all steps are done. Then half a cosine down to 0.
        "three_phase": the same, but the decay also counts the warm-up epochs, so the rate never reaches the peak.
        Only for checkpoints that were trained with this schedule.
        """
        total_steps = self.epochs_per_training * steps_per_epoch
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return self.gamma ** (step // steps_per_epoch // self.step_epochs)
        if self.schedule == "cosine":
            return (1 + cos(pi * step / total_steps)) / 2
        if self.schedule in ("exponential_cosine", "three_phase"):
            warm = self.warmup_epochs * steps_per_epoch if self.schedule == "exponential_cosine" else 0.0
            turn = max(warm, total_steps / 2)
            decayed = self.gamma ** (max(0.0, min(step, turn) - warm) / steps_per_epoch)
            return decayed if step <= turn else _cosine(decayed, 0.0, (step - turn) / (total_steps - turn))
        peak = 0.3 * total_steps - 1  # 0.3, 25 and 25e4 are OneCycleLR's defaults
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, (step - peak) / max(1e-9, total_steps - 1 - peak))

    @property
    def resolved(self) -> "Recipe":
        """The recipe with the view of images written out, with the defaults of a Loader where it is left out.

        Two recipes train identically if their resolved recipes are equal.
        """
        return replace(self, augment=self.augment.resolved)

    def differences(self, other: "Recipe") -> str:
        """Return the fields in which another recipe differs, as text: NAME OTHER_VALUE (now VALUE), ..."""
        mine, theirs = self.resolved.to_dict(), other.resolved.to_dict()
        for values in (mine, theirs):
            values |= {f"augment.{name}": value for name, value in values.pop("augment").items()}
        changed = (f"{name} {theirs[name]!r} (now {value!r})" for name, value in mine.items() if value != theirs[name])
        return ", ".join(changed)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of plain values, for checkpoints and benchmark records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a recipe from a dictionary that `to_dict` returned. Lists (from JSON) become tuples."""
        others = {name: value for name, value in values.items() if name != "augment"}
        return cls(augment=Augment(**values["augment"]), **others)


_RULES: Rules = {
    "weights": ("a string or None", lambda _: True),
    "augment": ("an Augment, or a torchvision transform", lambda _: True),
    "sizes": (
        "sizes in pixels, or fractions of the size above 0 and up to 1",
        lambda sizes: all(0 < size <= 1 or (size > 1 and size == int(size)) for size in sizes),
    ),
    "freeze": ("an integer, at least 0", lambda count: count >= 0),
    **{
        name: ("an integer, at least 1", lambda count: count >= 1)
        for name in ("epochs", "patience", "batch_size", "accumulate", "step_epochs", "soup")
    },
    **{name: ("a number above 0", lambda size: size > 0) for name in ("lr", "head_lr", "clip_norm", "gamma")},
    **{name: ("a number, 0 or more", lambda size: size >= 0) for name in ("weight_decay", "warmup_epochs")},
    **{
        name: ("a number in [0, 1)", lambda share: 0 <= share < 1)
        for name in ("momentum", "label_smoothing", "drop_path")
    },
    "layer_decay": ("a number in (0, 1]", lambda decay: 0 < decay <= 1),
    "ema": ("a number in (0, 1)", lambda decay: 0 < decay < 1),
}


def warm_up(step: int, warmup_steps: float) -> float:
    """Return the factor of a linear warm-up: torch's LinearLR from 0.01 to 1 over `warmup_steps`."""
    return 1.0 if step >= warmup_steps else 0.01 + 0.99 * step / warmup_steps


def _cosine(start: float, stop: float, share: float) -> float:
    return stop + (start - stop) * (1 + cos(pi * min(1.0, share))) / 2


def _scaled(pixels: int | tuple[int, int], factor: float) -> int | tuple[int, int]:
    height, width = pixels if isinstance(pixels, tuple) else (pixels, pixels)
    height, width = max(1, round(factor * height)), max(1, round(factor * width))
    return (height, width) if isinstance(pixels, tuple) else height
