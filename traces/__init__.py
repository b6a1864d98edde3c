"""What happened in a run: the event vocabulary, the trace format, reading and replay."""
