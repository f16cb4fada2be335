"""Models that the program knows by a name of its own, and how those without a hub get here."""
