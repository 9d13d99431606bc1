"""What happens inside of a model."""
