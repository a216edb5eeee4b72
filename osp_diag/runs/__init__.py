"""What a run is on disk and in memory: the schema's arrays written, locked, read, followed and shown."""
