"""A demo that serves a small hybrid model with a k8v4 KV cache."""
