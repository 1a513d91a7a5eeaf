"""The Triton backend in Triton's interpreter on the CPU, and its kernels compiled for real GPUs.

Most tests magnify the images, because the interpreter is slow for each weight of a blur.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any, Literal

import numpy as np
import parity
import pytest
import torch
from packs import flip_a_bit

from fastflower import Augment, Loader, pack
from fastflower.errors import ArgumentError, SampleError
from fastflower.loading.backends.native import available
from fastflower.loading.backends.selection import Name, choose
from fastflower.loading.cache import Decoded
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without CUDA")

AUGMENT = Augment(size=(150, 170), crop=(0.1, 0.2), flip=0.5, rotate=10, brightness=0.3, contrast=0.3, erase=0.5)
OPTIONS: dict[str, Any] = {"batch_size": 5, "augment": AUGMENT, "device": "cpu", "workers": 2, "tail": "keep"}
FEWER: dict[str, Any] = {**OPTIONS, "split": "val", "batch_size": 2, "shuffle": True}


@pytest.fixture(scope="module")
def few(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 packed images, 15 of them for training."""
    folder = tmp_path_factory.mktemp("few")
    for path in flowers.glob("*/000[0-3].jpg"):
        (folder / "flowers" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "flowers" / path.parent.name)
    pack(folder / "flowers", folder / "shards", val_fraction=0.25)
    return folder / "shards"


def images_of(loader: Loader, epochs: int = 1) -> list[tuple[list[int], torch.Tensor]]:
    return [(batch.index.tolist(), batch.images) for _ in range(epochs) for batch in loader]


def test_batches_equal_those_of_other_backends(few: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        ours = images_of(Loader(few, backend="triton", dtype=dtype, **FEWER))
        theirs = images_of(Loader(few, backend="opencv", dtype=dtype, **FEWER))
        assert [index for index, _ in ours] == [index for index, _ in theirs]
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            assert one.dtype == dtype
            assert one.shape == other.shape
            assert one.is_contiguous(memory_format=torch.channels_last)
            scale = 1.0 if dtype == torch.uint8 else 255 * 0.225
            assert (one.float() - other.float()).abs().mean().item() * scale < 1


def test_the_cache_changes_no_image_and_cached_images_are_decoded_once(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[int] = Counter()
    real = SampleSource.decode

    def counting(self: SampleSource, index: int, decode_scale: int = 1) -> Any:
        decoded[index] += 1
        return real(self, index, decode_scale)

    monkeypatch.setattr(SampleSource, "decode", counting)
    kept = images_of(Loader(few, backend="triton", **FEWER), 2)
    assert set(decoded.values()) == {1}
    decoded.clear()
    for cache in (None, 1_500_000):
        found = images_of(Loader(few, backend="triton", cache=cache, **FEWER), 2)
        assert [index for index, _ in found] == [index for index, _ in kept]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, kept, strict=True))
    assert set(decoded.values()) == {3, 4}, "twice without a cache, and once or twice with some cached"


def test_cached_images_survive_set_augment_and_are_cached_per_decode_scale(few: Path) -> None:
    loader = Loader(few, backend="triton", **FEWER)
    images_of(loader)
    loader.set_epoch(0)
    small = Augment(size=24, resize=26)
    loader.set_augment(small)
    again = images_of(loader)
    fresh = images_of(Loader(few, backend="triton", **{**FEWER, "augment": small}))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(again, fresh, strict=True))
    plain = images_of(Loader(few, backend="opencv", **{**FEWER, "augment": small}))
    assert np.mean([(one - other).abs().mean() for (_, one), (_, other) in zip(again, plain, strict=True)]) < 1 / 58


def test_a_damaged_sample_is_named_or_replaced(few: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(few, tmp_path / "copy"))
    whole = images_of(Loader(few, backend="triton", shuffle=False, **OPTIONS))
    for index in (3, 4, 14):
        flip_a_bit(folder, "train", index)
    failing = Loader(folder, backend="triton", shuffle=False, **OPTIONS)
    for _ in range(2):
        failing.set_epoch(0)
        with pytest.raises(SampleError, match=rf"\({failing.path_of(3)}\): its bytes have changed"):
            images_of(failing)
    loader = Loader(folder, backend="triton", shuffle=False, on_bad="skip", **OPTIONS)
    for _ in range(2):
        loader.set_epoch(0)
        found = images_of(loader)
        assert [i for index, _ in found for i in index] == [0, 1, 2, 5, 5, *range(5, 14), 0]
        assert torch.equal(found[0][1][:3], whole[0][1][:3])
        assert torch.equal(found[0][1][3], whole[1][1][0]), "row 3 is sample 5"
    assert sorted(loader.replaced) == [3, 4, 14]


def test_it_resumes_pickles_and_leaves_no_thread_behind(few: Path) -> None:
    whole = images_of(Loader(few, backend="triton", **FEWER))
    first = Loader(few, backend="triton", **FEWER)
    iterator = iter(first)
    next(iterator)
    later = Loader(few, backend="triton", **FEWER)
    later.load_state_dict(first.state_dict())
    for loader in (later, pickle.loads(pickle.dumps(later))):
        rest = images_of(loader)
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(rest, whole[1:], strict=True))
    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


@pytest.mark.soak
def test_two_loaders_at_once_share_nothing(few: Path) -> None:
    one, other = (Loader(few, backend="triton", seed=seed, **FEWER) for seed in (0, 1))
    expected = [images_of(loader) for loader in (one, other)]
    for loader in (one, other):
        loader.set_epoch(0)
    for (left, right), *alone in zip(zip(one, other, strict=True), *expected, strict=True):
        assert torch.equal(left.images, alone[0][1])
        assert torch.equal(right.images, alone[1][1])


@pytest.mark.skipif(not available(), reason="compares with the native kernel, which this machine cannot run")
def test_images_of_one_pixel_and_images_of_one_row(tmp_path: Path) -> None:
    from PIL import Image

    encoded: list[bytes] = []
    for size in ((1, 1), (7, 1), (1, 9), (300, 2)):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(tmp_path / "x.png")
        encoded.append((tmp_path / "x.png").read_bytes())
    for augment in (Augment(size=1, resize=1), Augment(size=5, resize=5), Augment(size=4, crop=(0.2, 1.0), rotate=180)):
        ours, theirs = (parity.render(name, augment, encoded) for name in ("triton", "native"))
        assert np.abs(ours - theirs).max() <= 2


def test_a_decoded_batch_is_rendered_even_if_threads_lack_work(few: Path) -> None:
    """Otherwise a machine with many cores would hold the decoded images of many small batches."""
    loader = Loader(few, backend="triton", **{**FEWER, "batch_size": 1, "workers": 9, "augment": Augment(size=8)})
    begun = 0

    def counted() -> Iterator[Request]:
        nonlocal begun
        for request in loader.requests(0):
            begun += 1
            yield request
            sleep(0.2)  # time to decode it

    ahead = [begun - number for number, _ in enumerate(loader._backend.run(counted()))]
    assert len(ahead) == 5
    assert max(ahead) <= 3


@pytest.mark.parametrize("batch_size", [4, 8])
def test_an_image_is_cached_once_even_if_a_padded_step_repeats_it(few: Path, batch_size: int) -> None:
    """The copies are in the previous batch, which is still in preparation, or in the same batch."""
    augment = Augment(size=60, crop=(0.02, 0.03))
    options = {**FEWER, "augment": augment, "batch_size": batch_size, "tail": "pad", "cache": 1 << 40}
    loader, other = (Loader(few, backend=name, **options) for name in ("triton", "opencv"))
    for mine, theirs in zip(loader, other, strict=True):
        assert mine.index.tolist() == theirs.index.tolist()
        assert (mine.images - theirs.images).abs().mean() < 0.02
    backend: Any = loader._backend
    kept_images = backend.kept
    samples, levels = np.nonzero(kept_images._address)
    assert len(set(kept_images._address[samples, levels].tolist())) == len(samples) >= loader.num_samples
    shapes = -(-loader._samples.sizes[samples] // (1 << levels)[:, None])
    kept = int(shapes.prod(axis=1).sum())
    assert sum(piece.nbytes for piece in kept_images._pieces) == 4 * kept


def test_a_backend_that_does_not_fit_the_device_or_cache_is_refused(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="cache must be None with backend='dali', which caches nothing, got 1000"):
        Loader(few, backend="dali", **{**OPTIONS, "cache": 1000})
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ArgumentError, match="backend='triton' needs device='cuda', got 'cpu'; leave backend out"):
        Loader(few, backend="triton", **OPTIONS)
    wrong: Any = "cuda"
    with pytest.raises(ArgumentError, match="backend must be one of native, opencv, dali, triton, got 'cuda'"):
        Loader(few, backend=wrong, **OPTIONS)


def test_with_cuda_the_default_is_triton_if_the_images_fit_else_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))

    def chosen(name: Name | None, cache: Literal["auto"] | int | None, needed: int) -> tuple[str, int]:
        found, allowance = choose(name, cuda, cache, lambda: Decoded(needed, 2 * needed))
        return found, allowance.left

    assert chosen(None, "auto", 300) == ("triton", 500)
    assert chosen(None, "auto", 90) == ("triton", 240), "at most all images at all scales"
    assert chosen(None, "auto", 390) == ("dali", 0), "a pixel takes four bytes on a GPU"
    assert chosen(None, None, 300) == ("dali", 0)
    assert chosen(None, 100, 300) == ("triton", 100)
    assert chosen("triton", "auto", 390) == ("triton", 0)
    assert chosen("dali", "auto", 300) == ("dali", 0)
    assert chosen("opencv", 7, 300) == ("opencv", 7)


COMPILE = """
import re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastflower.loading.backends import triton_kernels as kernels
from fastflower.loading.backends.triton import BLOCK, WARPS

tables = {"whole": "*i64", "fractions": "*fp32"}
halves = {"planes": "*fp16", "grays": "*fp32"}
size = {"H": 224, "W": 224, "BLOCK": BLOCK}
every = kernels.SATURATES | kernels.TURNS | kernels.ERASES
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for capability, outs in ((80, ["*bf16"]), (90, ["*fp32", "*bf16", "*u8"])):
    for out in outs:
        ends = {"constants": "*fp32", "out": out}
        drawn = {"STEPS": every | (kernels.NORMALIZES if out != "*u8" else 0)}
        for kernel, pointers, constants in (
            (kernels.warp, {**tables, **halves}, size),
            (kernels.color, {**tables, **halves, **ends}, {**size, "BLOCKS": 128, **drawn}),
            (kernels.render, {**tables, **ends}, {**size, **drawn}),
        ):
            signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
            values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=values)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
            path = Path(sys.argv[1], "kernel.cubin")
            path.write_bytes(made.asm["cubin"])
            said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
            print(kernel.__name__, capability, out, *re.findall(r"(?:REG|STACK):\\d+", said))
"""


def test_the_kernels_compile_for_gpus_without_spilling_registers(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    for line in lines:
        registers, stack = map(int, re.findall(r":(\d+)", line))
        assert (registers <= 64, stack) == (True, 0), line
