"""Coupled-GRPO and the estimators it is compared with."""
