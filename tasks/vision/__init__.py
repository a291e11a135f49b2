"""Vision: image classification with ViT."""
