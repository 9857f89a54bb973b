"""Where the bytes go: attention backends and peak-memory readings."""
