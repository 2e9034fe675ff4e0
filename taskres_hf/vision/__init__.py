"""Classifiers over an image tower alone: its head, class names to the rows of it, the tower, the model."""
