"""The forms in which the frozen image tower can run."""
