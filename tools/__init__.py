"""What a model may call: the Tool contract, search over a folder, and a python sandbox."""
