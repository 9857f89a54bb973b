"""Triton kernels and their PyTorch twins; they know tensors only, never a model.

The folder stands at the top of the tree and is installed as `lowvram_db.kernels`.
"""

if __name__ == "kernels":
    # The repository's root is on sys.path, and somebody looks for Hugging Face's package of this name. Raising
    # ImportError would end transformers' import; a version below every minimum makes it do without that package.
    __version__ = "0"
