"""`Augment`: a distribution of augmentations. It returns a `Draw` for samples and a `Mix` for pairs of samples.

A sample's draw does not depend on the batch size, the worker, the rank or which other augmentations are enabled.
Shape suffixes: N samples, A attempts, S slots.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.draws.draw import Draw, Mix
from fastflower.draws.random import ATTEMPTS, Dice, Floats, Slot, Stream
from fastflower.errors import ArgumentError, Rules, check_fields, require, shown
from fastflower.suggestions import fields_by_name


@fields_by_name
@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """A distribution of augmentations. `Augment()` is deterministic: it is the validation view.

    Each field follows the distribution of the torchvision transform in brackets. Geometry is applied first, then
    brightness, contrast, saturation and hue in this order, then normalization, erasing and mixing.
    Raises ArgumentError with the field's name and rule if a value is invalid.
    """

    size: int | tuple[int, int] | None = None
    """Output size in pixels: (height, width), or one number for a square. None: 224; in `train`, the size of the pretrained
    weights."""
    resize: int | tuple[int, int] | Literal["off"] | None = None
    """Resize before the center crop or `random_crop`, in pixels: the shorter side, or exact (height, width). "off": images
    keep their size. Ignored if `crop` is set. None: 8/7 of the longer side of `size`, for example 256 for 224 [torchvision];
    in `train`, that of the pretrained weights, if `size` is None, too."""
    crop: tuple[float, float] | None = None
    """Area of the random crop as a fraction of the image, uniform in (min, max).
    None: center crop, or `random_crop` [RandomResizedCrop]."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the random crop, log-uniform in (min, max) [RandomResizedCrop]."""
    random_crop: bool = False
    """Crop `size` at a random position after `resize`. A smaller image is placed at random in a larger one [RandomCrop]."""
    padding: int = 0
    """Pixels by which `random_crop` may go beyond each edge of the resized image [RandomCrop]."""
    padding_mode: Literal["constant", "edge"] = "constant"
    """What `random_crop` shows beyond the image: "constant" for black, or "edge" for the nearest pixel [RandomCrop]."""
    flip: float = 0.0
    """Probability of a horizontal flip [RandomHorizontalFlip]."""
    flip_vertical: float = 0.0
    """Probability of a vertical flip [RandomVerticalFlip]."""
    rotate: float = 0.0
    """Maximum rotation in degrees. The angle is uniform in [-rotate, rotate]. 0 disables it [RandomRotation]."""
    affine_rotate: float = 0.0
    """Maximum second rotation in degrees, drawn like `rotate` and applied after it. 0 disables it [RandomAffine]."""
    translate: tuple[float, float] = (0.0, 0.0)
    """Maximum shift (x, y) in either direction, as fractions of the output's width and height.
    The shift is uniform and rounded to whole pixels. (0, 0) disables it [RandomAffine]."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Zoom factor, uniform in (min, max); above 1 magnifies. (1, 1) disables it [RandomAffine]."""
    shear: tuple[float, float] = (0.0, 0.0)
    """Maximum shear (x, y) in degrees, each below 90. The angles are uniform in [-x, x] and [-y, y].
    (0, 0) disables it [RandomAffine]."""
    rotate_probability: float = 1.0
    """Probability of applying `rotate` [RandomApply]."""
    affine_probability: float = 1.0
    """Probability of applying `affine_rotate`, `translate`, `scale` and `shear` [RandomApply]."""
    move_first: bool = False
    """Rotate, shift, scale and shear the whole resized image before the crop, not the output. `translate` is then a
    fraction of the image, and `fill` is without effect [RandomRotation before RandomResizedCrop]."""
    brightness: float = 0.0
    """Brightness jitter. The factor is uniform in [max(0, 1 - brightness), 1 + brightness].
    0 disables it [ColorJitter]."""
    contrast: float = 0.0
    """Contrast jitter around the image's mean gray. The factor is drawn as for `brightness`.
    0 disables it [ColorJitter]."""
    saturation: float = 0.0
    """Saturation jitter. The factor is drawn as for `brightness`. 0 disables it [ColorJitter]."""
    hue: float = 0.0
    """Maximum hue shift as a fraction of the color wheel, at most 0.5. The shift is uniform in [-hue, hue].
    0 disables it [ColorJitter]."""
    jitter_probability: float = 1.0
    """Probability of applying `brightness`, `contrast`, `saturation` and `hue` [RandomApply]."""
    grayscale: float = 0.0
    """Probability of turning the image gray, after the jitter [RandomGrayscale]."""
    erase: float = 0.0
    """Probability of erasing a rectangle [RandomErasing]."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Area of the erased rectangle as a fraction of the output, uniform in (min, max) [RandomErasing]."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Aspect ratio (height / width) of the erased rectangle, log-uniform in (min, max) [RandomErasing]."""
    erase_value: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Normalized color (red, green, blue) of the erased rectangle. (0, 0, 0) is the mean color [RandomErasing]."""
    fill: Literal["black", "photo"] = "black"
    """Fill for areas uncovered by rotation, shift, scale or shear: "black" [torchvision],
    or "photo" for the image's own pixels outside the crop."""
    mean: tuple[float, float, float] | None = None
    """Mean (red, green, blue) for normalization: (pixel / 255 - mean) / std [Normalize].
    None: ImageNet's; in `train`, that of the pretrained weights."""
    std: tuple[float, float, float] | None = None
    """Standard deviation (red, green, blue) for normalization, on the same scale as `mean` [Normalize].
    None: ImageNet's; in `train`, that of the pretrained weights."""
    mixup: float = 0.0
    """Blend each image and label with its neighbor in the batch. The weight is drawn from Beta(mixup, mixup).
    0 disables it [Zhang et al. 2018]."""
    cutmix: float = 0.0
    """Paste a rectangle from its neighbor in the batch and mix the labels by area, drawn from Beta(cutmix, cutmix).
    0 disables it. If mixup is enabled too, each pair gets one of the two with equal probability [Yun et al. 2019]."""
    fixed: bool = False
    """Use the same draw for a sample in every epoch."""

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        black = self.padding_mode == "constant"
        rules = [
            ("random_crop", not self.random_crop or self.crop is None, "False if crop is set"),
            ("padding", self.random_crop or self.padding == 0, "0 unless random_crop is True"),
            ("padding_mode", black or not self.move_first, "'constant' if move_first is True"),
        ]
        for name, holds, rule in rules:
            require(holds, f"Augment.{name}", rule, getattr(self, name))

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output images."""
        return _pair(self.resolved_size)

    @property
    def resolved_size(self) -> int | tuple[int, int]:
        """`size`, or its default if it is None."""
        return 224 if self.size is None else self.size

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, std), each ImageNet's if it is None."""
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD

    @property
    def resolved(self) -> Self:
        """The same distribution with the view written out: size, resize, mean and std are not None."""
        mean, std = self.normalization
        return replace(self, size=self.resolved_size, resize=self.resized, mean=mean, std=std)

    @property
    def resized(self) -> int | tuple[int, int] | Literal["off"]:
        """`resize`, or its default if it is None."""
        return round(max(self.output_size) * 8 / 7) if self.resize is None else self.resize

    @property
    def moves(self) -> bool:
        """True if rotation, shift, scale or shear is enabled."""
        affine = (self.rotate, self.affine_rotate, *self.translate, *self.shear, *(factor - 1 for factor in self.scale))
        return any(bound != 0 for bound in affine)

    @property
    def uncovers(self) -> bool:
        """True if the output may show areas outside the crop or the image."""
        if self.moves or self.crop is not None:
            return self.moves
        if self.random_crop and self.padding_mode != "constant":
            return False
        if isinstance(self.resized, str) or self.padding:
            return True
        return any(side < out for side, out in zip(_pair(self.resized), self.output_size, strict=True))

    @property
    def erase_levels(self) -> tuple[float, ...]:
        """`erase_value` as pixel values, clipped to [0, 255]."""
        mean, std = map(np.array, self.normalization)
        levels = 255 * (np.array(self.erase_value) * std + mean)
        return tuple(float(level) for level in np.clip(levels, 0, 255))

    @classmethod
    def from_torchvision(cls, transform: object) -> Self:
        """Convert a torchvision v1 or v2 transform to an Augment with the same distribution.

        Raises ArgumentError if the transform has no equivalent. The message ends with an Augment that comes near to it.
        """
        from fastflower.draws.torchvision_compat import fields_of

        try:
            return cls(**fields_of(transform))
        except ArgumentError as error:
            near = ""
            with suppress(ArgumentError):
                near = f" What comes nearest is:\n  {cls(**fields_of(transform, lenient=True))!r}"
            raise ArgumentError(f"{error}{near}") from None

    def draw(self, seed: int, epoch: int, indices: ArrayLike, sizes: ArrayLike) -> Draw:
        """Return the draws of the samples at `indices`, (N,) integers.

        sizes  Heights and widths of the images in pixels, (N, 2).

        Example:
            >>> from fastflower import Augment
            >>> augment = Augment(size=(64, 96), crop=(0.25, 1.0), flip=0.5, rotate=10)
            >>> draw = augment.draw(seed=0, epoch=0, indices=[7, 8], sizes=[[300, 400], [500, 375]])
            >>> draw.roi.tolist()  # top, left, height, width of each crop
            [[50.0, 126.0, 234.0, 251.0], [61.0, 35.0, 334.0, 309.0]]
            >>> draw.flip.tolist()  # horizontal, vertical
            [[True, False], [False, False]]
            >>> draw.rotate.round(3).tolist()
            [1.552, 5.055]
            >>> draw.matrix().shape  # all geometry as one matrix per sample
            (2, 2, 3)
            >>> augment.draw(0, 0, [8], [[500, 375]]).roi.tolist()  # a draw does not depend on its batch
            [[61.0, 35.0, 334.0, 309.0]]
        """
        indices_N = np.asarray(indices, np.int64).reshape(-1)
        sizes_N2 = np.array(sizes, np.int64).reshape(-1, 2)  # a copy, which the draw keeps
        dice = Dice(seed, 0 if self.fixed else epoch, indices_N)
        frame_N2 = self._frame(sizes_N2)
        furthest_N2 = self.translate * frame_N2[:, ::-1]
        rotated, bent, jittered = (dice.happens(getattr(self, name), slot) for name, slot in _PROBABILITIES.items())
        return Draw(
            size=self.output_size,
            move_first=self.move_first,
            image=sizes_N2,
            frame=frame_N2,
            roi=self._window(dice, sizes_N2) if self.crop is None else self._random_crop(dice, sizes_N2, self.crop),
            flip=dice.uniform(Slot.FLIP, 2) < (self.flip, self.flip_vertical),
            rotate=np.where(rotated, dice.between(-self.rotate, self.rotate, Slot.ROTATE), 0),
            affine_rotate=np.where(bent, dice.between(-self.affine_rotate, self.affine_rotate, Slot.AFFINE_ROTATE), 0),
            translate=np.where(bent[:, None], np.rint(dice.between(-1, 1, Slot.TRANSLATE_X, 2) * furthest_N2), 0),
            scale=np.where(bent, dice.between(*self.scale, Slot.SCALE), 1),
            shear=np.where(bent[:, None], dice.between(-1, 1, Slot.SHEAR_X, 2) * self.shear, 0),
            brightness=np.where(jittered, dice.factor(self.brightness, Slot.BRIGHTNESS), 1),
            contrast=np.where(jittered, dice.factor(self.contrast, Slot.CONTRAST), 1),
            saturation=np.where(jittered, dice.factor(self.saturation, Slot.SATURATION), 1),
            hue=np.where(jittered, dice.between(-self.hue, self.hue, Slot.HUE), 0),
            gray=dice.happens(self.grayscale, Slot.GRAYSCALE),
            erase=self._erased(dice),
        )

    def mix(self, seed: int, epoch: int, indices: ArrayLike) -> Mix:
        """Return the `Mix` of the pairs (0, 1), (2, 3), ... in a batch. `indices` lists its samples, (N,) with N even.

        mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
        CutMix: Yun et al., "CutMix", 2019, section 3.1.
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

    def _frame(self, sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sizes (N, 2) of what rotation and affine act on."""
        if not self.move_first:
            return np.tile(self.output_size, (len(sizes_N2), 1))
        return sizes_N2 if self.crop is not None else self._resized(sizes_N2)

    def _resized(self, sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sizes (N, 2) that `resize` gives to images, rounded as in torchvision."""
        if isinstance(self.resized, str):
            return sizes_N2
        if isinstance(self.resized, tuple):
            return np.tile(self.resized, (len(sizes_N2), 1))
        return self.resized * sizes_N2 // sizes_N2.min(axis=1, keepdims=True)

    def _window(self, dice: Dice, sizes_N2: NDArray[np.int64]) -> Floats:
        """Return the source rectangles (N, 4) that Resize and CenterCrop or RandomCrop would show, as in torchvision."""
        size, resized = np.array(self.output_size), self._resized(sizes_N2)
        if self.random_crop:
            room = resized + 2 * self.padding - size  # below 0 if even the padded image is too small
            start = np.minimum(room, 0) - self.padding + dice.position(np.abs(room), Slot.CROP + 2 * ATTEMPTS)
        else:
            # torchvision rounds the offset half to even, and puts the extra pixel of padding at the bottom and right.
            start = np.where(resized < size, -((size - resized) // 2), np.rint((resized - size) / 2))
        factor = sizes_N2 / resized
        return np.concatenate([start * factor, size * factor], axis=1)

    def _random_crop(self, dice: Dice, sizes_N2: NDArray[np.int64], crop: tuple[float, float]) -> Floats:
        """Draw like RandomResizedCrop.get_params: the first of ten attempts that fits, else the largest center crop."""
        sides_NA2 = dice.sides(crop, sizes_N2.prod(axis=1), self.crop_ratio, Slot.CROP)
        fits_NA2 = (sides_NA2 > 0) & (sides_NA2 <= sizes_N2[:, None, :])
        fits_N, crop_N4 = dice.first_fit(sides_NA2, fits_NA2, sizes_N2, Slot.CROP)
        (height, width), (least, most) = sizes_N2.T, self.crop_ratio
        largest_N2 = np.minimum(sizes_N2, np.rint(np.stack([width / least, height * most], axis=1)))
        largest_N4 = np.concatenate([(sizes_N2 - largest_N2) // 2, largest_N2], axis=1)
        return np.where(fits_N[:, None], crop_N4, largest_N4)

    def _erased(self, dice: Dice) -> NDArray[np.int64]:
        """Draw like RandomErasing.get_params: the first of ten attempts that is smaller than the output, else none."""
        if not self.erase:
            return np.zeros((len(dice.numbers_NS), 4), np.int64)
        size_12 = np.array([self.output_size], np.int64)
        # `sides` takes width / height, as in crop_ratio. erase_ratio is height / width, so swap the sides.
        sides_NA2 = dice.sides(self.erase_area, size_12.prod(axis=1), self.erase_ratio, Slot.ERASE_BOX)[..., ::-1]
        fits_N, box_N4 = dice.first_fit(sides_NA2, sides_NA2 < size_12, size_12, Slot.ERASE_BOX)
        erased_N = fits_N & dice.happens(self.erase, Slot.ERASE)
        return np.where(erased_N[:, None], box_N4, 0).astype(np.int64)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


# Fields with the probability of a group of augmentations, each with its slot.
_PROBABILITIES = {
    "rotate_probability": Slot.ROTATE_APPLIES,
    "affine_probability": Slot.AFFINE_APPLIES,
    "jitter_probability": Slot.JITTER_APPLIES,
}
_RANGE = "(min, max) with 0 < min <= max"
_RULES: Rules = {
    "size": ("one or two integers, each at least 1", lambda size: min(_pair(size)) >= 1),
    "resize": (
        "one or two integers, each at least 1, or 'off'",
        lambda resize: resize == "off" or min(_pair(resize)) >= 1,
    ),
    "padding": ("an integer, at least 0", lambda pixels: pixels >= 0),
    **{
        name: ("a probability in [0, 1]", lambda chance: 0 <= chance <= 1)
        for name in ("flip", "flip_vertical", "grayscale", "erase", *_PROBABILITIES)
    },
    **{
        name: ("a number, 0 or more", lambda strength: strength >= 0)
        for name in ("rotate", "affine_rotate", "brightness", "contrast", "saturation", "mixup", "cutmix")
    },
    "hue": ("a number in [0, 0.5]", lambda share: 0 <= share <= 0.5),
    "translate": ("two fractions in [0, 1]", lambda shares: all(0 <= share <= 1 for share in shares)),
    "shear": ("two angles in [0, 90) degrees", lambda angles: all(0 <= angle < 90 for angle in angles)),
    **{name: (f"{_RANGE} <= 1", lambda area: 0 < area[0] <= area[1] <= 1) for name in ("crop", "erase_area")},
    **{name: (_RANGE, lambda ends: 0 < ends[0] <= ends[1]) for name in ("crop_ratio", "scale", "erase_ratio")},
    **{name: ("three numbers (red, green, blue)", lambda _: True) for name in ("mean", "erase_value")},
    "std": ("three numbers above 0", lambda std: min(std) > 0),
}
