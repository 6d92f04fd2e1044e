"""Training: stages, recipes, and one trainer for every scale."""
