"""How a model is run: loaded, fed, sampled from, scored. Imports nothing else of this project."""
