"""Files of weights: what is in them, in whatever library's layout, and how they are written."""
