"""The image sets that `data=` may name; the first is the default."""

from __future__ import annotations

from suite.registry import Choice
from tasks.vision.arrays import ArrayDataOptions
from tasks.vision.augment import VisionDataOptions
from tasks.vision.cifar import build_cifar10, build_cifar100
from tasks.vision.fashion_mnist import FashionMnistOptions, build_full, build_mini
from tasks.vision.folder import ImageFolderOptions, build_image_folder, build_imagenet
from tasks.vision.idx import MnistOptions, build_mnist

DATA = {
    "fashion_mnist_mini": Choice(
        VisionDataOptions(), build_mini, "10,000 / 1,000 / 1,000 images, inside the package"
    ),
    "fashion_mnist": Choice(
        FashionMnistOptions(), build_full, "55,000 / 5,000 / 10,000 images, from data.root"
    ),
    "mnist": Choice(MnistOptions(), build_mnist, "55,000 / 5,000 / 10,000 digits, from data.root"),
    "cifar10": Choice(
        ArrayDataOptions(), build_cifar10, "45,000 / 5,000 / 10,000 images, from data.root"
    ),
    "cifar100": Choice(
        ArrayDataOptions(), build_cifar100, "45,000 / 5,000 / 10,000 images, from data.root"
    ),
    "image_folder": Choice(
        ImageFolderOptions(), build_image_folder, "a folder of images for each class, in data.root"
    ),
    "imagenet": Choice(
        ImageFolderOptions(), build_imagenet, "ImageNet-1K, train and val folders in data.root"
    ),
}
