"""The passes: one technique, one file."""
