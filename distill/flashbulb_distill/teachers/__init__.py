"""Teachers: wrappers that give every family one face, and one whose score is exact."""
