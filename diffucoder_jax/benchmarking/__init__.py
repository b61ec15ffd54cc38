"""What `python -m diffucoder_jax.bench` times, one module for each of its benchmarks."""
