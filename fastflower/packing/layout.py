"""How a folder of images is laid out: which of its folders are classes and which are splits.

What can be read in one way only is read so. Everything else is an error that shows the readings and what to type for each.
`folder.scan` asks in this order: lists, splits, class folders. Called `tops` are the folders below the root, as `subfolders`
names them.
"""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.files import blame_the_system

# ImageFolder's IMG_EXTENSIONS (torchvision/datasets/folder.py).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What archives and file systems add.
NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

# Words that stand for a split, as Hugging Face's imagefolder reads them; training comes first.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Words that say nothing in the name of a split, and names of folders for images without labels.
_FILLERS = {"", "image", "images", "img", "imgs", "split", "folder"}
_UNLABELED = {"unknown", "unlabeled", "unlabelled", "all", "classes", "none"}
_ANY = {"image", "images", "img", "imgs", "unlabeled", "unlabelled"}  # images of any class, beside labels or masks
_FOLDS = {"fold", "cv", "part", "batch"}

_MOST_NAMES = 6  # in a message
_DEEPEST = 20  # folders that are looked into for class folders


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def subfolders(root: Path) -> list[str]:
    """Names of folders, sorted; hidden ones are no classes (ImageFolder takes .git or .cache for one)."""
    names = (entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and is_folder(entry))
    return sorted(name for name in names if name not in NO_CLASSES)


def _holds_images(folder: Path) -> bool:
    """Whether a file of it, or of a folder below it that can be read, is named as an image; it ends at the first."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        path = pending.pop()
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_folder(entry):
                        pending.append(path / entry.name)
                    elif entry.name.lower().endswith(EXTENSIONS):
                        return True
        except OSError as error:
            blame_the_system(error, path)
            if path == folder:
                raise
    return False


def _words(name: str) -> list[str]:
    """The words of a name that say something: "Training_Set2" gives training, "trainImages" train."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return [word for word in (word.removesuffix("set").removesuffix("data") for word in words) if word not in _FILLERS]


def _for_any(name: str) -> bool:
    """Whether a folder is called as one for images of any class, and so is hardly a class where others stand beside it."""
    words = re.findall(r"[^\W\d_]+", name.lower())
    return bool(words) and _ANY.issuperset(words)


def _inner(root: Path, top: str) -> str:
    """The folder below `top`, or itself, that holds more than one other: data/flowers of data/flowers/CLASS."""
    for _ in range(_DEEPEST):
        inside = subfolders(root / top)
        if len(inside) != 1 or _has_own(root / top):
            break
        if splits_named(inside) and inside[0].lower() != Path(top).name.lower():
            break
        top = f"{top}/{inside[0]}"
    return top


def splits_named(names: Iterable[str]) -> dict[str, str]:
    """Those names that stand for a split, and the split, training first.

    "train", "Validation", "test_set" or "train2017" by itself; "flowers_train" where "flowers_val" or "flowers_test" is there.
    """
    candidates: dict[str, tuple[str, list[str]]] = {}  # the split, and the other words of the name
    for name in names:
        words = _words(name)
        splits = [word for word in words if word in _SPLITS]
        if len(splits) == 1:
            candidates[name] = _SPLITS[splits[0]], [word for word in words if word != splits[0]]
    named = {
        name: split
        for name, (split, rest) in candidates.items()
        if not rest or any(other != split and also == rest for other, also in candidates.values())
    }
    order = list(_SPLITS.values())
    return dict(sorted(named.items(), key=lambda item: order.index(item[1])))


def places_of_splits(root: Path, named: dict[str, str], tops: Sequence[str]) -> dict[str, str]:
    """Of the folders named as splits those that have class folders, training first, and below which folder these stand.

    Raises FolderError where others with images stand beside them, or not both train and another have the same classes. A
    test split alone may have no class folders: its images are those to classify.
    """
    others = [top for top in tops if top not in named and _holds_images(root / top)]
    if others:
        raise _beside(root, named, others)
    full = [top for top in named if _holds_images(root / top)]
    if not full:
        raise FolderError(f"{root}: has no images in {_names(named)}; put them into {root / next(iter(named))}/CLASS.")
    if len({named[top] for top in full}) < len(full):
        raise _twice(root, {top: named[top] for top in full})
    bases = _bases(root, full)
    train = next((top for top in bases if named[top] == "train"), None)
    if train is None:
        what = f"{_names(named)} are named as splits, and none for training has class folders"
        raise _unclear(root, what, [*_those_in(root, bases), _sorting(root, full), _as_classes(root, full)])
    bare = [top for top in full if top not in bases and named[top] != "test"]
    if bare or len(bases) == 1:
        what = f"only {_names(bases)} has class folders" if len(bases) == 1 else f"{_names(bare)} has no class folders"
        unlabelled = [top for top in full if top not in bases]
        readings = _those_in(root, [train], "and a split val is drawn of its images")
        if bare and len(bases) > 1:
            readings.append((f"the images of {_names(bare)} have none, and are left out", _hiding(root, bare)))
        if unlabelled:
            readings.append(_sorting(root, unlabelled))
        raise _unclear(root, what, readings)
    inside = subfolders(root / bases[train])
    if len(inside) > 1 and (called := [name for name in inside if _for_any(name)]):
        places = [f"{base}/{name}" for base in bases.values() for name in called]
        raise _called(root, bases[train], called, inside, places)
    return bases


def _bases(root: Path, tops: Iterable[str]) -> dict[str, str]:
    """Those that have class folders, and where these stand."""
    return {top: base for top in tops if (base := _base(root, top)) is not None}


def _base(root: Path, top: str) -> str | None:
    """Where a split's class folders stand: in it, or in its only folder where that is called as it or "images"; None without."""
    base, inside = top, subfolders(root / top)
    while len(inside) == 1 and (inside[0].lower() == top.lower() or _names_no_class(inside[0])):
        deeper = subfolders(root / base / inside[0])
        if not deeper:
            return None
        base, inside = f"{base}/{inside[0]}", deeper
    return None if all(map(_names_no_class, inside)) else base


def _names_no_class(name: str) -> bool:
    """Whether a folder below a split is called as one for any images: "images", "unknown", or as a split; a number is a class."""
    return re.search(r"[^\W\d_]", name) is not None and {*_SPLITS, *_UNLABELED}.issuperset(_words(name))


def check_classes(root: Path, tops: Sequence[str], anew: bool) -> None:
    """Raise FolderError where class folders hold classes, or splits. anew  the latter do not count."""
    if len(tops) == 1:
        refuse_wrapper(root, tops[0])
        return
    inner = {top: _inner(root, top) for top in tops}
    inside = {top: subfolders(root / inner[top]) for top in tops}
    nested = [(top, split) for top in tops for split in splits_named(inside[top])]
    if nested and not anew:
        full = [top for top in tops if _holds_images(root / top)]
        if len(full) == 1:
            refuse_wrapper(root, full[0])
        raise _nested(root, tops, [(inner[top], split) for top, split in nested])
    for top in tops:
        beside = set(inside[top])
        rest = [other for other in tops if other != top]
        again = [other for other in rest if other in beside]
        if len(again) > 1 and 4 * len(again) >= 3 * len(rest):
            what = f"{top!r} holds {_names(again)} once more, which stand beside it"
            readings = [*_those_in(root, [top]), (f"the classes are {_names(rest)}", _hiding(root, [top]))]
            raise _unclear(root, what, [*readings, _as_classes(root, tops)])
    shared = sorted(set[str].intersection(*map(set, inside.values())) - {name for _, name in nested})
    pictures = [name for name in shared if _for_any(name)]
    if pictures and len(shared) > 1 and all(top == inner[top] for top in tops):
        what = f"each of {_names(tops)} holds {_names(shared)}"
        reading = f"the images are those in {pictures[0]!r}", _listing(root, f"*/{_quoted(pictures[0])}")
        raise _unclear(root, what, [reading, _as_classes(root, tops)])
    folds = len(shared) > 1 and all(_FOLDS.issuperset(_words(top)) for top in tops)
    if (folds or len(shared) >= len(tops)) and not any(_has_own(root / inner[top]) for top in tops):
        what = f"{_names(inner.values())} hold the same folders ({_names(shared)})"
        raise _unclear(root, what, [*_those_in(root, tops), _as_classes(root, tops)])
    called = [top for top in tops if _for_any(top)]
    if called and any(_holds_images(root / top) for top in tops if top not in called):
        raise _called(root, ".", called, tops, called)


def _has_own(folder: Path) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))  # noqa: PTH208  (names suffice)


def refuse_wrapper(root: Path, top: str) -> None:
    """Raise FolderError where the only folder with images holds folders itself: it is hardly the only class."""
    deepest = path = root / top
    for _ in range(_DEEPEST):
        inside = subfolders(path)
        if len(inside) > 1:
            inside = [name for name in inside if _holds_images(path / name)]
        if inside:
            deepest = path
        if len(inside) != 1:
            break
        path /= inside[0]
    if subfolders(root / top):
        what = f"has one class, {top!r}; a classifier needs at least two class folders."
        raise FolderError(f"{root}: {what} If those in it are the classes, name {deepest}.")


def _unclear(root: Path, what: str, readings: Sequence[tuple[str, str]]) -> FolderError:
    """An error that shows the readings of a folder, and what to type for each."""
    lines = [f"{root}: {what}. What to do if", *(f"{reading}: {command}" for reading, command in readings)]
    return FolderError("\n  ".join(lines))


def _beside(root: Path, named: dict[str, str], others: list[str]) -> FolderError:
    what = f"folders named as splits ({_names(named)}) are no classes, and others ({_names(others)}) stand beside them"
    readings: list[tuple[str, str]] = []
    bases = _bases(root, named)
    if _fit(root, named, bases):
        readings.append((f"the splits are {_names(bases)}, and {_names(others)} left out", _hiding(root, others)))
    if len(others) > 1:
        with suppress(FolderError):  # which are none where they hold classes or splits themselves
            check_classes(root, others, anew=False)
            reading = f"the classes are {_names(others)}, and {_names(named)} left out"
            readings.append((reading, _hiding(root, list(named))))
    readings += _those_in(root, [*named, *others])
    return _unclear(root, what, [*readings, _as_classes(root, [*named, *others])])


def _fit(root: Path, named: dict[str, str], bases: dict[str, str]) -> bool:
    """Whether there is a split for training, of several classes, and others have no classes besides."""
    if len(bases) < 2 or named[next(iter(bases))] != "train":
        return False
    train, *others = [set(subfolders(root / base)) for base in bases.values()]
    return len(train) > 1 and train.issuperset(set[str]().union(*others))


def _called(root: Path, base: str, called: Sequence[str], tops: Sequence[str], places: Sequence[str]) -> FolderError:
    """base  where the folders stand that are called so, and all others; places  all of the former, in every split."""
    what = f"{_names(called)} may hold images of any class, and other folders stand beside"
    others = [top for top in tops if top not in called and _holds_images(root / base / top)]
    readings = _those_in(root, [os.path.normpath(f"{base}/{top}") for top in called])
    if len(others) > 1:
        readings.append((f"the classes are {_names(others)}, and {_names(called)} left out", _hiding(root, places)))
    return _unclear(root / base, what, [*readings, _sorting(root / base, called), _as_classes(root / base, tops)])


def _twice(root: Path, named: dict[str, str]) -> FolderError:
    splits = list(named.values())
    twice = [top for top, split in named.items() if splits.count(split) > 1]
    readings: list[tuple[str, str]] = []
    if len({named[top] for top in twice}) == 1:
        for top in twice:
            rest = [other for other in twice if other != top]
            readings.append((f"{top!r} is the split, and {_names(rest)} left out", _hiding(root, rest)))
    kinds = {top: [word for word in _words(top) if word not in _SPLITS] for top in named}
    for kind in dict.fromkeys(map(tuple, kinds.values())):
        tops, rest = ([top for top in named if (tuple(kinds[top]) == kind) == same] for same in (True, False))
        if rest and len({named[top] for top in tops}) == len(tops) and _fit(root, named, _bases(root, tops)):
            readings.append((f"the splits are {_names(tops)}, and {_names(rest)} left out", _hiding(root, rest)))
    places = {top: f"{split}/{'-'.join(kinds[top])}" for top, split in named.items()}
    if len(set(places.values())) == len(named) and not any(place.endswith("/") for place in places.values()):
        turned = Path(f"{root.absolute()}-by-split")
        links = [f"ln -s {_quoted(root.absolute() / top)} {_quoted(turned / place)}" for top, place in places.items()]
        folders = " ".join(_quoted(turned / split) for split in dict.fromkeys(splits))
        command = " && ".join([f"mkdir -p {folders}", *links, f"fastflower pack {_quoted(turned)}"])
        readings.append(("each is a class of a split", command))
    what = f"has two folders for the same split ({', '.join(twice)})"
    return _unclear(root, what, [*readings, _as_classes(root, list(named))])


def _nested(root: Path, tops: Sequence[str], nested: Sequence[tuple[str, str]]) -> FolderError:
    """nested  (folder, split in it)."""
    readings: list[tuple[str, str]] = []
    for top in dict.fromkeys(top for top, _ in nested):
        named = splits_named(subfolders(root / top))
        if _fit(root / top, named, _bases(root / top, named)):
            readings.append((f"the splits are those in {top!r}", f"fastflower pack {_quoted(root / top)}"))
    classes = [(top, split) for top, split in nested if "/" not in top]
    if len({top for top, _ in classes}) > 1:
        turned = _quoted(f"{root.absolute()}-by-split")
        splits = " ".join(map(_quoted, sorted({split for _, split in classes})))
        turn = (
            f'(cd {_quoted(root)} && for split in {splits}; do mkdir -p {turned}/"$split"; for class in '
            f'*/; do [ -d "$class$split" ] && ln -s "$PWD/$class$split" {turned}/"$split/${{class%/}}"; done; done); '
            f"fastflower pack {turned}"
        )
        readings.append(("each class has splits of its own", turn))
    try:
        check_classes(root, tops, anew=True)
        readings.append(("a split is to be drawn of all images", f"fastflower pack {_quoted(root)} --split-by class"))
    except FolderError:  # which refuses them as classes
        readings.append(_as_classes(root, tops))
    (top, split), *_ = nested
    return _unclear(root, f"{top}/{split} is named as a split, below the class {top.partition('/')[0]!r}", readings)


def _those_in(root: Path, tops: Iterable[str], also: str = "") -> list[tuple[str, str]]:
    """The reading that the classes are those in a folder, for each that has some."""
    several = [top for top in (_inner(root, top) for top in tops) if len(subfolders(root / top)) > 1]
    return [
        (f"the classes are those in {top!r}{also and f', {also}'}", f"fastflower pack {_quoted(root / top)}")
        for top in several[:_MOST_NAMES]
    ]


def _hiding(root: Path, tops: Sequence[str]) -> str:
    places = [root / top for top in tops if (root / top).exists()]
    moves = [f"mv {_quoted(place)} {_quoted(place.with_name(f'.{place.name}'))}" for place in places]
    return " && ".join([*moves, f"fastflower pack {_quoted(root)}"])


def _sorting(root: Path, tops: Sequence[str]) -> tuple[str, str]:
    remedy = f"put them into {root / tops[0]}/CLASS, or write {root / 'train.txt'} and val.txt with lines 'PATH LABEL'"
    return f"the images of {_names(tops)} have labels", remedy


def _as_classes(root: Path, tops: Sequence[str]) -> tuple[str, str]:
    """The reading that takes every folder for a class, whatever its name: by a list, which goes before all else."""
    names = " ".join(map(_quoted, tops)) if len(tops) <= _MOST_NAMES else "*/"
    return f"the classes are {_names(tops)}", _listing(root, names)


def _listing(root: Path, names: str) -> str:
    listing = f"(cd {_quoted(root)} && find -L {names} -type f > train.txt)"
    return f"{listing} && fastflower pack {_quoted(root)} --split-by class"


def _quoted(path: Path | str) -> str:
    """As a shell reads it; of names that cannot be shown, bytes that are no UTF-8 or line breaks, as bash reads it."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    shown = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(path))
    return f"$'{''.join(shown)}'"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" and others" if len(names) > _MOST_NAMES else "")
