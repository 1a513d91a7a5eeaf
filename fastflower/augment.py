"""What is drawn (`Augment`, a distribution) and what was drawn (`Draw`, plain numbers).

Every random number is a function of (seed, epoch, index, slot): counter-based, so a sample's draw does not depend on batch
size, worker, rank, or on which other augmentations are switched on. Shape suffixes: N samples, A attempts, S slots.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflower import geometry
from fastflower.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.errors import make_plain, require
from fastflower.geometry import Floats
from fastflower.order import GOLDEN_GAMMA, mix64, stream_key

_ATTEMPTS = 10  # as many as torchvision's RandomResizedCrop and RandomErasing make before they give up
# torchvision resamples again for a rotation and for an affine, each adding a triangle's variance. Half of it is added here:
# the chain is then 1.5 grey levels from torchvision's instead of 1.8, and no further from the truth (docs/augmentation.md).
SOFTNESS = 0.5
_DRAWS = 1  # separates the keys of draws from those of orders
_MIXES = 2
_WORD = (1 << 64) - 1


class Slot(IntEnum):
    """Which random number is which. Never renumber: every recorded draw depends on it."""

    FLIP = 0
    FLIP_VERTICAL = 1
    ROTATE = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    SCALE = 5
    SHEAR_X = 6
    SHEAR_Y = 7
    BRIGHTNESS = 8
    CONTRAST = 9
    SATURATION = 10
    HUE = 11
    ERASE = 12
    AFFINE_ROTATE = 13
    CROP = 16  # _ATTEMPTS areas, as many ratios, then top and left
    ERASE_BOX = 40  # likewise


_SLOTS = 64


def uniform(seed: int, epoch: int, indices_N: NDArray[np.int64]) -> Floats:
    """Uniform numbers in [0, 1), (N, S) float64: one for each sample and slot.

    SplitMix64 (see `order`): a sample's stream starts at a hash of (seed, epoch, index), a slot is a jump in it.
    """
    key = np.uint64(stream_key(seed, epoch, _DRAWS))
    starts = mix64(mix64(indices_N.astype(np.uint64) * np.uint64(GOLDEN_GAMMA) + key))
    jumps = np.arange(1, _SLOTS + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    bits = mix64(starts[:, None] + jumps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Draw:
    """The numbers drawn for N samples. Lengths are pixels, angles degrees; arrays share their first dimension."""

    size: tuple[int, int]
    """(height, width) of the output."""
    roi: Floats
    """(N, 4) top, left, height, width in the source; may reach beyond it when the crop is larger than the photograph."""
    flip: NDArray[np.bool_]
    """(N, 2) left-right, upside-down."""
    rotate: Floats
    """(N,) counter-clockwise, as torchvision's `rotate`."""
    affine_rotate: Floats
    """(N,) clockwise, as torchvision's `affine`."""
    translate: Floats
    """(N, 2) x, y: whole output pixels."""
    scale: Floats
    """(N,) factor; above 1 enlarges."""
    shear: Floats
    """(N, 2) x, y degrees."""
    brightness: Floats
    contrast: Floats
    saturation: Floats
    """(N,) factors; 1 changes nothing."""
    hue: Floats
    """(N,) turns of the colour wheel in [-0.5, 0.5]; 0 changes nothing."""
    erase: NDArray[np.int64]
    """(N, 4) top, left, height, width in the output; height 0 erases nothing."""

    def __len__(self) -> int:
        return len(self.roi)

    def matrix(self) -> Floats:
        """The whole geometry as one warp a sample, (N, 2, 3), destination to source."""
        matrix = geometry.compose(geometry.resized_crop(self.roi, self.size), geometry.flips(self.flip, self.size))
        still = np.zeros_like(self.shear)
        # torchvision's rotate turns counter-clockwise and its affine clockwise.
        if self.rotate.any():
            rotation = geometry.affine(-self.rotate, still, np.ones_like(self.scale), still, self.size)
            matrix = geometry.compose(matrix, rotation)
        if any(part.any() for part in (self.affine_rotate, self.translate, self.scale - 1, self.shear)):
            moved = geometry.affine(self.affine_rotate, self.translate, self.scale, self.shear, self.size)
            matrix = geometry.compose(matrix, moved)
        return matrix

    def warp(self, sizes_N2: ArrayLike, fill: str) -> geometry.Warp:
        """The geometry as an executor needs it, for photographs of `sizes`, (N, 2) height and width."""
        sizes = np.asarray(sizes_N2, np.float64).reshape(-1, 2)
        photo = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        visible = photo if fill == "photo" else geometry.intersect(photo, self.roi)
        turned = (self.rotate != 0).astype(np.float64)
        bent = (self.affine_rotate != 0) | (self.scale != 1) | (self.shear != 0).any(axis=1)
        return geometry.plan(self.matrix(), visible, self.size, SOFTNESS * (turned + bent))

    def take(self, rows: slice) -> "Draw":
        """The draws of some of the samples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Draw(**{name: value if name == "size" else value[rows] for name, value in values.items()})


class Mix(NamedTuple):
    """How the images of each pair are mixed; of P pairs."""

    share: Floats
    """(P,) of an image's own label; the rest is its neighbour's."""
    box: NDArray[np.int64]
    """(P, 4) top, left, height, width of the rectangle that is pasted from the neighbour."""
    cut: NDArray[np.bool_]
    """(P,) whether a rectangle is pasted, not the whole image blended."""


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
    """RandomResizedCrop: the share of the photograph's area, drawn uniformly from (least, most); None: the centre."""
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
    """Factor about the image's mean grey, drawn as for brightness."""
    saturation: float = 0.0
    """Factor between grey and colour, drawn as for brightness."""
    hue: float = 0.0
    """Turns of the colour wheel, drawn uniformly from [-hue, hue]; at most 0.5."""
    erase: float = 0.0
    """Probability that a rectangle is blotted out (RandomErasing)."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Share of the output's area, drawn uniformly."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Height to width of the rectangle, drawn log-uniformly."""
    erase_value: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """What the rectangle is filled with, in normalised units: 0 is the mean colour."""
    fill: Literal["black", "photo"] = "black"
    """What stands outside the crop after rotation, shift or shear: black as in torchvision, or the photograph's own pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Normalisation: (level / 255 - mean) / std."""
    mixup: float = 0.0
    """Mix the images and labels of neighbours in the batch: the Beta distribution's parameter for their weights; 0: never."""
    cutmix: float = 0.0
    """Paste a rectangle of the neighbour instead, likewise; where both are given each pair is dealt one of them."""
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
        inside = _are_numbers(self.translate, 2) and all(0 <= part <= 1 for part in self.translate)
        _check(inside, "translate", "two fractions in [0, 1]", self)
        inside = _are_numbers(self.shear, 2) and all(0 <= part < 90 for part in self.shear)
        _check(inside, "shear", "two angles in [0, 90) degrees", self)
        for name in ("crop", "crop_ratio", "scale", "erase_area", "erase_ratio"):
            value: Any = getattr(self, name)
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
        affine = (self.rotate, self.affine_rotate, *self.translate, *self.shear, *(part - 1 for part in self.scale))
        return any(part != 0 for part in affine)

    @property
    def uncovers(self) -> bool:
        """Whether an output may show what lies outside the crop, or outside the photograph."""
        enough = all(side >= out for side, out in zip(_pair(self.resized), self.output_size, strict=True))
        fits = self.crop is not None or enough
        return self.moves or not fits

    @property
    def erase_levels(self) -> tuple[float, ...]:
        """`erase_value` as levels in 0 .. 255."""
        levels = 255 * (np.array(self.erase_value) * np.array(self.std) + np.array(self.mean))
        return tuple(float(level) for level in np.clip(levels, 0, 255))

    @classmethod
    def from_torchvision(cls, transform: object) -> Self:
        """The Augment that draws what a torchvision v1 or v2 transform draws; see `torchvision_compat.fields_of`.

        Raises ArgumentError, naming the transform, for what cannot be expressed.
        """
        from fastflower.torchvision_compat import fields_of

        return cls(**fields_of(transform))

    def draw(self, seed: int, epoch: int, indices: ArrayLike, sizes: ArrayLike) -> Draw:
        """Draw for the samples `indices`, (N,) integers, whose photographs have `sizes`, (N, 2) height and width in pixels."""
        indices_N = np.asarray(indices, np.int64).reshape(-1)
        sizes_N2 = np.asarray(sizes, np.int64).reshape(-1, 2)
        dice = _Dice(uniform(seed, 0 if self.fixed else epoch, indices_N))
        height, width = self.output_size
        shift = np.array([self.translate[0] * width, self.translate[1] * height])
        unit = np.stack([dice.between(-1, 1, Slot.TRANSLATE_X), dice.between(-1, 1, Slot.TRANSLATE_Y)], -1)
        slant = np.stack([dice.between(-1, 1, Slot.SHEAR_X), dice.between(-1, 1, Slot.SHEAR_Y)], -1)
        chances = np.array([self.flip, self.flip_vertical])
        return Draw(
            size=self.output_size,
            roi=self._centre(sizes_N2) if self.crop is None else self._random_crop(dice, sizes_N2, self.crop),
            flip=dice.uniform(Slot.FLIP, 2) < chances,
            rotate=dice.between(-self.rotate, self.rotate, Slot.ROTATE),
            affine_rotate=dice.between(-self.affine_rotate, self.affine_rotate, Slot.AFFINE_ROTATE),
            translate=np.rint(unit * shift),
            scale=dice.between(*self.scale, Slot.SCALE),
            shear=slant * np.array(self.shear),
            brightness=dice.factor(self.brightness, Slot.BRIGHTNESS),
            contrast=dice.factor(self.contrast, Slot.CONTRAST),
            saturation=dice.factor(self.saturation, Slot.SATURATION),
            hue=dice.between(-self.hue, self.hue, Slot.HUE),
            erase=self._erased(dice),
        )

    def mix(self, seed: int, epoch: int, indices: ArrayLike) -> "Mix":
        """Draw for the pairs (0, 1), (2, 3) ... of a batch of samples `indices`, (N,) with N even.

        mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018. cutmix: Yun et al., "CutMix", 2019, section 3.1.
        """
        first = np.asarray(indices, np.int64)[::2]
        height, width = self.output_size
        share, box, cut = np.ones(len(first)), np.zeros((len(first), 4), np.int64), np.zeros(len(first), bool)
        for pair, index in enumerate(first.tolist()):
            dice = np.random.default_rng([seed & _WORD, 0 if self.fixed else epoch, index, _MIXES])
            cut[pair] = dice.random() * (bool(self.mixup) + bool(self.cutmix)) >= bool(self.mixup)
            alpha = self.cutmix if cut[pair] else self.mixup
            share[pair] = dice.beta(alpha, alpha)
            if cut[pair]:
                half = np.sqrt(1 - share[pair]) / 2
                centre = np.floor(dice.random(2) * (height, width))
                reach = np.floor(half * np.array([height, width]))
                corner = np.clip(centre - reach, 0, (height, width)).astype(int)
                end = np.clip(centre + reach, 0, (height, width)).astype(int)
                box[pair] = *corner, *(end - corner)
                share[pair] = 1 - (end - corner).prod() / (height * width)
        return Mix(share, box, cut)

    def _centre(self, sizes_N2: NDArray[np.int64]) -> Floats:
        """torchvision's Resize, then CenterCrop, with their roundings, as a rectangle of the source."""
        wanted = self.resized
        if isinstance(wanted, tuple):
            resized = np.broadcast_to(np.array(wanted), sizes_N2.shape)
        else:
            shorter = sizes_N2.min(axis=1, keepdims=True)
            resized = np.where(sizes_N2 == shorter, wanted, wanted * sizes_N2 // shorter)
        size = np.array(self.output_size)
        factor = sizes_N2 / resized
        # torchvision rounds half to even what it cuts off, and pads one pixel less at the top and left than below and right.
        start = np.where(resized < size, -((size - resized) // 2), np.rint((resized - size) / 2))
        return np.concatenate([start * factor, size * factor], axis=1)

    def _random_crop(self, dice: "_Dice", sizes_N2: NDArray[np.int64], crop: tuple[float, float]) -> Floats:
        """torchvision's RandomResizedCrop.get_params: the first of ten attempts that fits, else the centre."""
        wide_NA2 = dice.sides(crop, sizes_N2.prod(axis=1), self.crop_ratio, Slot.CROP)
        fits_NA2 = (wide_NA2 > 0) & (wide_NA2 <= sizes_N2[:, None, :])
        found, crop_size, corner = dice.first_fit(wide_NA2, fits_NA2, sizes_N2, Slot.CROP)
        return np.where(found[:, None], np.concatenate([corner, crop_size], axis=1), self._widest_crop(sizes_N2))

    def _widest_crop(self, sizes_N2: NDArray[np.int64]) -> Floats:
        """torchvision's fallback: the largest central crop whose ratio is allowed."""
        height, width = sizes_N2[:, 0], sizes_N2[:, 1]
        least, most = self.crop_ratio
        crop_height = np.where(width / height < least, np.rint(width / least), height)
        crop_width = np.where(width / height > most, np.rint(height * most), width)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return np.stack([top, left, crop_height, crop_width], axis=1).astype(np.float64)

    def _erased(self, dice: "_Dice") -> NDArray[np.int64]:
        """torchvision's RandomErasing.get_params: the first of ten attempts that is smaller than the image, else nothing."""
        if not self.erase:
            return np.zeros((len(dice.numbers_NS), 4), np.int64)
        size = np.broadcast_to(np.array(self.output_size, np.int64), (len(dice.numbers_NS), 2))
        # erase_ratio is height to width, crop_ratio width to height.
        box_NA2 = dice.sides(self.erase_area, size.prod(axis=1), self.erase_ratio, Slot.ERASE_BOX)[..., ::-1]
        found, box, corner = dice.first_fit(box_NA2, box_NA2 < size[:, None, :], size, Slot.ERASE_BOX)
        hit = found & (dice.uniform(Slot.ERASE)[:, 0] < self.erase)
        return np.where(hit[:, None], np.concatenate([corner, box], axis=1), 0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Dice:
    """A batch's random numbers, by slot."""

    numbers_NS: Floats

    def uniform(self, slot: int, count: int = 1) -> Floats:
        return self.numbers_NS[:, slot : slot + count]

    def between(self, least: float, most: float, slot: int, count: int | None = None) -> Floats:
        """Uniform in [least, most): (N,), or (N, count)."""
        values = self.uniform(slot, count or 1)
        return least + (most - least) * (values if count else values[:, 0])

    def sides(
        self, share: tuple[float, float], area_N: NDArray[np.int64], ratio: tuple[float, float], slot: int
    ) -> Floats:
        """Ten attempts at a rectangle of a share of the area and a ratio of width to height: (N, A, 2) height, width."""
        areas_NA = self.between(*share, slot, _ATTEMPTS) * area_N[:, None]
        ratios_NA = np.exp(self.between(float(np.log(ratio[0])), float(np.log(ratio[1])), slot + _ATTEMPTS, _ATTEMPTS))
        return np.rint(np.sqrt(np.stack([areas_NA / ratios_NA, areas_NA * ratios_NA], axis=-1)))

    def first_fit(
        self, sides_NA2: Floats, fits_NA2: NDArray[np.bool_], sizes_N2: NDArray[np.int64], slot: int
    ) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Whether an attempt fits, (N,), the first that does, (N, 2), and a corner (top, left) for it, (N, 2)."""
        fits_NA: NDArray[np.bool_] = np.logical_and(fits_NA2[..., 0], fits_NA2[..., 1])
        rows = np.arange(len(fits_NA))
        first = np.argmax(fits_NA, axis=1)
        chosen = sides_NA2[rows, first]
        corner = np.floor(self.uniform(slot + 2 * _ATTEMPTS, 2) * (sizes_N2 - chosen + 1))
        return fits_NA[rows, first], chosen, corner

    def factor(self, strength: float, slot: int) -> Floats:
        return self.between(max(0.0, 1 - strength), 1 + strength, slot)


def _are_numbers(value: Any, count: int, *kinds: type) -> bool:
    numbers = cast("tuple[Any, ...]", value if isinstance(value, tuple) else ())
    right = all(isinstance(number, kinds or (int, float)) and np.isfinite(number) for number in numbers)
    return right and len(numbers) == count


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _check(holds: bool, name: str, rule: str, augment: Augment) -> None:
    require(holds, f"Augment.{name}", rule, getattr(augment, name))
