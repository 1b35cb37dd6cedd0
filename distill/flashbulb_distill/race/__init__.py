"""The race: distillation methods side by side, with one teacher and one budget."""
