"""ODE pairs of the teacher: made once, resumable, read whole or while more are made."""
