"""Liger: Triton kernels for training language models, and one line that puts them into a Hugging Face model."""
