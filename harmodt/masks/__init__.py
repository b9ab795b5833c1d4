"""The tasks' masks over a model's weights, and how they are learned."""
