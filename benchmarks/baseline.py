"""The other side of every comparison: torchvision's ImageFolder, torch's DataLoader and a plain loop. Imports no fastflower."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def augmentation(size: int = 224) -> Any:
    """The augmentation of the second student report: crop, flip, rotation, jitter, shift."""
    from torchvision import transforms

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
    """ImageFolder + DataLoader as well as they can be set: a worker a core, kept between epochs, pinned for CUDA."""
    return DataLoader(
        ImageFolder(folder, transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
        pin_memory=pin,
    )


class Trainer:
    """ResNet-18 from random weights; SGD 0.9 at 0.001. `fast` adds bfloat16 autocast and channels-last memory."""

    def __init__(self, num_classes: int, device: torch.device, *, fast: bool) -> None:
        torch.manual_seed(0)
        self.device, self.fast = device, fast
        self.layout = torch.channels_last if fast else torch.contiguous_format
        model: nn.Module = models.resnet18(num_classes=num_classes)
        self.model = model.to(device).to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9)
        self.criterion = nn.CrossEntropyLoss()

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
        """Train on every batch; returns the number of images. The device may still be at work."""
        self.model.train()
        images_seen = 0
        for cpu_images, cpu_labels in batches:
            images = cpu_images.to(self.device, non_blocking=True, memory_format=self.layout)
            labels = cpu_labels.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.fast):
                loss = self.criterion(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            images_seen += len(labels)
        return images_seen
