"""When outliers rose, where, who wrote them, why, and what to do: judged from a run and what its laboratory answers."""
