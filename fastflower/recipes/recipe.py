"""How to train: a frozen value, which gives the learning rate of each step. Derive one with `dataclasses.replace`."""

from dataclasses import asdict, dataclass, field, replace
from math import cos, pi
from typing import Any, Literal, Self, get_args

from fastflower.draws.augment import Augment
from fastflower.errors import make_plain, require

Schedule = Literal["constant", "step", "cosine", "one_cycle", "exponential_cosine", "three_phase"]
Precision = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run. Raises ArgumentError naming the field and its rule."""

    backbone: str = "resnet18"
    """A torchvision classifier: resnet18, 34, 50, 101, 152; densenet121, 161, 169, 201; vgg11, 13, 16, 19 (also _bn); or
    resnet50_v1, 101_v1, 152_v1, for weights of Caffe or Keras, whose 1x1 convolutions halve the size."""
    weights: str | None = "DEFAULT"
    """Where training starts: torchvision's name of pretrained weights (downloaded); the path of a state_dict or checkpoint, or
    its address as https://HOST/FILE#sha256=CHECKSUM; None: scratch."""
    freeze: int = 0
    """Stages, from the input, whose weights and batch norms stay as they are; the stem counts with the first; 0 without
    weights."""
    augment: Augment = field(default_factory=lambda: Augment(crop=(0.08, 1.0), flip=0.5))
    """What is drawn for training images; validation uses its size, resize and normalization."""
    sizes: tuple[int, ...] = ()
    """Progressive resizing: heights of training images, each for an equal part of the epochs; (): augment's size in all."""
    epochs: int = 15
    patience: int | None = None
    """Stop after so many epochs without a better one: a higher validation accuracy, or an equal one at a lower loss."""
    batch_size: int = 32
    """Samples a step, over all ranks."""
    balanced: bool = False
    """Draw all classes equally often, however many samples they have; an epoch then is not exact."""
    lr: float = 0.001
    """Learning rate at the schedule's peak."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    """Of SGD; Adam's first beta."""
    weight_decay: float = 0.0
    """Of weights; norms and biases do not decay. "adamw" takes it apart from the gradient, the others add it to that."""
    clip_norm: float | None = None
    """Gradients of a greater norm, over all parameters, are scaled down to it."""
    accumulate: int = 1
    """Batches whose gradients are averaged before each update; the last update of an epoch may have fewer."""
    ema: float | None = None
    """Decay a step of averaged weights, which then are what is validated and kept; a short run averages over less."""
    soup: int = 1
    """Trainings from the same weights, each an equal part of the epochs with its own draws; their weights are averaged (Wortsman
    et al. 2022, "Model soups"); for pretrained weights only: trainings from random ones have no useful mean."""
    recalibrate: bool = False
    """Compute batch norms' statistics anew at the end of a training, from 20 batches of training images as validation views
    them: for sizes that end elsewhere (Touvron et al. 2019) and for averaged weights (Izmailov et al. 2018)."""
    schedule: Schedule = "step"
    """How the rate goes over the epochs, see `Recipe.multiplier`; "three_phase" resumes older runs of report E."""
    warmup_epochs: float = 0.0
    """Over which the rate rises evenly to what the schedule says, from a hundredth of it; one_cycle warms up itself."""
    step_epochs: int = 7
    """With "step": epochs between two reductions."""
    gamma: float = 0.1
    """With "step": the factor of each reduction; with "exponential_cosine" (and "three_phase"): of each epoch of its decay."""
    label_smoothing: float = 0.0
    """Probability spread over all classes, [0, 1)."""
    precision: Precision = "auto"
    """Of autocast; float16 scales the loss; float32 switches autocast off; "auto": the fastest of these that keeps accuracy
    where it runs: bfloat16 where the device computes in it, float16 on CUDA otherwise, float32 on other processors."""
    compile: bool = False
    """torch.compile, with CUDA graphs on CUDA: for small batches there; on two cores it did not pay (docs/log.md)."""
    graph: bool = True
    """CUDA graphs: a step is recorded once for each size and replayed; ignored on the CPU, on several ranks, and with accumulate,
    compile or float16."""
    sync_batchnorm: bool = False
    """Batch norms of all ranks together (SyncBatchNorm): CUDA only."""
    tta: bool = False
    """Test-time augmentation: score and predict by the mean probabilities of each image and its mirror image."""
    seed: int = 0
    """Of the head's weights, the order, the draws and dropout."""

    def __post_init__(self) -> None:
        make_plain(self)
        rules = [
            ("freeze", self.freeze >= 0, "0 or more"),
            ("sizes", all(side >= 1 for side in self.sizes), "numbers of pixels, at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("optimizer", self.optimizer in ("sgd", "adam", "adamw"), "sgd, adam or adamw"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0"),
            ("ema", self.ema is None or 0 < self.ema < 1, "in (0, 1)"),
            ("soup", self.soup >= 1 and self.epochs % self.soup == 0, "a divisor of epochs"),
            ("soup", self.soup == 1 or (self.ema is None and self.patience is None), "1 with ema or patience"),
            ("recalibrate", not self.recalibrate or self.patience is None, "False with patience"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("warmup_epochs", self.warmup_epochs >= 0, "0 or more"),
            ("warmup_epochs", self.warmup_epochs == 0 or self.schedule != "one_cycle", "0 with one_cycle"),
            ("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            ("step_epochs", self.step_epochs >= 1, "at least 1"),
            ("gamma", self.gamma > 0, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("precision", self.precision in get_args(Precision), "auto, bfloat16, float16 or float32"),
        ]
        for name, holds, rule in rules:
            require(holds, f"Recipe.{name}", rule, getattr(self, name))

    @property
    def epochs_per_training(self) -> int:
        """Of each training of the soup: schedule and sizes go over these."""
        return self.epochs // self.soup

    def augment_at(self, epoch: int) -> Augment:
        """`augment` at the size that an epoch, counted from 0, is trained at."""
        if not self.sizes:
            return self.augment
        epochs_seen = min(epoch, self.epochs - 1) % self.epochs_per_training + 1  # with this one
        # Rounded up, so that the last epoch has the last size.
        stage = -(-epochs_seen * len(self.sizes) // self.epochs_per_training)
        factor = self.sizes[stage - 1] / self.augment.output_size[0]
        resize = self.augment.resize and _scaled(self.augment.resize, factor)
        return replace(self.augment, size=_scaled(self.augment.size, factor), resize=resize)

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs; each training of a soup has the whole schedule."""
        step %= self.epochs_per_training * steps_per_epoch
        scheduled = self.multiplier(step, steps_per_epoch)
        return self.lr * scheduled * warm_up(step, self.warmup_epochs * steps_per_epoch)

    def multiplier(self, step: int, steps_per_epoch: int) -> float:
        """What lr is multiplied by in a step of one training, counted from 0; the warm-up comes on top.

        "constant": 1. "step": gamma ** (epoch // step_epochs), torch's StepLR. "cosine": from 1 down to 0, torch's
        CosineAnnealingLR over all steps. "one_cycle": up to 1 and down again, torch's OneCycleLR (cosine, two phases, Smith
        and Topin 2018). "exponential_cosine": 1 until the warm-up ends, then gamma to the power of the epochs since, fractions
        counted (torch's ExponentialLR, by steps), until half of the steps; then half a cosine from there to 0. "three_phase":
        the same, but the epochs of the warm-up count too, so that the peak is never reached; for checkpoints that were
        trained with it.
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
        peak = 0.3 * total_steps - 1  # the 0.3, 25 and 25e4 are defaults of OneCycleLR
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, (step - peak) / max(1e-9, total_steps - 1 - peak))

    @property
    def resolved(self) -> "Recipe":
        """With the numbers that None stands for: recipes that are equal then train the same."""
        return replace(self, augment=replace(self.augment, resize=self.augment.resized))

    def differences(self, other: "Recipe") -> str:
        """What another recipe has otherwise, field by field."""
        mine, theirs = self.resolved.to_dict(), other.resolved.to_dict()
        for values in (mine, theirs):
            values |= {f"augment.{name}": value for name, value in values.pop("augment").items()}
        changed = (f"{name} {theirs[name]!r} (now {value!r})" for name, value in mine.items() if value != theirs[name])
        return ", ".join(changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and benchmark records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe that `to_dict` described; lists, as JSON gives them, count as tuples."""
        others = {name: value for name, value in values.items() if name != "augment"}
        return cls(augment=Augment(**values["augment"]), **others)


def warm_up(step: int, warmup_steps: float) -> float:
    """The share of the scheduled rate in a linear warm-up: torch's LinearLR from 0.01 to 1 over `warmup_steps`."""
    return 1.0 if step >= warmup_steps else 0.01 + 0.99 * step / warmup_steps


def _cosine(start: float, stop: float, share: float) -> float:
    return stop + (start - stop) * (1 + cos(pi * min(1.0, share))) / 2


def _scaled(pixels: int | tuple[int, int], factor: float) -> int | tuple[int, int]:
    height, width = pixels if isinstance(pixels, tuple) else (pixels, pixels)
    height, width = max(1, round(factor * height)), max(1, round(factor * width))
    return (height, width) if isinstance(pixels, tuple) else height
