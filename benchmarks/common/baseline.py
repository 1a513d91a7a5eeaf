"""The baseline of every comparison: ImageFolder, DataLoader and a plain training loop. Imports nothing from fastflower."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def augmentation(size: int = 224) -> Any:
    """Return the augmentation of the first student report: crop, flip, 10 degree rotation, color jitter, translation."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(10, transforms.InterpolationMode.BILINEAR),
            transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
            transforms.RandomAffine(0, translate=(0.1, 0.1), interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def loader(folder: Path, transform: Any, *, batch_size: int, pin: bool) -> DataLoader[Any]:
    """Return ImageFolder + DataLoader at its best settings: one persistent worker per core; pass `pin` for CUDA."""
    return DataLoader(
        ImageFolder(folder, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        pin_memory=pin,
    )


def validation(folder: Path, size: int = 224, *, pin: bool) -> DataLoader[Any]:
    """Return a loader of the validation view (resize, center crop) in batches of 64."""
    view = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    normalized = transforms.Compose([*view, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    workers = {"num_workers": os.cpu_count() or 1, "persistent_workers": True}
    return DataLoader(ImageFolder(folder, normalized), 64, pin_memory=pin, **workers)


def accuracy(model: nn.Module, view: DataLoader[Any], device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the fraction of validation images that are classified correctly; `dtype` is as in Trainer."""
    model.eval()
    layout = torch.contiguous_format if dtype is None else torch.channels_last
    correct = seen = 0
    with torch.inference_mode(), autocast(device, dtype):
        for cpu_images, labels in view:
            images = cpu_images.to(device, non_blocking=True, memory_format=layout)
            correct += int((model(images).argmax(1).cpu() == labels).sum())
            seen += len(labels)
    return correct / seen


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast for `dtype`, disabled for float32 and None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype not in (None, torch.float32))


class Trainer:
    """Trains a ResNet-18 from random weights with SGD (lr 0.001, momentum 0.9).

    Args:
        num_classes: Outputs of the head.
        device: Where to train.
        dtype: The autocast dtype, with channels-last memory; None means float32 and NCHW.
    """

    def __init__(self, num_classes: int, device: torch.device, dtype: torch.dtype | None) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.layout = torch.contiguous_format if dtype is None else torch.channels_last
        model: nn.Module = models.resnet18(num_classes=num_classes)
        self.model = model.to(device).to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9)
        self.criterion = nn.CrossEntropyLoss()

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
        """Train on every batch and return the number of images. Does not synchronize the device."""
        self.model.train()
        images_seen = 0
        for cpu_images, cpu_labels in batches:
            images = cpu_images.to(self.device, non_blocking=True, memory_format=self.layout)
            labels = cpu_labels.to(self.device, non_blocking=True)
            with autocast(self.device, self.dtype):
                loss = self.criterion(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            images_seen += len(labels)
        return images_seen


class OneCycle:
    """The plain loop: SGD (momentum 0.9), one-cycle schedule, label smoothing 0.1, batch size 32, channels-last.

    Args:
        random: The transforms before ToTensor.
        dtype: The autocast dtype.
        frozen: Modules to freeze, including their batch norms' statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        random: list[Any],
        size: int,
        *,
        lr: float,
        weight_decay: float,
        epochs: int,
        device: torch.device,
        dtype: torch.dtype,
        frozen: tuple[nn.Module, ...] = (),
    ) -> None:
        normalized = transforms.Compose([*random, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        pin = device.type == "cuda"
        self.batches = loader(folder / "train", normalized, batch_size=32, pin=pin)
        self.view = validation(folder / "val", size, pin=pin)
        self.frozen, self.device, self.dtype = frozen, device, dtype
        for module in frozen:
            module.requires_grad_(requires_grad=False)
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        steps = epochs * len(self.batches)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=lr, total_steps=steps, cycle_momentum=False
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def epoch(self) -> float:
        """Train on every batch and return the accuracy on the validation images afterwards."""
        self.model.train()
        for module in self.frozen:
            module.eval()
        for cpu_images, labels in self.batches:
            images = cpu_images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            with autocast(self.device, self.dtype):
                loss = self.criterion(self.model(images), labels.to(self.device, non_blocking=True))
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
        return accuracy(self.model, self.view, self.device, self.dtype)


RESNET50 = "resnet50_v1"  # fastflower's name for pretrained_resnet50


def pretrained_resnet50(weights: Path, num_classes: int) -> models.ResNet:
    """Return a ResNet-50 v1 (stride 2 in the 1x1 convolutions), the variant that the available weights were trained for."""
    model = models.resnet50()
    model.load_state_dict(torch.load(weights, weights_only=True))
    for stage in (model.layer2, model.layer3, model.layer4):
        first: Any = stage[0]
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model
