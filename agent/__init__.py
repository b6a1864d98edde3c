"""The agent: the loop, its limits, the context policy, and the command line."""
