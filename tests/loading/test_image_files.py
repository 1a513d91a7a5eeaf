"""Images without labels, read in place: the pixels of a pack, in the order given, each exactly once."""

import inspect
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import nasty_files
import psutil
import pytest
import torch
from packs import draw_image, drawn, exactly
from PIL import Image

from fastflower import Augment, Loader, pack
from fastflower.errors import ArgumentError, FolderError, SampleError, ShardError
from fastflower.loading.arguments import FileOptions
from fastflower.loading.image_files import find_images
from fastflower.shards.image import prepare, read_size

VIEW = Augment(size=32, resize=36)
BACKENDS = ["native", "opencv", "dali"]
OPTIONS: dict[str, Any] = {"augment": VIEW, "batch_size": 4, "device": "cpu", "workers": 2}


def make(images: str | Path | Iterable[str | Path], **options: Any) -> Loader:
    return Loader.from_files(images, **{**OPTIONS, **options})


def pixels(loader: Loader) -> dict[str, torch.Tensor]:
    """Return the images of an epoch by path."""
    return {loader.paths[i]: image for batch in loader for i, image in zip(batch.index, batch.images, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images in two folders, of several formats."""
    root = drawn(tmp_path_factory.mktemp("drawn") / "images", a=5, b=3)
    draw_image(10, 40).save(root / "a" / "x.png")
    draw_image(11, 40).convert("L").save(root / "gray.jpg")
    draw_image(12, 40).convert("CMYK").save(root / "cmyk.jpg")
    draw_image(13, 40).resize((60, 30)).save(root / "turned.jpg", exif=oriented(6))
    draw_image(14, 40).resize((60, 30)).save(root / "b" / "turned.png", exif=oriented(8))
    return root


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def nasty(tmp_path: Path) -> Path:
    """Return a folder with files of all formats and all kinds of damage, but without what is no file."""
    nasty_files.make(tmp_path / "nasty")
    shutil.rmtree(tmp_path / "nasty" / "no files")
    return tmp_path / "nasty"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pixels_and_the_skipped_files_are_those_of_a_pack(tmp_path: Path, backend: Any) -> None:
    root = nasty(tmp_path)
    manifest = pack(root, tmp_path / "shards")
    packs = [
        Loader(tmp_path / "shards", split, shuffle=False, backend=backend, tail="keep", **OPTIONS)
        for split in ("train", "val")
    ]
    packed = {path: image for loader in packs for path, image in pixels(loader).items()}
    paths = list(map(str, find_images(root)))
    loader = make(paths, on_bad="skip", backend=backend)
    ours = {os.path.relpath(path, root): image for path, image in pixels(loader).items()}
    skipped = {entry["path"]: entry["reason"] for entry in manifest.skipped}
    replaced = {os.path.relpath(paths[i], root): reason for i, reason in loader.replaced.items()}
    assert replaced.keys() == {os.path.relpath(path, root) for path in paths} & skipped.keys()
    assert all(skipped[path] in reason for path, reason in replaced.items())
    assert len(ours) == len(paths) - len(replaced) > 80
    assert ours.keys() <= packed.keys()
    for path, image in ours.items():
        assert torch.equal(image, packed[path]), path


def size_or_reason(size: Callable[[], tuple[int, int]]) -> tuple[int, int] | str:
    try:
        return size()
    except SampleError as error:
        return str(error)


def test_a_size_from_a_header_is_the_size_of_the_prepared_image(tmp_path: Path) -> None:
    root = nasty(tmp_path)
    png, jpeg = (nasty_files.encode(nasty_files.smooth(), kind) for kind in ("PNG", "JPEG"))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'  # read by Pillow, not by OpenCV
    (root / "xmp.jpg").write_bytes(nasty_files.with_segments(jpeg, nasty_files.segment(0xE1, xmp)))
    turn = nasty_files.chunk(b"eXIf", nasty_files.TURNED[6:])
    (root / "turned after its pixels.png").write_bytes(png[:-12] + turn + png[-12:])
    sizes = list[tuple[int, int]]()
    for path in (path for path in root.rglob("*") if path.is_file()):
        whole = partial(prepare, path.read_bytes(), max_side=None, quality=None, name=path.name)
        expected = size_or_reason(lambda whole=whole: whole().size)
        found = size_or_reason(partial(read_size, path))
        if isinstance(expected, tuple):
            sizes.append(expected)
            assert found == expected, path
        else:
            assert found == expected or isinstance(found, tuple), "damage after the header is found later"
    assert len(sizes) > 100
    assert sizes.count((64, 48)) > 5, "turned"


def test_creating_a_loader_reads_headers_only(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.{kind}" for number in range(10) for kind in ("jpg", "png")]
    for number, path in enumerate(paths):
        draw_image(number, 300).save(path)
    whole = sum(path.stat().st_size for path in paths)
    start = psutil.Process().io_counters().read_chars
    make(paths, cache=None)
    assert psutil.Process().io_counters().read_chars - start < whole / 4


def test_a_list_keeps_its_order_and_a_folder_is_sorted(folder: Path) -> None:
    files = [folder / "b" / "001.jpg", folder / "a" / "004.jpg", folder / "gray.jpg", folder / "b" / "001.jpg"]
    assert list(make(files).paths) == list(map(str, files))
    assert list(make(map(str, files)).paths) == list(map(str, files))
    everything = list(make(folder).paths)
    assert everything == list(map(str, sorted(path for path in folder.rglob("*") if path.is_file())))
    assert list(make([folder / "b", files[1]]).paths) == [
        *(path for path in everything if "/b/" in path),
        str(files[1]),
    ]
    assert list(make(str(files[2])).paths) == [str(files[2])]


def test_every_image_comes_once_in_order_without_a_label(folder: Path) -> None:
    loader = make(folder)
    assert (len(loader), loader.num_samples, loader.classes, loader.shuffle, loader.tail) == (4, 13, (), False, "keep")
    for _ in range(2):
        batches = list(loader)
        assert [i for batch in batches for i in batch.index.tolist()] == list(range(13))
        assert {label for batch in batches for label in batch.labels.tolist()} == {-1}
        assert batches[0].labels.dtype == torch.int64
    assert f"{loader.paths[0]} and 12 others" in repr(loader)
    assert loader.image(12).shape == (60, 30, 3)
    assert loader.where(12) == loader.path_of(12) == str(folder / "turned.jpg")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_images(folder: Path, world_size: int) -> None:
    ranks = [make(folder, rank=rank, world_size=world_size, batch_size=2) for rank in range(world_size)]
    found = [[batch.index.tolist() for batch in loader] for loader in ranks]
    assert [len(batches) for batches in found] == [len(loader) for loader in ranks]
    assert sorted(i for batches in found for batch in batches for i in batch) == list(range(13))


def test_images_can_be_shuffled_and_augmented_and_resumed(folder: Path) -> None:
    options: dict[str, Any] = {"shuffle": True, "augment": replace(VIEW, crop=(0.3, 1.0), flip=0.5), "seed": 3}
    whole = make(folder, **options)
    assert (len(whole), whole.tail) == (3, "drop")
    epochs = [[batch.images for batch in whole] for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    first = make(folder, **options)
    for _ in islice(first, 2):
        pass
    again, later = pickle.loads(pickle.dumps(first)), make(folder, **options)
    later.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(later)).images, epochs[0][2])
    assert all(torch.equal(one.images, two) for one, two in zip(again, epochs[1], strict=True))


def test_a_state_of_another_list_is_refused(folder: Path) -> None:
    state = make(folder).state_dict()
    make(folder).load_state_dict(state)
    paths = list(make(folder).paths)
    for other in (paths[1:], paths[::-1]):
        with pytest.raises(ShardError, match="the state has shards"):
            make(other).load_state_dict(state)


def test_damaged_files_are_named_at_once_or_replaced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [folder / "a" / "000.jpg", tmp_path / "text.jpg", tmp_path / "nothing.jpg", tmp_path / "pipe.jpg"]
    paths[1].write_text("<html><body>Not found</body></html>")
    os.mkfifo(paths[3])
    reasons = ("is HTML, a web page, named .jpg", "No such file or directory", "is not a regular file")
    for path, reason in zip(paths[1:], reasons, strict=True):
        said = exactly(f"{path}: {reason}; pass image files or folders, or on_bad='skip'.")
        with pytest.raises(SampleError, match=said):
            make([paths[0], path])
    loader = make([*paths, folder / "gray.jpg"], on_bad="skip")
    (batch, rest) = loader
    assert [*batch.index.tolist(), *rest.index.tolist()] == [0, 4, 4, 4, 4]
    assert sorted(loader.replaced) == [1, 2, 3]
    whole = next(iter(make(folder / "gray.jpg"))).images[0]
    assert all(torch.equal(image, whole) for image in [*batch.images[1:], *rest.images]), (
        "the pixels of the path at its index"
    )
    said = f"{paths[1]}: {reasons[0]}"
    assert (loader.replaced[1], caplog.messages[0]) == (said, f"replaced a damaged sample with the next one: {said}")


def test_a_file_that_is_damaged_or_changes_later_ends_the_epoch(tmp_path: Path) -> None:
    paths = [tmp_path / "1.jpg", tmp_path / "2.jpg"]
    for number, path in enumerate(paths):
        draw_image(number, 40).save(path)
    loader, whole = make(paths, cache=None), paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    said = rf"^{paths[1]}: image file is truncated \(.*\); pass image files or folders, or on_bad='skip'\.$"
    with pytest.raises(SampleError, match=said):
        list(loader)
    draw_image(3, 40).resize((50, 40)).save(paths[1])
    said = f"{paths[1]}: has 50 x 40 pixels, but had 40 x 40 when the loader was created; create the loader again."
    with pytest.raises(SampleError, match=exactly(said)):
        list(loader)


def test_a_warning_about_a_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "flat.jpg")
    loader = make(tmp_path, cache=None)
    for _ in range(2):
        list(loader)
    assert caplog.messages == [
        f"{tmp_path / 'flat.jpg'}: has almost no contrast: its gray levels range from 9 to 9 (out of 0 to 255)"
    ]


def test_what_needs_labels_is_refused(folder: Path) -> None:
    for options, what in (
        ({"shuffle": "balanced"}, "shuffle='balanced'"),
        ({"augment": Augment(mixup=0.2), "shuffle": True}, "augment: mixup"),
        ({"augment": Augment(cutmix=1.0), "shuffle": True}, "augment: cutmix"),
    ):
        said = f"{what} needs labels, which Loader.from_files does not have; pack class folders."
        with pytest.raises(ArgumentError, match=exactly(said)):
            make(folder, **options)
    with pytest.raises(ArgumentError, match=r"^augment: mixup needs"):
        make(folder, shuffle=True).set_augment(Augment(mixup=0.2))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    for images, kind in ((None, "NoneType"), (3, "int"), ([3], "int"), ([["a.jpg"]], "list"), (b"a.jpg", "int")):
        said = f"images must be a path of an image file or folder, or a list of them, got an object of type {kind}."
        with pytest.raises(ArgumentError, match=exactly(said)):
            make(images)  # pyright: ignore[reportArgumentType]  (what a user may pass)
    for pattern, remedy in (("new/*.jpg", "Path().glob('new/*.jpg')"), ("/new/?.jpg", "Path('/').glob('new/?.jpg')")):
        said = f"images: no file is called {pattern}, and patterns are not expanded; pass sorted({remedy})."
        with pytest.raises(ArgumentError, match=exactly(said)):
            make(pattern)
    Image.new("RGB", (40, 40)).save(tmp_path / "a[1].jpg")
    assert make(tmp_path / "a[1].jpg").num_samples == 1
    (tmp_path / "a[1].jpg").unlink()
    with pytest.raises(ArgumentError, match=exactly("images must name at least one image file or folder, got none.")):
        make([])
    with pytest.raises(
        SampleError, match=rf"^{tmp_path}: holds no images \(\.jpg, .*\); pass image files or another folder\.$"
    ):
        make(tmp_path)


def test_arguments_that_concern_shards_are_unknown(folder: Path) -> None:
    for name in ("split", "fold", "window", "executor"):
        with pytest.raises(ArgumentError, match=rf"^{name}: Loader\.from_files has no such argument; "):
            make(folder, **{name: None})
    said = "num_workers: Loader.from_files has no such argument; pass workers, a number of threads, or leave it out for one"
    with pytest.raises(ArgumentError, match=f"^{said}"):
        make(folder, num_workers=3)


def test_the_options_have_the_types_of_the_loaders_arguments() -> None:
    options, arguments = get_type_hints(FileOptions), get_type_hints(Loader.__init__)
    names = inspect.signature(Loader.__init__).parameters.keys() - {"self", "unknown", "executor"}
    assert options.keys() == names - {"shards", "split", "fold", "window"}
    assert {name for name in options if options[name] != arguments[name]} == {"shuffle"}, "only labels can be balanced"


def test_pack_names_what_takes_images_without_labels(folder: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(folder / "a", tmp_path / "alone" / "images")
    with pytest.raises(FolderError, match=r"has no class folders; .*fastflower predict.*Loader\.from_files"):
        pack(alone, tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"got an object of type list; for image files, call Loader\.from_files\.$"):
        Loader([folder / "gray.jpg"])  # pyright: ignore[reportArgumentType]  (what a user may try)
