"""What the encoders made, kept by content: latent moments and text embeddings."""
