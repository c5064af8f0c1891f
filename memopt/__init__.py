"""memopt: a JAX compiler-pass framework that makes a training step fit a memory budget."""
