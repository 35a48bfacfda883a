"""tulu_lightning: the Tülu 3 post-training recipe as PyTorch Lightning components."""

__version__ = "0.1.0"
