"""Training data: images and latents of images, and the loader that reads ahead."""

from fastfar.data.batches import Batches
from fastfar.data.cache import build_cache
from fastfar.data.fashion_mnist import (
    CLASS_NAMES,
    IMAGE_SIZE,
    PADDING,
    RAW_SIZE,
    load_fashion_mnist,
    read_idx,
)
from fastfar.data.images import Examples, ImageDataset, balanced_labels, to_float, to_uint8
from fastfar.data.latents import LatentCache
from fastfar.data.open import open_data
from fastfar.data.sources import ClassFolders, Pictures, SavedDataset, Shards
from fastfar.data.statistics import LatentStatistics, measure_statistics
from fastfar.data.transform import Transform

__all__ = [
    "CLASS_NAMES",
    "IMAGE_SIZE",
    "PADDING",
    "RAW_SIZE",
    "Batches",
    "ClassFolders",
    "Examples",
    "ImageDataset",
    "LatentCache",
    "LatentStatistics",
    "Pictures",
    "SavedDataset",
    "Shards",
    "Transform",
    "balanced_labels",
    "build_cache",
    "load_fashion_mnist",
    "measure_statistics",
    "open_data",
    "read_idx",
    "to_float",
    "to_uint8",
]
