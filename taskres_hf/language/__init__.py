"""Classifiers over a model of texts alone: how it pools, the model without its head, the classifier."""
