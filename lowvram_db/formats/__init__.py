"""Model files as people have them: single files in and out, what they are, what their tensors are called."""
