"""The embedded model, how it was trained, and what `trimfit demo` does with it."""
