"""What classifiers over a model of images alone and over one of texts alone share: heads, labels, towers."""
