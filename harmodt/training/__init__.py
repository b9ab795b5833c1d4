"""What drives a training run and keeps its directory."""
