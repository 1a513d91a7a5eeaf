"""Reads the text of lists and tables: lines, and the records of JSON files."""

import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fastflower.errors import FolderError
from fastflower.shards.kinds import kind_of

_LINES = (".jsonl", ".ndjson")
_TO_CSV = {".parquet": "read_parquet", ".xlsx": "read_excel", ".xls": "read_excel", ".feather": "read_feather"}


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line that is not blank. Reads UTF-8 and UTF-16; keeps other bytes as paths do."""
    try:
        with file.open(encoding=encoding_of(file), errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    raise _unreadable(file, number)
                if not line.isspace():
                    yield number, line.rstrip("\r\n")
    except UnicodeError:
        raise FolderError(f"{file}: is not valid UTF-16; save it as UTF-8.") from None


def _unreadable(file: Path, line: int) -> FolderError:
    """Return the error for a file that is not text."""
    reader = _TO_CSV.get(file.suffix.lower())
    if reader:
        command = f"""python -c "import pandas; pandas.{reader}('{file}').to_csv('{file.stem}.csv', index=False)\""""
        return FolderError(f"{file}: is not text; convert it: {command}")
    with file.open("rb") as stream:
        kind = kind_of(stream.read(1024))
    if kind:
        return FolderError(f"{file}: {kind}, not a list or a table; save it as CSV.")
    return FolderError(f"{file}, line {line}: contains a null byte; save the file as UTF-8.")


def encoding_of(file: Path) -> str:
    """Return the encoding of a file, by its first bytes: UTF-8 or UTF-16, with or without a byte order mark."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
        return "utf-16"
    without_bom = {b"\0": "utf-16-be"}.get(start[:1]) or {b"\0": "utf-16-le"}.get(start[1:2])
    return without_bom or "utf-8-sig"


def read_records(file: Path) -> Iterator[tuple[int, dict[str, str]]] | None:
    """Return an iterator over the (line, values by name) of a JSON file, or None for other files.

    Reads JSON lines, an array of objects, and COCO's images, annotations and categories.
    """
    suffix = file.suffix.lower()
    start = next((text.lstrip()[:1] for _, text in read_lines(file)), "")
    if suffix in _LINES or (start == "{" and suffix not in (".csv", ".tsv", ".json")):
        return _json_lines(file)
    if suffix == ".json" or start == "[":
        return _json_array(file)
    return None


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, text in read_lines(file):
        yield number, _record(f"{file}, line {number}", _parsed(f"{file}, line {number}", text))


def _json_array(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    lines = dict(read_lines(file))
    content: Any = _parsed(str(file), "\n".join(lines.values()), lines)
    if isinstance(content, dict) and {"images", "annotations"} <= cast("set[str]", content.keys()):
        content = _coco(file, cast("dict[str, Any]", content))
    if not isinstance(content, list):
        raise FolderError(f'{file}: is not an array of objects; write [{{"file_name": ...}}, ...].')
    for number, value in enumerate(cast("list[object]", content), 1):
        yield number, _record(f"{file}, object {number}", value)


def _coco(file: Path, content: dict[str, Any]) -> list[dict[str, object]]:
    """Return path and class of each annotation of a file in COCO's format, which iNaturalist and FGVC competitions use."""
    try:
        paths = {image["id"]: image["file_name"] for image in content["images"]}
        names = {category["id"]: category["name"] for category in content.get("categories", ())}
        return [
            {"path": paths[note["image_id"]], "label": names.get(note["category_id"], note["category_id"])}
            for note in content["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise FolderError(
            f"{file}: is not in COCO's format (key {error} is missing); write a table PATH,LABEL."
        ) from None


def _parsed(where: str, text: str, lines: dict[int, str] | None = None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if lines and all(line.lstrip().startswith("{") for line in lines.values()):
            return [json.loads(line) for line in lines.values()]
        raise FolderError(f"{where}: is not JSON ({error}); write one object per line.") from None


def _record(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FolderError(f"{where}: is not a JSON object; write one object per line.")
    return {str(name): _text(item) for name, item in cast("dict[object, object]", value).items()}


def _text(value: Any) -> str:
    if isinstance(value, list) and len(cast("list[Any]", value)) == 1:
        value = cast("list[Any]", value)[0]
    if isinstance(value, dict) and "name" in value:
        value = cast("dict[str, Any]", value)["name"]
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None else str(cast("object", value))
