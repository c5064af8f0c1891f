"""The partition wall (placeholder)."""
def divide(closed, index, at): return None
def region(jaxpr, pair, at): return None
