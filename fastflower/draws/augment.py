"""What is drawn: `Augment`, a distribution, which gives a `Draw` of plain numbers for samples, and a `Mix` of pairs of them.

A sample's draw does not depend on batch size, worker, rank, or on which other augmentations are switched on. Shape suffixes:
N samples, A attempts, S slots.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.draws.draw import Draw, Mix
from fastflower.draws.random import Dice, Floats, Slot, Stream
from fastflower.errors import make_plain, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """A distribution of random changes. `Augment()` draws nothing: it is the validation view.

    Distributions are torchvision's, parameter by parameter; geometry comes first, then brightness, contrast, saturation
    and hue in this order. Raises ArgumentError naming the field and its rule.
    """

    size: int | tuple[int, int] = 224
    """Output pixels: (height, width), or one number for a square."""
    resize: int | tuple[int, int] | None = None
    """Without `crop`: the shorter side (or exactly height, width) before the central `size` is cut out; None: 8/7 of the longer
    side of `size`, as torchvision's 256 of 224."""
    crop: tuple[float, float] | None = None
    """RandomResizedCrop: the share of the image's area, drawn uniformly from (least, most); None: the center."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of the crop, drawn log-uniformly."""
    flip: float = 0.0
    """Probability of a left-right mirror image."""
    flip_vertical: float = 0.0
    """Probability of an upside-down mirror image."""
    rotate: float = 0.0
    """Degrees; the angle is drawn uniformly from [-rotate, rotate]."""
    affine_rotate: float = 0.0
    """Degrees; a second angle, drawn likewise: the rotation that RandomAffine adds to RandomRotation's."""
    translate: tuple[float, float] = (0.0, 0.0)
    """Largest shift (x, y) either way, as a fraction of the output's width and height; whole pixels."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Factor, drawn uniformly from (least, most)."""
    shear: tuple[float, float] = (0.0, 0.0)
    """Degrees; drawn uniformly from [-x, x] along x and [-y, y] along y."""
    brightness: float = 0.0
    """Factor drawn uniformly from [max(0, 1 - brightness), 1 + brightness]."""
    contrast: float = 0.0
    """Factor about the image's mean gray, drawn as for brightness."""
    saturation: float = 0.0
    """Factor between gray and color, drawn as for brightness."""
    hue: float = 0.0
    """Turns of the color wheel, drawn uniformly from [-hue, hue]; at most 0.5."""
    erase: float = 0.0
    """Probability that a rectangle is blotted out (RandomErasing)."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Share of the output's area, drawn uniformly."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Height to width of the rectangle, drawn log-uniformly."""
    erase_value: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """What the rectangle is filled with, in normalized units: 0 is the mean color."""
    fill: Literal["black", "photo"] = "black"
    """What stands outside the crop after rotation, shift or shear: black as in torchvision, or the image's own pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Normalization: (level / 255 - mean) / std."""
    mixup: float = 0.0
    """Mix the images and labels of neighbors in the batch: the Beta distribution's parameter for their weights; 0: never."""
    cutmix: float = 0.0
    """Paste a rectangle of the neighbor instead, likewise; where both are given each pair is dealt one of them."""
    fixed: bool = False
    """Draw the same numbers for a sample in every epoch."""

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("size", "resize"):
            pair, rule = _pair(getattr(self, name)), "one or two whole numbers, at least 1"
            right = _are_numbers(pair, 2, int) and min(pair) >= 1
            _check(right or (name == "resize" and self.resize is None), name, rule, self)
        for name in ("flip", "flip_vertical", "erase"):
            _check(0 <= getattr(self, name) <= 1, name, "a probability in [0, 1]", self)
        for name in ("rotate", "affine_rotate", "brightness", "contrast", "saturation", "mixup", "cutmix"):
            _check(0 <= getattr(self, name) < np.inf, name, "0 or more", self)
        _check(0 <= self.hue <= 0.5, "hue", "in [0, 0.5]", self)
        inside = _are_numbers(self.translate, 2) and all(0 <= share <= 1 for share in self.translate)
        _check(inside, "translate", "two fractions in [0, 1]", self)
        inside = _are_numbers(self.shear, 2) and all(0 <= angle < 90 for angle in self.shear)
        _check(inside, "shear", "two angles in [0, 90) degrees", self)
        for name in ("crop", "crop_ratio", "scale", "erase_area", "erase_ratio"):
            value = getattr(self, name)
            most, rule = np.inf, "(least, most) with 0 < least <= most"
            if name in ("crop", "erase_area"):
                most, rule = 1, f"{rule} <= 1"
            right = _are_numbers(value, 2) and 0 < value[0] <= value[1] <= most
            _check(right or (name == "crop" and value is None), name, rule, self)
        _check(self.fill in ("black", "photo"), "fill", "'black' or 'photo'", self)
        _check(_are_numbers(self.std, 3) and min(self.std) > 0, "std", "three numbers above 0", self)
        for name in ("mean", "erase_value"):
            _check(_are_numbers(getattr(self, name), 3), name, "three numbers, of red, green and blue", self)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the images that come out."""
        return _pair(self.size)

    @property
    def resized(self) -> int | tuple[int, int]:
        """`resize`, or what None stands for."""
        return round(max(self.output_size) * 8 / 7) if self.resize is None else self.resize

    @property
    def moves(self) -> bool:
        """Whether rotation, shift, scale or shear is drawn."""
        affine = (self.rotate, self.affine_rotate, *self.translate, *self.shear, *(factor - 1 for factor in self.scale))
        return any(bound != 0 for bound in affine)

    @property
    def uncovers(self) -> bool:
        """Whether an output may show what lies outside the crop, or outside the image."""
        small = any(side < out for side, out in zip(_pair(self.resized), self.output_size, strict=True))
        return self.moves or (self.crop is None and small)

    @property
    def erase_levels(self) -> tuple[float, ...]:
        """`erase_value` as levels in 0 .. 255."""
        levels = 255 * (np.array(self.erase_value) * np.array(self.std) + np.array(self.mean))
        return tuple(float(level) for level in np.clip(levels, 0, 255))

    @classmethod
    def from_torchvision(cls, transform: object) -> Self:
        """The Augment that draws what a torchvision v1 or v2 transform draws. Raises ArgumentError as `fields_of` does."""
        from fastflower.draws.torchvision_compat import fields_of

        return cls(**fields_of(transform))

    def draw(self, seed: int, epoch: int, indices: ArrayLike, sizes: ArrayLike) -> Draw:
        """Draw for the samples `indices`, (N,) integers, whose images have `sizes`, (N, 2) height and width in pixels.

        Example:
            >>> from fastflower import Augment
            >>> augment = Augment(size=(64, 96), crop=(0.25, 1.0), flip=0.5, rotate=10)
            >>> draw = augment.draw(seed=0, epoch=0, indices=[7, 8], sizes=[[300, 400], [500, 375]])
            >>> draw.roi.tolist()  # top, left, height, width of each crop
            [[50.0, 126.0, 234.0, 251.0], [61.0, 35.0, 334.0, 309.0]]
            >>> draw.flip.tolist()  # left-right, upside-down
            [[True, False], [False, False]]
            >>> draw.rotate.round(3).tolist()
            [1.552, 5.055]
            >>> draw.matrix().shape  # all of the geometry as one matrix a sample
            (2, 2, 3)
            >>> augment.draw(0, 0, [8], [[500, 375]]).roi.tolist()  # no draw depends on its batch
            [[61.0, 35.0, 334.0, 309.0]]
        """
        indices_N = np.asarray(indices, np.int64).reshape(-1)
        sizes_N2 = np.asarray(sizes, np.int64).reshape(-1, 2)
        dice = Dice(seed, 0 if self.fixed else epoch, indices_N)
        furthest = np.array(self.translate) * self.output_size[::-1]
        return Draw(
            size=self.output_size,
            roi=self._center(sizes_N2) if self.crop is None else self._random_crop(dice, sizes_N2, self.crop),
            flip=dice.uniform(Slot.FLIP, 2) < (self.flip, self.flip_vertical),
            rotate=dice.between(-self.rotate, self.rotate, Slot.ROTATE),
            affine_rotate=dice.between(-self.affine_rotate, self.affine_rotate, Slot.AFFINE_ROTATE),
            translate=np.rint(dice.between(-1, 1, Slot.TRANSLATE_X, 2) * furthest),
            scale=dice.between(*self.scale, Slot.SCALE),
            shear=dice.between(-1, 1, Slot.SHEAR_X, 2) * self.shear,
            brightness=dice.factor(self.brightness, Slot.BRIGHTNESS),
            contrast=dice.factor(self.contrast, Slot.CONTRAST),
            saturation=dice.factor(self.saturation, Slot.SATURATION),
            hue=dice.between(-self.hue, self.hue, Slot.HUE),
            erase=self._erased(dice),
        )

    def mix(self, seed: int, epoch: int, indices: ArrayLike) -> Mix:
        """Draw for the pairs (0, 1), (2, 3) ... of a batch of samples `indices`, (N,) with N even.

        mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018. cutmix: Yun et al., "CutMix", 2019, section 3.1.
        """
        first = np.asarray(indices, np.int64)[::2]
        size = np.array(self.output_size)
        share, box, cut = np.ones(len(first)), np.zeros((len(first), 4), np.int64), np.zeros(len(first), bool)
        for pair, index in enumerate(first.tolist()):
            dice = np.random.default_rng([seed % 2**64, 0 if self.fixed else epoch, index, Stream.MIXES])
            cut[pair] = dice.random() * (bool(self.mixup) + bool(self.cutmix)) >= bool(self.mixup)
            alpha = self.cutmix if cut[pair] else self.mixup
            share[pair] = dice.beta(alpha, alpha)
            if cut[pair]:
                center = np.floor(dice.random(2) * size)
                reach = np.floor(np.sqrt(1 - share[pair]) / 2 * size)
                corner, end = np.clip([center - reach, center + reach], 0, size).astype(int)
                box[pair] = *corner, *(end - corner)
                share[pair] = 1 - (end - corner).prod() / size.prod()
        return Mix(share, box, cut)

    def _center(self, sizes_N2: NDArray[np.int64]) -> Floats:
        """torchvision's Resize, then CenterCrop, with their roundings, as a rectangle of the source."""
        size, resized = np.array(self.output_size), np.array(self.resized)
        if resized.ndim == 0:  # one number, of the shorter side
            resized = resized * sizes_N2 // sizes_N2.min(axis=1, keepdims=True)
        factor = sizes_N2 / resized
        # torchvision rounds half to even what it cuts off, and pads one pixel less at the top and left than below and right.
        start = np.where(resized < size, -((size - resized) // 2), np.rint((resized - size) / 2))
        return np.concatenate([start * factor, size * factor], axis=1)

    def _random_crop(self, dice: Dice, sizes_N2: NDArray[np.int64], crop: tuple[float, float]) -> Floats:
        """torchvision's RandomResizedCrop.get_params: the first of ten attempts that fits, else the widest central crop."""
        sides_NA2 = dice.sides(crop, sizes_N2.prod(axis=1), self.crop_ratio, Slot.CROP)
        fits_NA2 = (sides_NA2 > 0) & (sides_NA2 <= sizes_N2[:, None, :])
        fits_N, crop_N4 = dice.first_fit(sides_NA2, fits_NA2, sizes_N2, Slot.CROP)
        (height, width), (least, most) = sizes_N2.T, self.crop_ratio
        widest_N2 = np.minimum(sizes_N2, np.rint(np.stack([width / least, height * most], axis=1)))
        widest_N4 = np.concatenate([(sizes_N2 - widest_N2) // 2, widest_N2], axis=1)
        return np.where(fits_N[:, None], crop_N4, widest_N4)

    def _erased(self, dice: Dice) -> NDArray[np.int64]:
        """torchvision's RandomErasing.get_params: the first of ten attempts that is smaller than the image, else nothing."""
        if not self.erase:
            return np.zeros((len(dice.numbers_NS), 4), np.int64)
        size_12 = np.array([self.output_size], np.int64)
        # erase_ratio is height to width, crop_ratio width to height.
        sides_NA2 = dice.sides(self.erase_area, size_12.prod(axis=1), self.erase_ratio, Slot.ERASE_BOX)[..., ::-1]
        fits_N, box_N4 = dice.first_fit(sides_NA2, sides_NA2 < size_12, size_12, Slot.ERASE_BOX)
        erased_N = fits_N & (dice.between(0, 1, Slot.ERASE) < self.erase)
        return np.where(erased_N[:, None], box_N4, 0).astype(np.int64)


def _are_numbers(value: object, count: int, kind: type[int] | type[float] = float) -> bool:
    """Whether a field is a tuple of so many finite numbers; whole ones are floats too."""
    numbers = cast("tuple[object, ...]", value if isinstance(value, tuple) else ())
    right = all(isinstance(number, (int, kind)) and isfinite(number) for number in numbers)
    return right and len(numbers) == count


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _check(holds: bool, name: str, rule: str, augment: Augment) -> None:
    require(holds, f"Augment.{name}", rule, getattr(augment, name))
