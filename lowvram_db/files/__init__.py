"""Tensors in safetensors files, written and read one after the other."""
