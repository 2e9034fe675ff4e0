"""Few-shot methods over frozen embeddings, one file each and one interface: `fit(features, classifier) -> Fitted`."""
