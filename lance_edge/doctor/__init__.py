"""What this machine has, what works on it, and how to mend the rest: `lance-edge doctor`."""
