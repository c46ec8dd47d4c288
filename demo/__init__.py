"""Serves a small hybrid model with a k8v4 KV cache and shows what came of it."""
