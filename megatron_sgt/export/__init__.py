"""From a checkpoint to a Hugging Face folder, and the proof that both are the same model."""
