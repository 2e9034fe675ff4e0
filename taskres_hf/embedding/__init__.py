"""Pictures to frozen embeddings, computed once and kept."""
