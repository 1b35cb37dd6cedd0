"""Training: recipes, the loop, the methods ADP and ADM."""
