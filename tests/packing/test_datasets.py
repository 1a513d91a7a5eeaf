"""Imitations of well-known data sets are packed by the commands in docs/datasets.md."""

import os
import re
import subprocess
import zlib
from pathlib import Path

import pytest
from packs import draw_image
from places import ROOT
from scipy.io import savemat

from fastflower import Manifest
from fastflower.cli import main

TABLE = (ROOT / "docs/datasets.md").read_text()
COMMANDS = {
    name.strip(): command.strip().strip("`").replace("\\|", "|")
    for name, _, command in re.findall(r"^\| (?!data set|---)(.*?) \| (.*?) \| (`.*`) \|$", TABLE, re.MULTILINE)
}

Files = dict[str, str | None]
"""Text of each file; None for an image."""


def images(*patterns: str, numbers: int = 2) -> Files:
    """Return images for patterns such as "{train,val}/{a,b}/#.jpg", in which # is a number from 0."""
    files: Files = {}
    for pattern in patterns:
        names = [pattern]
        while "{" in names[0]:
            parts = [re.split(r"\{(.*?)\}", name, maxsplit=1) for name in names]
            names = [f"{head}{word}{rest}" for head, words, rest in parts for word in words.split(",")]
        files |= {name.replace("#", f"{n}"): None for name in names for n in range(numbers if "#" in name else 1)}
    return files


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


N = "{n01440764,n01443537}"
TWO = {"train": 4, "val": 4}
WITH_TEST = {"train": 4, "test": 4}
DRAWN = {"train": 2, "val": 2}
LAYOUTS: dict[str, tuple[Files, int, dict[str, int]]] = {
    "ImageNet (ILSVRC 2012)": (images(f"imagenet/{{train,val}}/{N}/#.JPEG"), 2, TWO),
    "ImageNet with a flat `val`, one class per line": (
        {
            **images(f"imagenet/train/{N}/#.JPEG", "imagenet/val/ILSVRC2012_val_0000000#.JPEG", numbers=3),
            "val_labels.txt": lines("n01443537", "n01440764", "n01443537"),
        },
        2,
        {"train": 6, "val": 3},
    ),
    "ImageNet from Kaggle": (
        {
            **images(
                f"ILSVRC/Data/CLS-LOC/train/{N}/#.JPEG",
                "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_#.JPEG",
                "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_#.JPEG",
            ),
            "LOC_val_solution.csv": lines(
                "ImageId,PredictionString",
                "ILSVRC2012_val_0,n01440764 1 2 3 4 n01440764 5 6 7 8",
                "ILSVRC2012_val_1,n01443537 9 9 9 9",
            ),
        },
        2,
        {"train": 4, "val": 2},
    ),
    "Tiny ImageNet": (
        {
            **images(
                f"tiny-imagenet-200/train/{N}/images/x_#.JPEG",
                "tiny-imagenet-200/val/images/val_#.JPEG",
                "tiny-imagenet-200/test/images/test_#.JPEG",
            ),
            "tiny-imagenet-200/val/val_annotations.txt": lines(
                "val_0.JPEG\tn01440764\t0\t32\t44\t62", "val_1.JPEG\tn01443537\t52\t55\t57\t59"
            ),
            "tiny-imagenet-200/wnids.txt": lines("n01443537", "n01440764"),
            "tiny-imagenet-200/words.txt": "n01440764\ttench\n",
        },
        2,
        {"train": 4, "val": 2},
    ),
    "Imagenette, Imagewoof": (
        {
            **images(f"imagenette2/{{train,val}}/{N}/#.JPEG"),
            "imagenette2/noisy_imagenette.csv": lines(
                "path,noisy_labels_0,is_valid", "train/n01440764/0.JPEG,n01440764,False"
            ),
        },
        2,
        TWO,
    ),
    "iNaturalist 2021": (images("inat/{train_mini,val}/{00000_Animalia_A,00001_Plantae_B}/#.jpg"), 2, TWO),
    "Food-101": (
        {
            **images("food-101/images/{apple_pie,waffles}/100#.jpg", numbers=4),
            **{
                f"food-101/meta/{split}.txt": lines(
                    *(f"{name}/100{n}" for name in ("apple_pie", "waffles") for n in numbers)
                )
                for split, numbers in (("train", (0, 2, 3)), ("test", (1,)))
            },
            "food-101/meta/classes.txt": lines("apple_pie", "waffles"),
            "food-101/meta/labels.txt": lines("Apple pie", "Waffles"),
        },
        2,
        {"train": 6, "test": 2},
    ),
    "Flowers (TensorFlow)": (
        {**images("flower_photos/{daisy,roses}/#.jpg"), "flower_photos/LICENSE.txt": "CC-BY"},
        2,
        DRAWN,
    ),
    "Flowers-102": (images("jpg/image_0000#.jpg", numbers=4), 2, DRAWN),
    "Oxford-IIIT Pet": (
        {
            **images("images/{Abyssinian,great_pyrenees}_#.jpg"),
            "images/Abyssinian_7.mat": "x",
            "annotations/trainval.txt": lines("Abyssinian_0 1 1 1", "great_pyrenees_0 2 2 1"),
            "annotations/test.txt": lines("Abyssinian_1 1 1 1", "great_pyrenees_1 2 2 1"),
        },
        2,
        {"train": 2, "test": 2},
    ),
    "Stanford Dogs": (
        {**images("Images/{n1-Chihuahua,n2-Beagle}/n_#.jpg"), "Annotation/n1-Chihuahua/n_0": "<annotation>"},
        2,
        DRAWN,
    ),
    "Stanford Cars (Kaggle)": (
        {
            **images("car_data/car_data/{train,test}/{Acura TL Sedan 2012,Ram C-V Cargo Van Minivan 2012}/#.jpg"),
            "names.csv": "AM General Hummer SUV 2000\n",
        },
        2,
        WITH_TEST,
    ),
    "CUB-200-2011": (
        {
            **images("CUB_200_2011/images/{001.Albatross,002.Auk}/B_#.jpg"),
            "CUB_200_2011/classes.txt": lines("1 001.Albatross", "2 002.Auk"),
            "CUB_200_2011/images.txt": lines(
                "1 001.Albatross/B_0.jpg", "2 001.Albatross/B_1.jpg", "3 002.Auk/B_0.jpg", "4 002.Auk/B_1.jpg"
            ),
            "CUB_200_2011/train_test_split.txt": lines("1 1", "2 0", "3 1", "4 0"),
        },
        2,
        {"train": 2, "test": 2},
    ),
    "FGVC-Aircraft": (
        {
            **images("fgvc-aircraft-2013b/data/images/104816#.jpg", numbers=6),
            **{
                f"fgvc-aircraft-2013b/data/images_variant_{split}.txt": lines(
                    f"104816{n} Cessna 172", f"104816{n + 1} 707-320"
                )
                for split, n in (("train", 0), ("val", 2), ("test", 4))
            },
        },
        2,
        {"train": 2, "val": 2, "test": 2},
    ),
    "Caltech-101": (images("101_ObjectCategories/{accordion,airplanes,BACKGROUND_Google}/image_000#.jpg"), 2, DRAWN),
    "Caltech-256": (
        {
            **images("256_ObjectCategories/{001.ak47,198.spider}/1_#.jpg"),
            "256_ObjectCategories/198.spider/RENAME2": "#!/bin/sh",
        },
        2,
        DRAWN,
    ),
    "DTD": (
        {
            **images("dtd/images/{banded,dotted}/b_#.jpg", numbers=3),
            **{
                f"dtd/labels/{split}1.txt": lines(f"banded/b_{n}.jpg", f"dotted/b_{n}.jpg")
                for n, split in enumerate(("train", "val", "test"))
            },
        },
        2,
        {"train": 2, "val": 2, "test": 2},
    ),
    "SUN397": (images("SUN397/{a/abbey,c/church/indoor,c/church/outdoor}/sun_#.jpg"), 3, {"train": 3, "val": 3}),
    "Places365": (
        {
            **images("data_256/{a/airfield,z/zen_garden}/0000000#.jpg", "val_256/Places365_val_0000000#.jpg"),
            "places365_train_standard.txt": lines(
                *(
                    f"/{name}/0000000{n}.jpg {label}"
                    for label, name in enumerate(("a/airfield", "z/zen_garden"))
                    for n in (0, 1)
                )
            ),
            "places365_val.txt": lines("Places365_val_00000000.jpg 1", "Places365_val_00000001.jpg 0"),
            "categories_places365.txt": lines("/a/airfield 0", "/z/zen_garden 1"),
        },
        2,
        {"train": 4, "val": 2},
    ),
    "EuroSAT": (images("2750/{AnnualCrop,Forest}/A_#.jpg"), 2, DRAWN),
    "RESISC45": (images("NWPU-RESISC45/{airplane,airport}/a_#.jpg"), 2, DRAWN),
    "GTSRB (Kaggle)": (
        {
            **images("gtsrb/Train/{0,10}/000_#.png", "gtsrb/Test/0000#.png", "gtsrb/Meta/{0,10}.png"),
            "gtsrb/Train.csv": lines(
                "Width,Height,Roi.X1,ClassId,Path",
                *(f"27,26,5,{name},Train/{name}/000_{n}.png" for name in (0, 10) for n in (0, 1)),
            ),
            "gtsrb/Test.csv": lines(
                "Width,Height,Roi.X1,ClassId,Path", "53,54,6,10,Test/00000.png", "42,45,5,0,Test/00001.png"
            ),
        },
        2,
        {"train": 4, "test": 2},
    ),
    "MNIST as PNG": (images("mnist_png/{training,testing}/{0,1}/#.png"), 2, WITH_TEST),
    "CIFAR-10 (Kaggle)": (
        {
            **images("train/#.png", numbers=4),
            "trainLabels.csv": lines("id,label", "0,frog", "1,truck", "2,frog", "3,truck"),
        },
        2,
        DRAWN,
    ),
    "Dogs vs. Cats": (images("train/{cat,dog}.#.jpg"), 2, DRAWN),
    "Dog breeds (Kaggle)": (
        {
            **images("{train,test}/000bec18#.jpg", numbers=4),
            "labels.csv": lines("id,breed", *(f"000bec18{n},{'pug' if n % 2 else 'saluki'}" for n in range(4))),
        },
        2,
        DRAWN,
    ),
    "Intel scenes": (
        images("{seg_train/seg_train,seg_test/seg_test}/{forest,sea}/#.jpg", "seg_pred/seg_pred/#.jpg"),
        2,
        WITH_TEST,
    ),
    "Chest X-rays (pneumonia)": (
        {
            **images("chest_xray{,/chest_xray}/{train,val,test}/{NORMAL,PNEUMONIA}/#.jpeg"),
            "chest_xray/__MACOSX/chest_xray/._train": "x",
        },
        2,
        {"train": 4, "val": 4, "test": 4},
    ),
    "Skin lesions (HAM10000)": (
        {
            **images("HAM10000_images_part_1/ISIC_002741#.jpg", "HAM10000_images_part_2/ISIC_003000#.jpg"),
            "HAM10000_metadata.csv": lines(
                "lesion_id,image_id,dx,dx_type,age,sex,localization",
                *(
                    f"HAM_1,{name},{dx},histo,80.0,male,scalp"
                    for name, dx in (
                        ("ISIC_0027410", "bkl"),
                        ("ISIC_0027411", "nv"),
                        ("ISIC_0030000", "nv"),
                        ("ISIC_0030001", "bkl"),
                    )
                ),
            ),
        },
        2,
        DRAWN,
    ),
    "Retinopathy (APTOS 2019), Cassava leaves": (
        {
            **images("{train,test}_images/000c#.png", numbers=4),
            "train.csv": lines("id_code,diagnosis", *(f"000c{n},{4 * (n % 2)}" for n in range(4))),
            "test.csv": lines("id_code", "000c0"),
        },
        2,
        DRAWN,
    ),
    "PlantVillage": (
        images("raw/{color,grayscale,segmented}/{Apple___healthy,Corn_(maize)___healthy}/#.jpg"),
        2,
        DRAWN,
    ),
    "Fruits-360": (
        images(
            "fruits-360/{Training,Test}/{Apple Braeburn,Banana}/#_100.jpg", "fruits-360/test-multiple_fruits/mango#.jpg"
        ),
        2,
        WITH_TEST,
    ),
    "Facial expressions (FER-2013)": (images("fer/{train,test}/{angry,happy}/#.jpg"), 2, WITH_TEST),
    "Hugging Face `imagefolder`": (
        {
            **images("data/{train,test}/000#.png"),
            **{
                f"data/{split}/metadata.jsonl": lines(
                    '{"file_name": "0000.png", "label": "cat"}', '{"file_name": "0001.png", "label": "dog"}'
                )
                for split in ("train", "test")
            },
        },
        2,
        {"train": 2, "test": 2},
    ),
}


def test_every_row_of_the_table_is_tested() -> None:
    assert list(COMMANDS) == list(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_packs_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, classes, counts = LAYOUTS[name]
    here = tmp_path / "data"
    for path, text in files.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            draw_image(zlib.crc32(path.encode()), 8).save(here / path)
        else:
            (here / path).write_text(text)
    if name == "Flowers-102":
        savemat(here / "imagelabels.mat", {"labels": [[77, 5, 77, 5]]})
    program = tmp_path / "bin/fastflower"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    program.chmod(0o755)
    shell = ["bash", "-c", f"PATH={program.parent}:{ROOT}/.venv/bin:$PATH; {COMMANDS[name]}"]
    told = subprocess.run(shell, cwd=here, capture_output=True, text=True, check=True).stdout.splitlines()
    monkeypatch.chdir(told[0])
    assert main(told[1:]) == 0
    out = Path(os.path.relpath(tmp_path / "shards")) if "--out" in told else Path("shards")
    manifest = Manifest.load(out)
    assert len(manifest.classes) == classes
    assert {split: described.samples for split, described in manifest.splits.items()} == counts
    assert all(all(described.class_counts) for described in manifest.splits.values())
