"""Training the residual."""

from .arguments import TaskResTrainingArguments as TaskResTrainingArguments
from .arguments import recorded_arguments as recorded_arguments
from .strength import suggest_strength as suggest_strength
from .trainer import TaskResTrainer as TaskResTrainer
