"""Images: data sets, networks, classifiers and augmentations."""
