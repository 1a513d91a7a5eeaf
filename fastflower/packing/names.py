"""What the name of a file or folder says: an image, a split, images of any class."""

import re
import unicodedata
from collections.abc import Iterable

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # ImageFolder's IMG_EXTENSIONS
    *(".jfif", ".jpe", ".gif", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".pbm", ".pnm", ".dib"),
    *(".mpo", ".tga", ".pcx"),  # all others that `prepare` reads, except .ico: web pages and file managers leave icons
)

# Split names that Hugging Face's imagefolder accepts, train first.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "holdout"), "test"),
}
_FILLERS = {"", "image", "images", "img", "imgs", "split", "folder", "mini", "full"}  # ignored in the name of a split
_UNLABELED = {"unknown", "unlabeled", "unlabelled", "all", "classes", "none"}  # folders of unlabeled images
_ANY = {"image", "images", "img", "imgs", "unlabeled", "unlabelled"}  # for any class, often next to masks
_TO_PREDICT = {"pred", "predict", "prediction", "predictions"}
FOLDS = {"fold", "cv", "part", "batch"}


def is_image(name: str) -> bool:
    """Return whether a file name has an image extension."""
    return name.lower().endswith(EXTENSIONS)


def words_of(name: str) -> list[str]:
    """Return the meaningful words of a name: ["training"] for "Training_Set2", ["train"] for "trainImages"."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return [word for word in (word.removesuffix("set").removesuffix("data") for word in words) if word not in _FILLERS]


def is_generic(name: str) -> bool:
    """Return whether a name is generic, such as "images". Next to other folders, such a folder is unlikely to be a class."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    return bool(words) and _ANY.issuperset(words)


def is_to_predict(name: str) -> bool:
    """Return whether a folder is named as if its images were to be classified, such as "seg_pred"."""
    return not _TO_PREDICT.isdisjoint(words_of(name))


def splits_named(names: Iterable[str]) -> dict[str, str]:
    """Map each name that denotes a split to that split, train first.

    "train", "Validation", "test_set" and "train2017" always count. "flowers_train" counts only next to "flowers_val" or
    "flowers_test".
    """
    candidates: dict[str, tuple[str, list[str]]] = {}  # split, and the other words of the name
    for name in names:
        words = words_of(name)
        splits = [word for word in words if word in SPLIT_WORDS]
        if len(splits) == 1:
            candidates[name] = SPLIT_WORDS[splits[0]], [word for word in words if word != splits[0]]
    named = {
        name: split
        for name, (split, rest) in candidates.items()
        if not rest or any(other != split and also == rest for other, also in candidates.values())
    }
    order = list(SPLIT_WORDS.values())
    return dict(sorted(named.items(), key=lambda item: order.index(item[1])))


def is_no_class_name(name: str) -> bool:
    """Return whether a folder in a split is named like "images", "unknown" or a split. A number is a class name."""
    return re.search(r"[^\W\d_]", name) is not None and {*SPLIT_WORDS, *_UNLABELED}.issuperset(words_of(name))


def split_in(name: str) -> str | None:
    """Return the split that one word of a name denotes ("images_train1" gives "train"), or None unless there is one."""
    splits = {SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def plain_name(name: str) -> str:
    """Return a name without the differences that people do not mean: case, spaces, punctuation, composed accents."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name)).strip().lower()
