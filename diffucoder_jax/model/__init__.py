"""The network: a Qwen2-shaped Transformer with a choice of attention pattern; nothing of diffusion."""
