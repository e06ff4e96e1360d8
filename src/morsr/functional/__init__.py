"""Pure tensor functions: torch, einops and numpy only."""
