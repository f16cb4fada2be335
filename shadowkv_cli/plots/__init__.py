"""One figure a module: `unavailable(data)`, `points(data)` for the CSV and `draw(data)`."""
