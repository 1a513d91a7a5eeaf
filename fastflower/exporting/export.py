"""Exports a trained network to a file that other programs run, and proves that it answers as `predict` does."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from fastflower import progress
from fastflower.errors import ArgumentError, boolean, integer, require
from fastflower.exporting.card import card
from fastflower.exporting.facts import facts_of
from fastflower.exporting.formats import SUFFIXES, Exported, runner, write
from fastflower.exporting.proof import Proof, images_for, proof_of, require_proof
from fastflower.exporting.quantization import Quantized, calibration_images, quantized, require_agreement
from fastflower.files import blame_the_system, remedy_for
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.evaluation import evaluate
from fastflower.models.metrics import Scores
from fastflower.models.trained_on import packs_of
from fastflower.packing.workspace import remove_empty
from fastflower.shards.manifest import Manifest
from fastflower.suggestions import keywords


class Export(NamedTuple):
    """What `export` wrote."""

    files: tuple[Path, ...]
    """The file, those that belong to it, and the model card, in this order."""
    proof: Proof
    """Agreement of the file with `predict`."""
    int8: Quantized | None = None
    """The int8 file, if one was asked for."""

    def __str__(self) -> str:
        lines = [f"wrote {' and '.join(map(str, self.files))}", f"proof: {self.proof}"]
        return "\n".join([*lines, *([f"wrote {self.int8.file}: {self.int8}"] if self.int8 else [])])


@keywords
@progress.shown()
def export(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    batched: str | tuple[int, int] | None = None,
    prove: str | Path | None = None,
    int8: bool = False,
) -> Export:
    """Export a trained network with its view, so that other programs get the probabilities that `predict` gives.

    The file is run on up to 64 images before it is kept, and its probabilities are compared with those of `predict` in float32.

    Args:
        checkpoint: A checkpoint written by `train`, or the folder of a run.
        out: The file to write. Its suffix is the format. .onnx: ONNX, for onnxruntime and other engines (needs the extra
            onnx). .pt2: a program of torch.export. Both take one RGB image, (H, W, 3) uint8 of any size, and give the
            probabilities of the classes, (K,) float32. .safetensors: the weights, with config.json beside, for timm or
            torchvision. .pt: the weights, for torch.load. OUT.md, the model card, is written beside.
        batched: Height and width, as in 480x640: the file takes any number of images of this size, (N, H, W, 3). Only for
            .onnx and .pt2. None takes one image of any size.
        prove: A folder of images to compare on. None: the run's val split if it is on this machine, else drawn images.
        int8: Also write OUT with the suffix .int8.onnx, quantized and calibrated on 128 training images, and measure size, time
            and accuracy of both on the val split. It is kept only if 98% of the images get the class that the float file gives.

    Returns the files and the agreement. Raises CheckpointError if the checkpoint cannot be used, ArgumentError if the file
    cannot be written or the network does not fit the format, and ExportError if a probability differs by more than 0.02 or
    an image gets another class; no file is left then.

    Example:
        >>> from fastflower import export
        >>> export("run/checkpoint-best.pt", "flowers.pt2").files
        (PosixPath('flowers.pt2'), PosixPath('flowers.pt2.md'))
    """
    out = Path(out)
    rule = f"a file with one of the suffixes {', '.join(SUFFIXES)}"
    require(out.suffix in SUFFIXES, "out", rule, str(out))
    shape = None if batched is None else _shape(batched)
    require(shape is None or out.suffix in (".onnx", ".pt2"), "batched", f"None with {out.suffix}", batched)
    require(not boolean("int8", int8) or out.suffix == ".onnx", "int8", f"False with {out.suffix}", int8)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    exported = Exported(checkpoint, facts_of(checkpoint, shape, raw=out.suffix in (".onnx", ".pt2")), shape)
    if int8:
        calibration_images(checkpoint)  # before anything is written
    images = images_for(exported, prove)
    new = [path for path in (out.parent, *out.parent.parents) if not path.exists()]
    try:
        if out.suffix == ".safetensors":
            _require_own_folder(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as folder:
            written = write(exported, Path(folder, out.name))
            proof = proof_of(runner(exported, written[0]), images)
            require_proof(proof, str(out))
            scores, pack = _scores_of(checkpoint)
            written.append(Path(folder, f"{out.name}.md"))
            written[-1].write_text(card(exported, out, proof, scores, pack), "utf-8", "backslashreplace")
            for path in reversed(written):  # the file itself last
                path.replace(out.parent / path.name)
    except OSError as error:
        blame_the_system(error, out)
        remedy = remedy_for(error, "choose a file in a writable folder")
        raise ArgumentError(f"out: {out} cannot be written ({error.strerror or error}); {remedy}.") from None
    finally:
        remove_empty(new)
    files = tuple(out.parent / path.name for path in written)
    return Export(files, proof, _quantized(exported, out) if int8 else None)


def _shape(batched: str | tuple[int, int]) -> tuple[int, int]:
    """Return height and width. Raises ArgumentError unless they are two integers."""
    rule = "height and width in pixels, as in 480x640"
    if isinstance(batched, str):
        found = re.fullmatch(r"(\d{1,5})\s*[x,]\s*(\d{1,5})", batched)
        require(found is not None, "batched", rule, batched)
        batched = (int(found[1]), int(found[2])) if found else (0, 0)
    require(isinstance(batched, tuple | list) and len(batched) == 2, "batched", rule, batched)  # pyright: ignore[reportUnnecessaryIsInstance]
    height, width = (integer("batched", side, 1, rule=rule) for side in batched)
    return height, width


def _quantized(exported: Exported, out: Path) -> Quantized:
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as folder:
        done = quantized(exported, out, Path(folder, f"{out.stem}.int8.onnx"))
        require_agreement(done, out)
        target = done.file.replace(out.parent / done.file.name)
    with out.with_name(f"{out.name}.md").open("a", encoding="utf-8") as card:
        card.write(f"\n## {target.name}\n\nQuantized to int8: {done}, on this machine's processor.\n")
    return done._replace(file=target)


def _require_own_folder(out: Path) -> None:
    """Raise ArgumentError if config.json beside a .safetensors file belongs to other weights."""
    others = [path for path in out.parent.glob("*.safetensors") if path != out]
    if others or ((out.parent / "config.json").exists() and not out.exists()):
        what = (
            f"{out.parent} holds {others[0].name if others else 'config.json'}, and config.json describes one file only"
        )
        raise ArgumentError(
            f"out: {what}; choose another folder, for example {out.with_suffix('') / 'model.safetensors'}."
        )


def _scores_of(checkpoint: Checkpoint) -> tuple[Scores | None, Manifest | None]:
    """Return the scores on the run's val split, and the run's data, if they are on this machine."""
    _, pack = packs_of(checkpoint)
    if pack is None:
        return None, None
    manifest = Manifest.load(pack)
    has_val = checkpoint.fold is not None or ("val" in manifest.splits and manifest.splits["val"].samples)
    return (evaluate(checkpoint, pack, split="val", device="cpu") if has_val else None), manifest
