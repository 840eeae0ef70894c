"""Generated sequences with known answers: what a memory has to hold, and for how long, is known exactly."""
