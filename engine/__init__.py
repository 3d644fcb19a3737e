"""Run the model: load, embed, sample, score. Imports nothing else from this project."""
