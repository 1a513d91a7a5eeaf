"""How to train: a frozen value, and presets as functions. Derive one with `dataclasses.replace`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from fastflower.augment import Augment
from fastflower.errors import ArgumentError
from fastflower.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training run. Raises ArgumentError naming the field and its rule."""

    backbone: str = "resnet18"
    """A torchvision classifier: resnet18, 34, 50, 101, 152; densenet121, 161, 169, 201; vgg11, 13, 16, 19 (also _bn)."""
    weights: str | None = "DEFAULT"
    """Where training starts: torchvision's name of pretrained weights (downloaded), the path of a state_dict, None: scratch."""
    freeze: int = 0
    """Stages, from the input, whose weights and batch norms stay as they are; the stem counts with the first."""
    augment: Augment = field(default_factory=lambda: Augment(crop=(0.08, 1.0), flip=0.5))
    """What is drawn for training images; validation uses its size, resize and normalisation."""
    epochs: int = 15
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
    schedule: Schedule = "step"
    warmup_epochs: float = 0.0
    """Over which the rate rises evenly to what the schedule says, from a hundredth of it; one_cycle warms up itself."""
    step_epochs: int = 7
    """With "step": epochs between two reductions."""
    gamma: float = 0.1
    """With "step": the factor of each reduction."""
    label_smoothing: float = 0.0
    """Probability spread over all classes, [0, 1)."""
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of autocast; float16 scales the loss; float32 switches autocast off."""
    seed: int = 0
    """Of the head's weights, the order, the draws and dropout."""

    def __post_init__(self) -> None:
        rules = [
            ("freeze", self.freeze >= 0, "0 or more"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("optimizer", self.optimizer in ("sgd", "adam", "adamw"), "sgd, adam or adamw"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            (
                "warmup_epochs",
                self.warmup_epochs == 0 or (self.warmup_epochs > 0 and self.schedule != "one_cycle"),
                "0 or more, and 0 with one_cycle",
            ),
            (
                "schedule",
                self.schedule in ("constant", "step", "cosine", "one_cycle"),
                "constant, step, cosine or one_cycle",
            ),
            ("step_epochs", self.step_epochs >= 1, "at least 1"),
            ("gamma", self.gamma > 0, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("precision", self.precision in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ArgumentError(f"Recipe.{name} must be {rule}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and benchmark records."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe that `to_dict` described; lists, as JSON gives them, count as tuples."""
        stored: dict[str, Any] = values["augment"]
        augment: dict[str, Any] = {name: _tuple(value) for name, value in stored.items()}
        fields: dict[str, Any] = {**values, "augment": Augment(**augment)}
        return cls(**fields)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def report_a() -> Recipe:
    """ResNet-18 as in the first student report: 15 epochs of SGD 0.9 at 0.001, StepLR(7, 0.1), batch 32.

    Its augmentations are resized crop, flip, rotation 10, jitter and affine. The report leaves open: the amounts of jitter
    and affine (here 0.2, hue 0.1 and a shift of 10%, as in the second report).
    """
    augment = Augment(
        crop=(0.08, 1.0),
        flip=0.5,
        rotate=10,
        translate=(0.1, 0.1),
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
    )
    return Recipe(augment=augment)


def report_b() -> Recipe:
    """As in the second student report: 20 epochs of SGD 0.9 at 0.001, StepLR(7, 0.1), batch 32.

    Resized crop, flip with probability 0.1, rotation 30, jitter 0.2 and hue 0.1, a shift of 10%. The report leaves open: the
    crop's scale (torchvision's 0.08 .. 1).
    """
    augment = replace(report_a().augment, flip=0.1, rotate=30)
    return replace(report_a(), augment=augment, epochs=20)


def report_b_batch64() -> Recipe:
    """The second report's comparison of batch sizes."""
    return replace(report_b(), batch_size=64)


def report_b_resnet34() -> Recipe:
    """The second report's comparison of networks."""
    return replace(report_b(), backbone="resnet34")


def report_c(batch_size: int = 32, backbone: str = "resnet18", freeze: int = 0) -> Recipe:
    """As in the third student report: SGD with a decaying rate; crop, flips both ways, jitter.

    The report leaves open: the amounts of jitter (here 0.2, hue 0.1), momentum, rate, schedule and epochs (here those of the
    first report).
    """
    augment = replace(report_a().augment, rotate=0.0, translate=(0.0, 0.0), flip_vertical=0.5)
    return Recipe(augment=augment, batch_size=batch_size, backbone=backbone, freeze=freeze)


def report_d() -> Recipe:
    """As in the fourth student report: ResNet-18, 25 epochs of Adam at 0.001, batch 32, a step schedule.

    Its second half, 25 more epochs at 0.0001, is not in it. The report leaves open: the step (here 7 epochs by 0.1, as in the
    first report) and the amounts of rotation, jitter and affine (those of the first report).
    """
    return replace(report_a(), optimizer="adam", epochs=25)


def scratch() -> Recipe:
    """ResNet-18 from random weights at 128 pixels: the demo's recipe, chosen to be quick without a GPU."""
    augment = Augment(
        size=128, resize=146, crop=(0.25, 1.0), flip=0.5, rotate=10, brightness=0.2, contrast=0.2, saturation=0.2
    )
    return Recipe(
        weights=None, augment=augment, epochs=10, lr=0.01, weight_decay=5e-4, schedule="one_cycle", label_smoothing=0.1
    )


def finetune() -> Recipe:
    """Pretrained ResNet-50, the first stage frozen, five epochs of one-cycle SGD to 0.02."""
    return Recipe(
        backbone="resnet50",
        freeze=1,
        augment=Augment(crop=(0.25, 1.0), flip=0.5),
        epochs=5,
        lr=0.02,
        weight_decay=1e-4,
        schedule="one_cycle",
        label_smoothing=0.1,
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "default": Recipe,
    "report-a": report_a,
    "report-b": report_b,
    "report-b-batch64": report_b_batch64,
    "report-b-resnet34": report_b_resnet34,
    "report-c": report_c,
    "report-c-batch64": lambda: report_c(64),
    "report-c-batch128": lambda: report_c(128),
    "report-c-resnet50": lambda: report_c(backbone="resnet50"),
    "report-c-resnet50-frozen": lambda: report_c(backbone="resnet50", freeze=2),
    "report-c-densenet121": lambda: report_c(backbone="densenet121"),
    "report-d": report_d,
    "scratch": scratch,
    "finetune": finetune,
}
"""What `--recipe NAME` names on the command line."""
