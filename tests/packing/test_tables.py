"""Tables of labels and splits: read in any spelling that has one meaning, else refused with file and line."""

import re
from collections import Counter
from pathlib import Path

import pytest
from listed import AB, FLAT, labeled, tables, write
from packs import drawn, exactly, paths, samples, touch

from fastflower import pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing.folder import EMPTY_CLASS, scan
from fastflower.packing.listing import Tables

TABLES = {
    "names of Kaggle": (FLAT, {"t.csv": "image_id,label\n1,a\n2,b\n"}, {}, AB),
    "capitals and other names": (FLAT, {"t.csv": "Image Name;Class\n1.jpg;a\n2.jpg;b\n"}, {}, AB),
    "the only other column": (FLAT, {"t.csv": "id,breed\n1,a\n2,b\n"}, {}, AB),
    "Image and Id": (FLAT, {"t.csv": "Image,Id\n1.jpg,a\n2.jpg,b\n"}, {}, AB),
    "numbers": (FLAT, {"t.csv": "image,diagnosis\n1,0\n2,10\n"}, {}, {"1.jpg": "0", "2.jpg": "10"}),
    "numbers with a point": (FLAT, {"t.csv": "image,label\n1,0.0\n2,1.0\n"}, {}, {"1.jpg": "0", "2.jpg": "1"}),
    "numbers and classes.txt": (FLAT, {"t.csv": "image,label\n1,0\n2,1\n", "classes.txt": "a\nb"}, {}, AB),
    "a chosen column": (FLAT, {"t.csv": "image_id,dx,age\n1,a,5\n2,b,6\n"}, {"label": "dx"}, AB),
    "a chosen column of paths": (FLAT, {"t.csv": "who,what\n1,a\n2,b\n"}, {"path": "who"}, AB),
    "a chosen column by number": (FLAT, {"t.txt": "1 5 a 6\n2 5 b 6\n"}, {"label": "3"}, AB),
    "no header": (FLAT, {"t.csv": "1.jpg,a\n2.jpg,b\n"}, {}, AB),
    "no header, paths last": (FLAT, {"t.csv": "a,1.jpg\nb,2.jpg\n"}, {}, AB),
    "quotes": (
        ["a, b.jpg", "2.jpg"],
        {"t.csv": 'file,label\n"a, b.jpg","red, dark"\n2.jpg,b\n'},
        {},
        {"a, b.jpg": "red, dark", "2.jpg": "b"},
    ),
    "tabs": (FLAT, {"t.tsv": "file_name\tlabel\n1.jpg\ta\n2.jpg\tb\n"}, {}, AB),
    "JSON lines": (
        FLAT,
        {"t.jsonl": '{"file_name": "1.jpg", "label": "a"}\n{"label": "b", "file_name": "2.jpg"}\n'},
        {},
        AB,
    ),
    "JSON lines of numbers": (
        FLAT,
        {"t.jsonl": '{"file_name": "1.jpg", "label": 0}\n{"file_name": "2.jpg", "label": 1}\n'},
        {},
        {"1.jpg": "0", "2.jpg": "1"},
    ),
    "images in several folders": (
        ["part_1/1.jpg", "part_2/2.jpg"],
        {"t.csv": "id,label\n1,a\n2,b\n"},
        {},
        {"part_1/1.jpg": "a", "part_2/2.jpg": "b"},
    ),
    "a split": (
        [*FLAT, "3.jpg"],
        {"t.csv": "file,label,split\n1.jpg,a,Train\n2.jpg,b,training\n3.jpg,a,valid\n"},
        {},
        {"1.jpg": "a train", "2.jpg": "b train", "3.jpg": "a val"},
    ),
    "splits in the paths": (
        ["train/1.jpg", "train/2.jpg", "val/3.jpg"],
        {"t.csv": "file,label\ntrain/1.jpg,a\ntrain/2.jpg,b\nval/3.jpg,a\n"},
        {},
        {"train/1.jpg": "a train", "train/2.jpg": "b train", "val/3.jpg": "a val"},
    ),
    "one split in the paths": (
        ["train/1.jpg", "train/2.jpg", "test/3.jpg"],
        {"t.csv": "file,label\n1,a\n2,b\n"},
        {},
        {"train/1.jpg": "a", "train/2.jpg": "b"},
    ),
    "a table beside the images": (
        ["train/1.jpg", "train/2.jpg"],
        {"train/metadata.csv": "file_name,label\n1.jpg,a\n2.jpg,b\n"},
        {},
        {"train/1.jpg": "a", "train/2.jpg": "b"},
    ),
    "a column of splits called set": (
        [*FLAT, "3.jpg"],
        {"t.csv": "file,label,set\n1.jpg,a,train\n2.jpg,b,train\n3.jpg,a,val\n"},
        {},
        {"1.jpg": "a train", "2.jpg": "b train", "3.jpg": "a val"},
    ),
    "a column that holds splits": (
        [*FLAT, "3.jpg"],
        {"t.csv": "file,label,what\n1.jpg,a,Training\n2.jpg,b,trainval\n3.jpg,a,holdout\n"},
        {},
        {"1.jpg": "a train", "2.jpg": "b train", "3.jpg": "a test"},
    ),
    "is_valid": (
        [*FLAT, "3.jpg"],
        {"t.csv": "name,label,is_valid\n1.jpg,a,False\n2.jpg,b,False\n3.jpg,a,True\n"},
        {},
        {"1.jpg": "a train", "2.jpg": "b train", "3.jpg": "a val"},
    ),
    "path, label and split without a header": (
        [*FLAT, "3.jpg"],
        {"t.txt": "1.jpg a train\n2.jpg b train\n3.jpg a val\n"},
        {},
        {"1.jpg": "a train", "2.jpg": "b train", "3.jpg": "a val"},
    ),
    "an unusual header": (FLAT, {"t.csv": "picture,disease\n1.jpg,a\n2.jpg,b\n"}, {}, AB),
    "names of files in another column than id": (
        FLAT,
        {"t.csv": "id,photo,label\n1,2.jpg,a\n2,1.jpg,b\n"},
        {},
        {"1.jpg": "b", "2.jpg": "a"},
    ),
    "the index of pandas": (FLAT, {"t.csv": ",image,breed\n0,1.jpg,a\n1,2.jpg,b\n"}, {}, AB),
    "the unnamed index of pandas": (FLAT, {"t.csv": "Unnamed: 0,image,breed\n0,1,a\n1,2,b\n"}, {}, AB),
    "a column for each class": (FLAT, {"t.csv": "image,a,b\n1,1.0,0.0\n2,0.0,1.0\n"}, {}, AB),
    "numbers and names of the classes": (FLAT, {"t.csv": "image,class_id,class_name\n1,7,a\n2,3,b\n"}, {}, AB),
    "comments and blank lines": (FLAT, {"t.csv": "sep=,\n\n# labels of June\nimage,label\n1,a\n2,b\n"}, {}, AB),
    "spaces after commas": (FLAT, {"t.csv": 'image, label\n1.jpg, "a"\n2.jpg, b\n'}, {}, AB),
    "a trailing comma": (FLAT, {"t.csv": "image,label\n1.jpg,a,\n2.jpg,b,\n"}, {}, AB),
    "a row twice": (FLAT, {"t.csv": "image,label\n1,a\n2,b\n1,a\n"}, {}, AB),
    "another extension": (FLAT, {"t.csv": "image,label\n1.png,a\n2.jpeg,b\n"}, {}, AB),
    "letters with accents in two parts": (
        ["e\u0301.jpg", "2.jpg"],
        {"t.csv": "image,label\n\u00e9.jpg,a\n2.jpg,b\n"},
        {},
        {"e\u0301.jpg": "a", "2.jpg": "b"},
    ),
    "a JSON array": (
        FLAT,
        {"t.json": '[{"image": "1.jpg", "label": "a"},\n {"image": "2.jpg", "label": "b"}]'},
        {},
        AB,
    ),
    "addresses": (FLAT, {"t.csv": "image_url,label\nhttps://x.org/i/1.jpg,a\nhttps://x.org/i/2.jpg?raw=1,b\n"}, {}, AB),
    "numbers of pandas": (FLAT, {"t.csv": "id,label\n1.0,a\n2.0,b\n"}, {}, AB),
    "COCO": (
        FLAT,
        {
            "t.json": '{"images": [{"id": 5, "file_name": "1.jpg"}, {"id": 6, "file_name": "2.jpg"}], "annotations": '
            '[{"image_id": 5, "category_id": 1}, {"image_id": 6, "category_id": 2}], '
            '"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}'
        },
        {},
        AB,
    ),
    "lists and objects of one name in JSON": (
        FLAT,
        {"t.jsonl": '{"image": "1.jpg", "label": ["a"]}\n{"image": "2.jpg", "label": {"id": 3, "name": "b"}}\n'},
        {},
        AB,
    ),
    "a label for each image in order": (
        [*FLAT, "3.jpg"],
        {"truth.txt": "n01\nn02\nn02\n"},
        {},
        {"1.jpg": "n01", "2.jpg": "n02", "3.jpg": "n02"},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_labels_the_images_that_it_names(tmp_path: Path, name: str) -> None:
    files, texts, columns, expected = TABLES[name]
    root = write(touch(tmp_path / "data", *files), {**texts})
    found = scan(root, tables(root, next(iter(texts)), **columns))
    assert labeled(found) == expected
    bare = {label.split()[0] if found.splits else label for label in expected.values()}
    assert found.classes == tuple(sorted(bare, key=lambda text: (int(text) if text.isdigit() else 0, text)))


def test_images_of_train_and_val_may_be_in_tables_named_after_their_splits(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    for name in ("train", "test"):
        write(root, {f"{name}/metadata.csv": "file_name,label\n1.png,a\n" + ("2.png,b\n" if name == "train" else "")})
    expected = {"train/1.png": "a train", "train/2.png": "b train", "test/1.png": "a test"}
    assert labeled(scan(root, tables(root, "train/metadata.csv", "test/metadata.csv"))) == expected


@pytest.mark.parametrize("labels", ["val/val_annotations.txt", "truth.txt"])
def test_a_table_for_a_flat_val_is_combined_with_the_class_folders_of_train(
    tmp_path: Path, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tiny ImageNet has a table; ImageNet's flat val has one label for each image in the order of their names."""
    train = [f"train/{name}/images/{name}_{number}.jpg" for name in ("n1", "n2") for number in (0, 1)]
    val = [f"val/images/val_{number}.jpg" for number in range(3 if "truth" in labels else 2)]
    root = touch(tmp_path, *train, *val, "test/images/test_0.jpg")
    write(root, {labels: "n2\nn1\nn1\n" if "truth" in labels else "val_0.jpg\tn2\t0\t9\nval_1.jpg\tn1\t0\t9\n"})
    if "truth" in labels:
        (root / "test/images/test_0.jpg").unlink()
    found = scan(root, tables(root, labels, **({} if "truth" in labels else {"label": "2"})))
    expected = {path: f"{path.split('/')[1]} train" for path in train}
    expected |= {path: f"{name} val" for path, name in zip(val, ("n2", "n1", "n1"), strict=False)}
    assert labeled(found) == expected
    unlisted = f"1 images in {root} are not in {root / labels} and are skipped"
    assert caplog.messages == ([] if "truth" in labels else [unlisted])


def test_several_tables_must_be_named_after_splits(tmp_path: Path) -> None:
    root = write(touch(tmp_path, *FLAT), {"one.csv": "image,label\n1,a", "two.csv": "image,label\n2,b"})
    rule = "several files must be named after their splits, such as train.csv and val.csv"
    text = f"--labels {root}/one.csv, {root}/two.csv: {rule}; rename them, or write one table with a column 'split'."
    with pytest.raises(FolderError, match=exactly(text)):
        scan(root, tables(root, "one.csv", "two.csv"))


def test_unlabeled_test_images_and_images_in_no_table_are_skipped_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "1,a,train\n2,b,train\n3,,test\n4,,test\n"
    root = write(touch(tmp_path, *(f"{n}.jpg" for n in range(1, 7))), {"t.csv": "image,label,split\n" + rows})
    found = scan(root, tables(root, "t.csv"))
    assert labeled(found) == {"1.jpg": "a train", "2.jpg": "b train"}
    assert found.ignored == (("3.jpg", "has no label"), ("4.jpg", "has no label"))
    assert caplog.messages == [
        f"{root}/t.csv: 2 test images without a label are skipped; classify them with `fastflower predict`",
        f"2 images in {root} are not in {root}/t.csv and are skipped",
    ]


SPLITS = {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}


@pytest.mark.parametrize("header", ["path,split\n", "file_name,split,age\n", ""])
@pytest.mark.parametrize("labels", ["", "labels.csv"])
def test_a_table_of_splits_divides_class_folders_and_labeled_images(tmp_path: Path, header: str, labels: str) -> None:
    places = {name: name if labels else f"{'ab'[number % 2]}/{name}" for number, name in enumerate(SPLITS)}
    root = touch(tmp_path, *places.values(), "b/5.jpg")
    rest = ",7" if "age" in header else ""
    lines = [f"{places[name]},{split}{rest}\n" for name, split in SPLITS.items()]
    write(root, {"s.csv": header + "".join(lines), "labels.csv": "image,label\n1,a\n2,b\n3,a\n4,b\n5,b"})
    found = scan(root, tables(root, *([labels] if labels else []), split="s.csv"))
    expected = {places[name]: f"{'ab'[number % 2]} {split}" for number, (name, split) in enumerate(SPLITS.items())}
    assert labeled(found) == expected
    assert found.ignored == (("b/5.jpg", "is not in s.csv"),)


def test_lists_of_paths_named_after_splits_divide_class_folders(tmp_path: Path) -> None:
    """The Describable Textures Dataset has such lists."""
    root = touch(tmp_path / "images", *(f"{name}/{number}.jpg" for name in "ab" for number in (1, 2)))
    lists = write(
        tmp_path / "labels", {"train1.txt": "a/1.jpg\nb/1.jpg\n", "val1.txt": "a/2.jpg\n", "test1.txt": "b/2.jpg"}
    )
    files = [lists / f"{name}1.txt" for name in ("test", "train", "val")]
    expected = {"a/1.jpg": "a train", "b/1.jpg": "b train", "a/2.jpg": "a val", "b/2.jpg": "b test"}
    assert labeled(scan(root, Tables(split=files))) == expected
    assert labeled(scan(root, Tables(labels=files))) == expected


@pytest.mark.parametrize("place", ["", "train_images/"])
def test_a_table_beside_a_flat_folder_is_named_with_the_command_that_packs_it(tmp_path: Path, place: str) -> None:
    root = touch(tmp_path / "my data", "train_images/1.jpg", "train_images/2.jpg", "test_images/3.jpg")
    write(root, {"train.csv": "image_id,label\n1,a\n2,b\n", "other.csv": "x,y\n1,2\n"})
    command = f"fastflower pack '{root / place}'".replace("/'", "'") + f" --labels '{root}/train.csv'"
    with pytest.raises(FolderError, match=re.escape(f"\n  train.csv names 2 of these images: {command}") + "(\n|$)"):
        scan(root / place)
    assert labeled(scan(root / place, tables(root, "train.csv"))) == {
        f"{'' if place else 'train_images/'}{number}.jpg": "ab"[number - 1] for number in (1, 2)
    }


def test_a_table_without_a_usual_label_column_is_named_too(tmp_path: Path) -> None:
    root = write(touch(tmp_path, "1.jpg", "2.jpg"), {"meta.csv": "image_id,dx,age\n1,a,5\n2,b,6\n"})
    command = f"fastflower pack {root} --labels {root}/meta.csv --label-column COLUMN"
    with pytest.raises(FolderError, match=f"\n  meta.csv names 2 of these images: {re.escape(command)}$"):
        scan(root)


def test_pack_draws_a_test_split_and_reads_tables_from_the_folder(tmp_path: Path) -> None:
    root = drawn(tmp_path / "data", a=20, b=10)
    write(
        root,
        {"t.csv": "image,label\n" + "".join(f"{p.relative_to(root)},{p.parent.name}x\n" for p in root.glob("*/*"))},
    )
    manifest = pack(root, tmp_path / "out", labels="t.csv", val_fraction=0.2, test_fraction=0.1)
    assert manifest.classes == ("ax", "bx")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (14, 7),
        "val": (4, 2),
        "test": (2, 1),
    }
    found = Counter(sample.path for name in manifest.splits for sample in samples(tmp_path / "out", name))
    assert set(found.values()) == {1}
    assert len(found) == 30
    pack(root, tmp_path / "before", labels="t.csv", val_fraction=0.2)
    assert paths(tmp_path / "out", "val") == paths(tmp_path / "before", "val")


def test_the_fractions_must_leave_training_images(tmp_path: Path) -> None:
    rule = "test_fraction must be at least 0 and, added to val_fraction, less than 1, got 0.5."
    with pytest.raises(ArgumentError, match=exactly(rule)):
        pack(tmp_path, val_fraction=0.5, test_fraction=0.5)


def test_labels_in_order_are_refused_if_numbers_and_names_sort_differently(tmp_path: Path) -> None:
    root = write(touch(tmp_path, *(f"{n}.jpg" for n in range(1, 13))), {"t.txt": "a\n" * 6 + "b\n" * 6})
    what = "has one label per line, but the images have another order by name than by number (1, 10, 2)"
    with pytest.raises(FolderError, match=exactly(f"{root}/t.txt: {what}; write lines 'PATH LABEL'.")):
        scan(root, tables(root, "t.txt"))


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Test"), ("train_images", "test_images")])
def test_among_equal_names_the_one_in_the_folder_of_the_split_is_meant(tmp_path: Path, names: tuple[str, str]) -> None:
    root = touch(tmp_path, *(f"{name}/{n}.jpg" for name in names for n in (1, 2)))
    write(root, {"train.csv": "id,label\n1,a\n2,b\n", "test.csv": "id,label\n1,b\n2,a\n"})
    first = {f"{names[0]}/1.jpg": "a", f"{names[0]}/2.jpg": "b"}
    assert labeled(scan(root, tables(root, "train.csv"))) == first
    both = {f"{names[0]}/1.jpg": "a train", f"{names[0]}/2.jpg": "b train"}
    both |= {f"{names[1]}/1.jpg": "b test", f"{names[1]}/2.jpg": "a test"}
    assert labeled(scan(root, tables(root, "train.csv", "test.csv"))) == both


@pytest.mark.parametrize("text", ["id\n3\n4\n", "id,age\n3,50\n4,60\n"])
def test_a_table_of_the_test_split_needs_no_labels(tmp_path: Path, text: str) -> None:
    root = touch(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    write(root, {"train.csv": "id,label\n1,a\n2,b\n", "test.csv": text})
    found = scan(root, tables(root, "train.csv", "test.csv"))
    assert labeled(found) == {"1.jpg": "a train", "2.jpg": "b train"}
    assert found.ignored == (("3.jpg", "has no label"), ("4.jpg", "has no label"))


def test_a_table_of_all_splits_is_not_combined_with_class_folders(tmp_path: Path) -> None:
    """Its first rows may name images of a split without class folders."""
    root = touch(tmp_path, "test/9.jpg", "train/a/1.jpg", "train/b/2.jpg", "val/3.jpg")
    rows = "path,label\ntest/9.jpg,x\ntrain/a/1.jpg,x\ntrain/b/2.jpg,y\nval/3.jpg,y\n"
    found = scan(write(root, {"t.csv": rows}), tables(root, "t.csv"))
    expected = {"test/9.jpg": "x test", "train/a/1.jpg": "x train", "train/b/2.jpg": "y train", "val/3.jpg": "y val"}
    assert labeled(found) == expected


def test_a_class_without_training_images_is_left_out_on_request(tmp_path: Path) -> None:
    rows = "image,label,split\n1,a,train\n2,b,train\n3,c,val\n4,a,val\n"
    root = write(touch(tmp_path, *(f"{n}.jpg" for n in range(1, 5))), {"t.csv": rows})
    what = "class 'c' has no training image; correct the label, list an image for training, or leave it out"
    with pytest.raises(
        FolderError, match=exactly(f"{root}/t.csv, line 4: {what}:\n  pack(folder, drop_empty_classes=True)")
    ):
        scan(root, tables(root, "t.csv"))
    found = scan(root, tables(root, "t.csv"), drop_empty_classes=True)
    assert labeled(found) == {"1.jpg": "a train", "2.jpg": "b train", "4.jpg": "a val"}
    assert dict(found.ignored) == {"c": EMPTY_CLASS, "3.jpg": "has no training image in its class"}


def test_numbers_do_not_name_class_folders(tmp_path: Path) -> None:
    root = write(touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/3.jpg"), {"val.csv": "image,label\n3,490\n"})
    what = "label '490' is a number, but the classes are names ('a', 'b'); list them in label order in classes.txt"
    with pytest.raises(FolderError, match=exactly(f"{root}/val.csv, line 2: {what}.")):
        scan(root, tables(root, "val.csv"))
    write(root, {"val.csv": "image,label\n3,2\n", "classes.txt": "b\na\n"})
    assert labeled(scan(root, tables(root, "val.csv")))["val/3.jpg"] == "a val"


def test_tables_of_several_splits_are_named_in_one_command(tmp_path: Path) -> None:
    root = touch(tmp_path, "images/1.jpg", "images/2.jpg", "images/3.jpg")
    write(
        root,
        {"train.csv": "id,label\n1,a\n2,b\n", "val.csv": "id,label\n3,a\n", "sample_submission.csv": "id,label\n3,0"},
    )
    command = f"fastflower pack {root} --labels {root}/train.csv --labels {root}/val.csv"
    with pytest.raises(
        FolderError, match=re.escape(f"\n  train.csv and val.csv name 3 of these images: {command}") + "$"
    ):
        scan(root)


def test_files_that_divide_or_label_class_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path, "a/1.jpg", "b/2.jpg")
    write(root, {"train_list.txt": "a/1.jpg\nb/2.jpg\n", "labels.csv": "image,label\n1,x\n2,x\n", "notes.txt": "by me"})
    assert scan(root).classes == ("a", "b")
    what = "names images of this folder, but is not used; to use it"
    assert caplog.messages == [
        f"{root}: labels.csv {what}:\n  pack(folder, 'shards-2', labels=['{root}/labels.csv'])",
        f"{root}: train_list.txt {what}:\n  pack(folder, 'shards-2', split=['{root}/train_list.txt'])",
    ]


def test_the_val_split_is_drawn_from_a_train_split_on_request(tmp_path: Path) -> None:
    root = tmp_path / "data"
    drawn(root / "train", a=10, b=10)
    drawn(root / "test", a=3, b=3)
    manifest = pack(root, tmp_path / "out", val_fraction=0.2)
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    assert counts == {"train": (8, 8), "val": (2, 2), "test": (3, 3)}
    assert paths(tmp_path / "out", "test") == {f"test/{name}/{n:03d}.jpg" for name in "ab" for n in range(3)}
    assert "val" not in pack(root, tmp_path / "plain").splits


@pytest.mark.parametrize("place", ["", "splits/", "annotations/"])
def test_lists_of_splits_beside_a_flat_folder_are_named(tmp_path: Path, place: str) -> None:
    root = touch(tmp_path, "images/1.jpg", "images/2.jpg", "images/3.jpg")
    write(root, {f"{place}train_list.txt": "1.jpg a\n2.jpg b\n", f"{place}val_list.txt": "3.jpg a\n"})
    command = f"fastflower pack {root} --labels {root}/{place}train_list.txt --labels {root}/{place}val_list.txt"
    what = f"\n  train_list.txt and val_list.txt name 3 of these images: {command}"
    with pytest.raises(FolderError, match=re.escape(what) + "$"):
        scan(root)


@pytest.mark.parametrize("name", ["Rose", "rose ", "rose_"])
def test_a_class_of_val_that_is_spelled_otherwise_in_train_is_named(tmp_path: Path, name: str) -> None:
    root = touch(tmp_path, "train/rose/1.jpg", "train/b/1.jpg", f"val/{name}/1.jpg", "val/b/1.jpg")
    what = "but differs from 'rose' only in case, spaces, punctuation or Unicode form; rename it"
    with pytest.raises(FolderError, match=exactly(f"{root}/val/{name}: is not a class in {root}/train, {what}.")):
        scan(root)
