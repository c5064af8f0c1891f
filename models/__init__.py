"""Flax models, written plainly, with no memory tricks of their own."""
