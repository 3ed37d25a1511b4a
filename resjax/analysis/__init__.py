"""What the papers say about residual networks, as functions to look at."""
