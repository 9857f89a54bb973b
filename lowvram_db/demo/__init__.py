"""A model and photos small enough for a CPU, to see DreamBooth work without a download."""
