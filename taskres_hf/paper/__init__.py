"""The paper's datasets, experiments and checkpoints."""
