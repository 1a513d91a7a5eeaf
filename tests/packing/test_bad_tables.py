"""Tables that cannot be read, or have more than one meaning, are refused with file and line."""

from pathlib import Path

import pytest
from listed import FLAT, tables, write
from packs import exactly, touch

from fastflower.errors import FolderError
from fastflower.packing.folder import scan

BAD_TABLES = {
    "no column of paths": (
        {"t.csv": "x,y\n7,a\n"},
        {"label": "y"},
        "t.csv: has no column of paths; choose one of 'x', 'y', for example:\n  pack(folder, path_column='x')",
    ),
    "several columns": (
        {"t.csv": "image,x,y\n1,a,b\n"},
        {},
        "t.csv: has no column named 'label' or 'class'; choose one of 'x', 'y', for example:\n  pack(folder, label_column='x')",
    ),
    "several columns of labels": (
        {"t.csv": "image,label,class\n1,a,b\n2,a,c\n"},
        {},
        "t.csv: has more than one column of labels; choose one of 'label', 'class', for example:\n  "
        "pack(folder, label_column='label')",
    ),
    "a column that does not exist": (
        {"t.csv": "image,label\n1,a\n"},
        {"label": "labels"},
        "t.csv: has no column 'labels'; choose one of 'image', 'label', for example:\n  pack(folder, label_column='label')",
    ),
    "a short row": (
        {"t.csv": "image,label\n1,a\n2\n"},
        {},
        "t.csv, line 3: has 1 columns, but the first line has 2; correct it, or quote cells that contain ','.",
    ),
    "a row without a label": (
        {"t.csv": "image,label\n1,a\n2,\n"},
        {},
        "t.csv, line 3: '2.jpg' has no label; add it, or remove the line.",
    ),
    "a split that is none": (
        {"t.csv": "image,label,split\n1,a,train\n2,b,later\n"},
        {},
        "t.csv, line 3: 'later' is not a split; write train, val or test.",
    ),
    "a missing split": (
        {"t.csv": "image,label,split\n1,a,train\n2,b,\n"},
        {},
        "t.csv, line 3: '' is not a split; write train, val or test.",
    ),
    "no training images": (
        {"t.csv": "image,label,split\n1,a,val\n2,b,test\n"},
        {},
        "t.csv: names images only for val, test; add those of the train split.",
    ),
    "broken JSON": (
        {"t.jsonl": '{"image": "1"\n'},
        {},
        "t.jsonl, line 1: is not JSON (Expecting ',' delimiter: line 1 column 14 (char 13)); write one object per line.",
    ),
    "other JSON": ({"t.jsonl": "[1, 2]\n"}, {}, "t.jsonl, line 1: is not a JSON object; write one object per line."),
    "names without images": (
        {"t.txt": "a\nb\n"},
        {},
        "t.txt: its 2 lines name no images, and are not one label for each of the 2 images in {root}; "
        "write one line 'PATH LABEL' per image.",
    ),
    "too few labels": (
        {"t.txt": "a\nb\nc\n"},
        {},
        "t.txt: its 3 lines name no images, and are not one label for each of the 2 images in {root}; "
        "write one line 'PATH LABEL' per image.",
    ),
    "a quote that is not closed": (
        {"t.csv": 'image,label\n1,"a\n2,b\n'},
        {},
        "t.csv, line 2: has a quote that is not closed on this line; remove it, or close it.",
    ),
    "too many cells": (
        {"t.csv": "image,label\n1.jpg,red, dark\n2.jpg,b\n"},
        {},
        "t.csv, line 2: has 3 columns, but the first line has 2; correct it, or quote cells that contain ','.",
    ),
    "two labels": (
        {"t.csv": "image,a,b\n1,1,0\n2,1,1\n"},
        {},
        "t.csv, line 3: has 2 labels; each image must have exactly one; "
        "remove the row, or choose one column, for example:\n  pack(folder, label_column='a')",
    ),
    "a list as a label": (
        {"t.jsonl": '{"image": "1.jpg", "label": ["a", "b"]}\n'},
        {},
        't.jsonl, line 1: label must be a name or a number, got ["a", "b"].',
    ),
    "a switch that is none": (
        {"t.csv": "image,label,is_valid\n1,a,perhaps\n2,b,True\n"},
        {},
        "t.csv, line 2: is_valid must be true or false, got 'perhaps'.",
    ),
    "a label that is not UTF-8": (
        {"t.csv": b"image,label\n1,caf\xe9\n2,b\n"},
        {},
        "t.csv, line 2: the label is not UTF-8; save the file as UTF-8.",
    ),
    "another table": (
        {"t.xlsx": b"PK\3\4\0\0"},
        {},
        "t.xlsx: is not text; convert it: "
        """python -c "import pandas; pandas.read_excel('{root}/t.xlsx').to_csv('t.csv', index=False)\"""",
    ),
    "another file": (
        {"t.txt": b"%PDF-1.4 \0\n"},
        {},
        "t.txt: is a PDF document, not a list or a table; save it as CSV.",
    ),
    "an object": ({"t.json": '{"a": 1}'}, {}, 't.json: is not an array of objects; write [{"file_name": ...}, ...].'),
    "half of COCO": (
        {"t.json": '{"images": [{"id": 1}], "annotations": []}'},
        {},
        "t.json: is not in COCO's format (key 'file_name' is missing); write a table PATH,LABEL.",
    ),
    "columns of numbers": (
        {"t.txt": "1.jpg 1 1 2\n2.jpg 2 1 2\n"},
        {},
        "t.txt: has 4 columns; choose that of the labels, 2 to 4, for example:\n  pack(folder, label_column='2')",
    ),
    "two columns of paths": (
        {"t.csv": "first,second,label\n1.jpg,2.jpg,a\n2.jpg,1.jpg,b\n"},
        {},
        "t.csv: more than one column names images; choose one of 'first', 'second', for example:\n  "
        "pack(folder, path_column='first')",
    ),
    "two labels for one image": (
        {"t.csv": "image,label\n1,a\n2,b\n1,b\n"},
        {},
        "t.csv, line 4: '1.jpg' is listed twice; remove one of the lines.",
    ),
    "only unlabeled test images": (
        {"t.csv": "image,label,split\n1,,test\n2,,test\n"},
        {},
        "t.csv: names only test images without a label; add training images.",
    ),
    "numbers that may begin with 0 or 1": (
        {"t.csv": "image,label\n1,1\n2,2\n", "classes.txt": "a\nb\nc\n"},
        {},
        "t.csv: the labels are numbers from 1 to 2, and there are 3 classes, so it is not clear whether they count from 0 or "
        "1; write the names of the classes.",
    ),
    "no table": ({}, {}, "t.csv: is not a file; pass a list or a table (CSV, TSV, JSON lines) with --labels."),
    "a huge field": (
        {"t.csv": f'image,label\n1,"{"x" * 140000}"\n'},
        {},
        "t.csv, line 2: is not CSV (field larger than field limit (131072)); correct it.",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    texts, columns, message = BAD_TABLES[name]
    root = write(touch(tmp_path / "data", *FLAT), {**texts})
    with pytest.raises(FolderError, match=exactly(f"{root}/{message.replace('{root}', str(root))}")):
        scan(root, tables(root, next(iter(texts), "t.csv"), **columns))
