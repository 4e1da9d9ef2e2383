"""Reading, checking and preparing data, for training, evaluation and tokenizing alike."""

from varkit.data.check import DataReport, check_images
from varkit.data.dataset import ImageDataset, collate
from varkit.data.fashion import FASHION_CLASSES, prepare_fashion_mnist
from varkit.data.images import open_images
from varkit.data.transforms import ImageTransform, SkippedImage

__all__ = [
    "FASHION_CLASSES",
    "DataReport",
    "ImageDataset",
    "ImageTransform",
    "SkippedImage",
    "check_images",
    "collate",
    "open_images",
    "prepare_fashion_mnist",
]
