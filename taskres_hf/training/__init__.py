"""Training the residual."""

from .arguments import TaskResTrainingArguments as TaskResTrainingArguments
from .strength import suggest_strength as suggest_strength
from .trainer import TaskResTrainer as TaskResTrainer
