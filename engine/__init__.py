"""The model: checkpoint, tokens, forward pass, latent KV cache, sampling and sessions; and models reached over HTTP."""
