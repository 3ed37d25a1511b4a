"""Data sets, their order, decoding and augmentation."""
