"""Models at few bits: what rounds them, what they then predict, and how a run holds the results."""
