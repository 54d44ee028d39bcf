"""What a run would take on given devices, found by compiling its steps without data and without parameters."""
