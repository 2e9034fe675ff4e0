"""Training the residual."""

from .arguments import TaskResTrainingArguments as TaskResTrainingArguments
from .trainer import TaskResTrainer as TaskResTrainer
