"""Random checkpoints of image towers."""

from image_towers import classifier as classifier
from image_towers import labels as labels
