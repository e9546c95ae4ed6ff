"""Steps of optimizers that need whole matrices, beside the tiled ones: ``shard.py`` says in which order."""
