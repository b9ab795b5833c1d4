"""One binary mask per task over a model's weights, and how it is learned."""
