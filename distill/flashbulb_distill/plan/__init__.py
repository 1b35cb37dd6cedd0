"""How much memory and time a recipe needs, told without loading a weight."""
