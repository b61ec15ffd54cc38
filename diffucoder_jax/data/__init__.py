"""Text in, batches out: tokenizers, sources and the Grain pipeline."""
