"""Fine-tuning: what a model is trained on, and the training itself."""

from neuroplast.training.finetune import FinetuneConfig, finetune
from neuroplast.training.train import train

__all__ = ["FinetuneConfig", "finetune", "train"]
