"""Runs untrusted programs and judges them: `sandbox.Sandbox`. Imports nothing of ours, nor JAX."""
