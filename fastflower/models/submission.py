"""CSV tables of predictions: all that is known of each image, or a submission to a competition."""

import csv
import io
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fastflower.errors import ArgumentError, FolderError, require
from fastflower.files import blame_the_system, write_out
from fastflower.models.predictor import Prediction
from fastflower.models.sources import Source
from fastflower.packing.text import read_lines

_log = logging.getLogger("fastflower")

Ids = Literal["name", "stem"]
_MOST_NAMES = 3  # per message


class Table:
    """Collects predictions, and writes them as a CSV file. Without `out`, writes nothing.

    images  A list, unless neither columns nor sample is given. The other arguments are those of `predict`. Raises ArgumentError
    if one is invalid, `out` cannot be written, or an image of the sample is missing.
    """

    images: list[Source] | Iterator[Source]
    """The images to predict: all, or those of the sample."""

    def __init__(
        self,
        out: str | Path | None,
        classes: Sequence[str],
        images: list[Source] | Iterator[Source],
        *,
        columns: Sequence[str] | None = None,
        ids: Ids | None = None,
        sample: str | Path | None = None,
    ) -> None:
        self._out, self._classes = None if out is None else Path(out), classes
        if self._out and (self._out.is_dir() or not os.access(self._out.parent, os.W_OK)):  # fail before predicting
            raise ArgumentError(f"out: {out} cannot be written; choose a file in an existing folder.")
        for name, value in (("columns", columns), ("sample", sample)):
            shown = str(value) if isinstance(value, Path) else value
            require(value is None or out is not None, name, "used with out (--out), the file to write", shown)
        require(columns is None or sample is None, "columns", "None with sample, which has the header", columns)
        require(ids in ("name", "stem", None), "ids", "'name' or 'stem'", ids)
        require(ids is None or columns is not None, "ids", "used with columns (--columns)", ids)
        self.images = images
        self._header, self._shown = ["path", "class", "probability", *classes], classes
        self._ids: dict[int, str] | None = None  # by index of the image, in the order of the table
        self._rows: dict[int, list[object]] = {}  # by index of the image
        if columns is not None:
            listed = not isinstance(columns, str) and len(set(columns)) == len(columns) > 1
            require(listed, "columns", "two or more different names, such as ('id', 'label')", columns)
            self._set_header("columns", columns)
            self._ids = {one.index: file.stem if ids == "stem" else file.name for one, file in _files(images)}
            twice = [one for one, count in Counter(self._ids.values()).items() if count > 1]
            require(not twice, "columns", "used with images of different names (or use sample)", twice[:_MOST_NAMES])
        elif sample is not None:
            self._ids = self._follow(Path(sample), images)
            self.images = [one for one in images if one.index in self._ids]

    def add(self, source: Source, prediction: Prediction | None) -> None:
        """Add an image. Without a prediction, the cells after its path or id are empty."""
        if self._out is None:
            return
        first = source.name if self._ids is None else self._ids[source.index]
        cells: list[object] = [""] * (len(self._header) - 1)
        if prediction is not None:
            whole = [prediction.class_name, prediction.probability] if self._ids is None else [prediction.class_name]
            cells = [*whole[: len(cells) - len(self._shown)], *map(prediction.probabilities.__getitem__, self._shown)]
        self._rows[source.index] = [first, *cells]

    def write(self) -> None:
        """Write the file. Raises ArgumentError if that fails."""
        if self._out is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._header)
        writer.writerows(self._rows[index] for index in self._ids or self._rows)
        write_out(self._out, text.getvalue().encode("utf-8", "backslashreplace"))  # a file name need not be UTF-8

    def _set_header(self, where: str, header: Sequence[str]) -> None:
        """Set the header, and what stands below it: probabilities if all columns after the first are classes, or the label."""
        wrong = [name for name in header[1:] if name not in self._classes]
        if wrong and len(header) > 2:
            raise ArgumentError(
                f"{where}: {_are_no_classes(wrong, self._classes)}; name the id and the label, or the id and classes "
                f"({_some(self._classes)})."
            )
        self._header, self._shown = list(header), () if wrong else header[1:]

    def _follow(self, sample: Path, images: list[Source] | Iterator[Source]) -> dict[int, str]:
        """Set the header from a sample. Return its ids, in order, by the index of the image that each names."""
        try:
            header, *rows = csv.reader(text for _, text in read_lines(sample))
        except OSError as error:
            blame_the_system(error, sample)
            raise ArgumentError(f"sample: {sample} cannot be read ({error.strerror}); pass a CSV file.") from None
        except (FolderError, ValueError, csv.Error) as error:
            raise ArgumentError(f"sample: {sample} has no header and rows ({error}); pass a CSV file.") from None
        header = [name.strip() for name in header]
        if not rows or len(header) < 2:
            raise ArgumentError(f"sample: {sample} must have a header, rows, and two or more columns in each.")
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                cells = f"row {number} has {len(row)} cell{'s' * (len(row) > 1)}, the header has {len(header)}"
                raise ArgumentError(f"sample: {sample}: {cells}; download the file again, or correct the row.")
        self._set_header(str(sample), header)
        self._compare_classes(sample, header, {row[1].strip() for row in rows} - {""})
        found, depths = defaultdict[str, list[Source]](list), {row[0].count("/") + 1 for row in rows}
        for one, file in _files(images):
            for depth in depths:
                tail = "/".join(file.parts[-depth:])
                found[tail].append(one)
                if file.suffix:
                    found[tail.removesuffix(file.suffix)].append(one)
        ids = [row[0] for row in rows]
        missing = [name for name in ids if not found.get(name)]
        if missing:
            raise ArgumentError(
                f"{sample}: {len(missing)} of {len(ids)} ids name no image, such as {_some(missing)}; pass the folder of all "
                f"images that it lists."
            )
        unclear = [name for name in ids if len(found[name]) > 1]
        if unclear:
            both = " and ".join(one.name for one in found[unclear[0]][:2])
            raise ArgumentError(f"{sample}: id {unclear[0]!r} names {both}; pass only the images that it lists.")
        chosen = {found[name][0].index: name for name in ids}
        if len(chosen) < len(ids):
            twice = Counter(found[name][0].name for name in ids).most_common(1)[0][0]
            raise ArgumentError(f"{sample}: has two rows for {twice}; remove one.")
        if others := len(images) - len(chosen) if isinstance(images, list) else 0:
            _log.warning("%s: does not list %d of the images, which are not predicted", sample, others)
        return chosen

    def _compare_classes(self, sample: Path, header: list[str], labels: set[str]) -> None:
        """Compare the sample's classes with those of the network. Raises ArgumentError if all of its labels are others."""
        if self._shown:
            if absent := [name for name in self._classes if name not in self._shown]:
                _log.warning("%s: has no column for %s, whose probabilities are left out", sample, _some(absent))
        elif wrong := sorted(labels.difference(self._classes)):
            what = f"{sample}: column {header[1]!r}: {_are_no_classes(wrong, self._classes)}"
            if len(wrong) < len(labels):
                _log.warning("%s, which never predicts %s", what, "it" if len(wrong) == 1 else "them")
                return
            raise ArgumentError(
                f"{what} ({_some(self._classes)}); pass a network that was trained on these classes, or write class names "
                f"with columns ({header[0]!r}, {header[1]!r}) (--columns {','.join(header)})."
            )


def _files(images: list[Source] | Iterator[Source]) -> Iterator[tuple[Source, Path]]:
    """Yield each image with its path. Raises ArgumentError if one has none."""
    if not isinstance(images, list):
        raise ArgumentError("images must be a list, not an iterator, with columns or sample; pass list(images).")
    for one in images:
        if one.file is None:
            raise ArgumentError(f"{one.name}: has no file name for its id; pass paths with columns or sample.")
        yield one, one.file


def _are_no_classes(names: Sequence[str], classes: Sequence[str]) -> str:
    """Say of names that they are no classes of the network, and which are meant if their spelling is near."""
    plain = {name.casefold(): name for name in classes}
    near = [plain[close] for name in names[:_MOST_NAMES] for close in get_close_matches(name.casefold(), plain, 1)]
    meant = f" (did you mean {_some(list(dict.fromkeys(near)))}?)" if near else ""
    verb = "is not a class" if len(names) == 1 else "are not classes"
    return f"{_some(names)} {verb} of the network{meant}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_NAMES]))
    return f"{shown}, ..." if len(names) > _MOST_NAMES else shown
