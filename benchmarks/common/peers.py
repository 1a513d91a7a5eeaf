"""Other ways to load the same images with the same augmentation, as their authors recommend, with one worker per core.

Each takes a `Job` and returns a function that loads one epoch of float32 batches and returns the number of images.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import baseline
from fastflower.machine import cores

WORKERS = cores()
Epoch = Callable[[], int]


@dataclass(frozen=True)
class Job:
    """The images to load."""

    folder: Path
    """Class folders."""
    shards: Path
    """The same images, packed by fastflower without a validation split."""
    scratch: Path
    """An empty folder for a library's own format."""
    batch_size: int = 64

    def samples(self) -> list[tuple[Path, int]]:
        """Return (path, label) of every image."""
        classes = sorted(entry for entry in self.folder.iterdir() if entry.is_dir())
        return [(path, label) for label, entry in enumerate(classes) for path in sorted(entry.iterdir())]


def count_images(batches: Any) -> int:
    return sum(len(labels) for _images, labels in batches)


class DecodeAndTransform:
    """Turns an encoded sample into (image, label), with PIL and v1 transforms."""

    def __init__(self) -> None:
        self._transform = baseline.augmentation()

    def __call__(self, sample: dict[str, Any], *_: Any) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self._transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


def augmentation_v2() -> Any:
    """Return baseline.augmentation as v2 transforms on tensors."""
    from torchvision.transforms import InterpolationMode, v2

    bilinear: Any = InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation([-10, 10], bilinear),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
            v2.RandomAffine([0, 0], translate=[0.1, 0.1], interpolation=bilinear),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(baseline.MEAN, baseline.STD),
        ]
    )


def imagefolder(job: Job) -> Epoch:
    """Load with ImageFolder, PIL, v1 transforms and persistent workers: the baseline."""
    loader = baseline.loader(job.folder, baseline.augmentation(), batch_size=job.batch_size, pin=False)
    return lambda: count_images(loader)


def torchvision_v2(job: Job) -> Epoch:
    """Load the same with v2 transforms on tensors that torchvision decodes."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    def read(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    transform = augmentation_v2()
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": WORKERS, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(ImageFolder(job.folder, transform, loader=read), job.batch_size, **options)
    return lambda: count_images(loader)


def webdataset(job: Job) -> Epoch:
    """Load our shards with webdataset's own pipeline, PIL and v1 transforms, batched in the workers."""
    import webdataset

    wds: Any = webdataset

    transform = baseline.augmentation()
    urls = sorted(map(str, job.shards.glob("train-*.tar")))
    data: Any = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node)
    data = data.shuffle(1000).decode("pil").to_tuple("jpg", "cls").map_tuple(transform, int)
    data = data.batched(job.batch_size, partial=False)
    loader = wds.WebLoader(data, batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda: count_images(loader)


def dali(job: Job) -> Epoch:
    """Load with the chain of operators that DALI's documentation suggests, on its CPU backend."""
    from nvidia.dali import fn as untyped_fn
    from nvidia.dali import types as untyped_types
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    fn: Any = untyped_fn
    types: Any = untyped_types
    options: dict[str, Any] = {"batch_size": job.batch_size, "num_threads": WORKERS, "device_id": None}

    @pipeline_def(**options)
    def graph() -> Any:
        encoded, labels = fn.readers.file(file_root=str(job.folder), random_shuffle=True, name="reader")
        images = fn.decoders.image(encoded)
        images = fn.random_resized_crop(images, size=(224, 224))
        images = fn.rotate(images, angle=fn.random.uniform(range=(-10.0, 10.0)), keep_size=True, fill_value=0)
        images = fn.color_twist(
            images,
            brightness=fn.random.uniform(range=(0.8, 1.2)),
            contrast=fn.random.uniform(range=(0.8, 1.2)),
            saturation=fn.random.uniform(range=(0.8, 1.2)),
            hue=fn.random.uniform(range=(-36.0, 36.0)),
        )
        offset = fn.random.uniform(range=(-22.4, 22.4), shape=2)
        images = fn.warp_affine(images, matrix=fn.transforms.translation(offset=offset), fill_value=0)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * part for part in baseline.MEAN],
            std=[255 * part for part in baseline.STD],
            dtype=types.FLOAT,
        )
        return images, labels

    pipe = graph()
    pipe.build()
    batches = DALIGenericIterator([pipe], ["images", "labels"], reader_name="reader", auto_reset=True)
    return lambda: sum(len(batch["labels"]) for (batch,) in batches)


def spdl(job: Job) -> Epoch:
    """Load with SPDL's thread pipeline, torchvision's decoder (SPDL's needs the FFmpeg libraries) and v2 transforms."""
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]
    from torchvision.io import ImageReadMode, decode_image

    transform = augmentation_v2()
    torch.set_num_threads(1)
    samples = job.samples()

    def load(sample: tuple[Path, int]) -> tuple[torch.Tensor, int]:
        return transform(decode_image(str(sample[0]), ImageReadMode.RGB)), sample[1]

    def collate(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])

    def epoch() -> int:
        order = np.random.default_rng().permutation(len(samples))
        pipeline = (
            PipelineBuilder()
            .add_source([samples[number] for number in order])
            .pipe(load, concurrency=WORKERS)
            .aggregate(job.batch_size, drop_last=True)
            .pipe(collate)
            .add_sink(2)
            .build(num_threads=WORKERS)
        )
        with pipeline.auto_stop():
            return count_images(pipeline)

    return epoch


def litdata(job: Job) -> Epoch:
    """Load litdata's own chunks with its StreamingDataset and StreamingDataLoader, PIL and v1 transforms."""
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]
    from pack_speed import litdata as pack

    pack(job.samples(), job.scratch, WORKERS)
    data = StreamingDataset(str(job.scratch / "chunks"), shuffle=True, drop_last=True, transform=DecodeAndTransform())
    loader = StreamingDataLoader(
        data, batch_size=job.batch_size, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    return lambda: count_images(loader)


def mds(job: Job) -> Epoch:
    """Load MDS shards with MosaicML's StreamingDataset, PIL and v1 transforms."""
    from pack_speed import mds as pack
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    pack(job.samples(), job.scratch)
    transform = DecodeAndTransform()

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return transform(super().__getitem__(at))

    data = Images(local=str(job.scratch / "mds"), shuffle=True, batch_size=job.batch_size)
    options: dict[str, Any] = {"drop_last": True, "num_workers": WORKERS, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(data, job.batch_size, **options)
    return lambda: count_images(loader)
