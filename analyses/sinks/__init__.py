"""How heads make their attention sinks, in words and by head."""
