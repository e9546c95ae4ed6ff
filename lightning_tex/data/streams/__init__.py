"""Streams in parts: what each of them reads, where it stands, and how data ranks and workers share them."""
