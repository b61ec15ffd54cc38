"""How to run: meshes, checkpoints, optimisers, metrics. Knows nothing of language models."""
