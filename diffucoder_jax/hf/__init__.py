"""Hugging Face weights: names, shapes and loading."""
