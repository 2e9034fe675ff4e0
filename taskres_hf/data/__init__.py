"""Any source of labelled pictures, as splits with class ids."""

from .account import Account as Account
from .account import duplicates as duplicates
from .labelled import LabelledImages as LabelledImages
from .sources import load_splits as load_splits
from .training_data import TrainingData as TrainingData
from .training_data import load_evaluation_data as load_evaluation_data
from .training_data import load_training_data as load_training_data
