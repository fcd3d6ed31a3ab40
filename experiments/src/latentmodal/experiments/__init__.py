"""Recipes, training, evaluation and data around the encoders, bridges and language models."""
