"""The one-step model, its parts, losses, metrics and the restorer."""
