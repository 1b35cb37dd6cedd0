"""ODE pairs of the teacher: made once, resumable, read whole."""
