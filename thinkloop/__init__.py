"""thinkloop: an open-weight thinking model and its tools in one process."""
