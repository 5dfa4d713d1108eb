"""A grid of prunings over several draws of the windows, and what it found."""
